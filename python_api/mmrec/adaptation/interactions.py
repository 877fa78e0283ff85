"""Who chose what, and when."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .errors import CatalogueError

SPLITS = ("train", "valid", "test")
_DTYPES = {"user": np.int32, "item": np.int32, "rating": np.float32, "timestamp": np.int64, "split": np.int8}


@dataclass(frozen=True, eq=False)
class Interactions:
    """Interactions as parallel arrays of length N, sorted by (user, time, item row).

    Time ties inside a user are ordered by item row. Without timestamps the source's order is kept inside each user.
    Rows that repeat a (user, item) pair are kept as they stand; :attr:`duplicates` counts them.

    Attributes:
        user: int32 ``[N]``, row in ``Catalogue.user_ids``.
        item: int32 ``[N]``, row in ``Catalogue.item_ids``.
        rating: float32 ``[N]`` (NaN where one is missing), or None.
        timestamp: int64 ``[N]``, seconds since 1970, or None where the source has order only.
        split: int8 ``[N]``, 0 train, 1 valid, 2 test, or None where the source has no split.

    Build it with :meth:`from_rows`, which sorts; the constructor refuses rows that are out of order.
    """

    user: np.ndarray
    item: np.ndarray
    rating: np.ndarray | None = None
    timestamp: np.ndarray | None = None
    split: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name, dtype in _DTYPES.items():
            value = getattr(self, name)
            if value is None and name not in ("user", "item"):
                continue
            if (
                not isinstance(value, np.ndarray)
                or value.dtype != dtype
                or value.shape != self.user.shape
                or value.ndim != 1
            ):
                got = f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
                raise CatalogueError(f"interactions: {name} needs {np.dtype(dtype)} [{np.size(self.user)}], got {got}")
        if self.split is not None and len(self.split) and not ((self.split >= 0) & (self.split <= 2)).all():
            raise CatalogueError(f"interactions: split needs 0, 1 or 2, got {np.unique(self.split).tolist()}")
        if len(self.user) and not self._in_order():
            raise CatalogueError("interactions: rows are not sorted by (user, time, item); use Interactions.from_rows")

    def _in_order(self) -> bool:
        user = np.diff(self.user)
        if (user < 0).any():
            return False
        if self.timestamp is None:
            return True
        time, item = np.diff(self.timestamp), np.diff(self.item)
        return not ((user == 0) & ((time < 0) | ((time == 0) & (item < 0)))).any()

    @classmethod
    def from_rows(
        cls,
        user: np.ndarray,
        item: np.ndarray,
        *,
        rating: np.ndarray | None = None,
        timestamp: np.ndarray | None = None,
        split: np.ndarray | None = None,
    ) -> Interactions:
        """Sorts rows of any order into the catalogue's order; rows equal in (user, time, item) keep the given order."""
        keys = (user,) if timestamp is None else (item, timestamp, user)
        order = np.lexsort(keys)

        def ordered(name: str, values: np.ndarray) -> np.ndarray:
            return np.ascontiguousarray(np.asarray(values)[order], dtype=_DTYPES[name])

        return cls(
            user=ordered("user", user),
            item=ordered("item", item),
            rating=None if rating is None else ordered("rating", rating),
            timestamp=None if timestamp is None else ordered("timestamp", timestamp),
            split=None if split is None else ordered("split", split),
        )

    def __len__(self) -> int:
        return len(self.user)

    @property
    def duplicates(self) -> int:
        """Rows whose (user, item) pair has occurred before."""
        return len(self) - self.unique_pairs

    @property
    def unique_pairs(self) -> int:
        """Distinct (user, item) pairs."""
        return len(np.unique(self.user.astype(np.int64) << 32 | self.item.astype(np.int64)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Interactions):
            return NotImplemented
        return all(_same(getattr(self, name), getattr(other, name)) for name in _DTYPES)

    __hash__ = None  # type: ignore[assignment]


def _same(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    if a is None or b is None:
        return a is b
    return np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
