"""The item store: everything that a request needs of an item, on disk, mapped, in versions. See docs/serving.md."""

from .ann import AnnIndex
from .columns import DTYPES, ItemRows, Meta
from .manifest import StoreError
from .snapshot import StoreVersion
from .store import ItemStore, StoreBusyError
from .writer import StoreWriter, write_part

__all__ = [
    "DTYPES",
    "AnnIndex",
    "ItemRows",
    "ItemStore",
    "Meta",
    "StoreBusyError",
    "StoreError",
    "StoreVersion",
    "StoreWriter",
    "write_part",
]
