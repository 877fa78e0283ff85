"""From ``--data`` to a catalogue and its split."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .console import status

if TYPE_CHECKING:
    from ..adaptation import Catalogue
    from ..evaluation import Split

__all__ = ["Data", "load_catalogue", "load_data"]


@dataclass(frozen=True, eq=False)
class Data:
    """A catalogue, its content hash and one split of its interactions."""

    catalogue: Catalogue
    fingerprint: str
    split: Split


def load_catalogue(folder: Path, layout: str = "auto") -> tuple[Catalogue, str]:
    """The catalogue in ``folder`` and its fingerprint."""
    from ..adaptation import Catalogue

    with status(f"reading {folder}"):
        catalogue = Catalogue.load(folder, layout=layout)
        return catalogue, catalogue.fingerprint()


def load_data(
    folder: Path, protocol: str, *, layout: str = "auto", split_seed: int = 0, hold_out: float | None = None
) -> Data:
    """Reads ``folder`` and splits it; ``ValueError`` if nobody can be evaluated under this protocol.

    Args:
        hold_out: share of the trained items that leaves training and validation, drawn with ``split_seed``.
    """
    from ..evaluation import split
    from ..evaluation.protocols import hold_out_items

    catalogue, fingerprint = load_catalogue(folder, layout)
    parts = split(catalogue, protocol, seed=split_seed)
    if hold_out is not None:
        parts = hold_out_items(parts, hold_out, seed=split_seed)
    if not len(parts.users("test")):
        raise ValueError(
            f"protocol {protocol} leaves no user to evaluate in {catalogue.name!r}: {catalogue.num_users} users, "
            f"{len(catalogue.interactions)} interactions, rule {parts.origin!r}"
        )
    return Data(catalogue, fingerprint, parts)
