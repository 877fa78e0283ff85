"""``mmrec export``: a catalogue in the layout of another toolbox, and what that layout did not hold."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .console import print_rows, say, status, write_json
from .data import load_catalogue

if TYPE_CHECKING:
    from ..adaptation import Catalogue
    from ..evaluation import Split

__all__ = ["export_command", "split_labels"]


def export_command(
    *, data: Path, to: str, out: Path, layout: str, protocol: str | None, split_seed: int, overwrite: bool,
    json_file: Path | None,
) -> None:  # fmt: skip
    """See ``mmrec export --help``."""
    from ..adaptation.writers import write

    if protocol is not None and to != "mmrec":
        raise ValueError(f"--protocol {protocol}: only layout mmrec keeps a split, and --to is {to!r}")
    catalogue, fingerprint = load_catalogue(data, layout)
    options: dict[str, Any] = {}
    rule = None
    if to == "mmrec" and (catalogue.interactions.split is None or protocol not in (None, "G")):
        options["labels"], parts = split_labels(catalogue, protocol or "G", split_seed)
        rule = f"protocol {parts.protocol}, {parts.origin}"
    with status(f"writing {out}"):
        export = write(catalogue, out, to, overwrite=overwrite, **options)
    say(f"{export.folder}: {', '.join(export.files)}")
    if rule is not None:
        say(f"split: {rule}")
    parts_written = [[part, where, export.changed.get(part, "")] for part, where in export.written.items()]
    print_rows(["written", "where", "changed"], parts_written, left=3)
    if export.left_out:
        print_rows(["left out", "why"], [list(entry) for entry in export.left_out.items()], left=2)
    else:
        say("Nothing was left out.")
    content = {"command": "export", "dataset": catalogue.name, "fingerprint": fingerprint, "split": rule}
    write_json(json_file, content | dataclasses.asdict(export))


def split_labels(catalogue: Catalogue, protocol: str, seed: int) -> tuple[np.ndarray, Split]:
    """int8 ``[N]``, 0 train, 1 valid, 2 test for each interaction under ``protocol``, and the split itself.

    Users whom the protocol drops, because they have no training part, are test: whoever reads the labels drops them
    again.
    """
    import polars as pl

    from ..adaptation import Catalogue
    from ..evaluation import split

    # Numbers of interactions in place of items: the parts then say which of a pair's repetitions went where.
    ids = [str(number) for number in range(len(catalogue.interactions))]
    numbers = np.arange(len(ids), dtype=np.int32)
    numbered = Catalogue(
        name=catalogue.name,
        item_ids=ids,
        user_ids=catalogue.user_ids,
        interactions=dataclasses.replace(catalogue.interactions, item=numbers),
        items=pl.DataFrame({"item_id": ids}, schema={"item_id": pl.String}),
    )
    parts = split(numbered, protocol, seed=seed)
    labels = np.full(len(ids), 2, np.int8)
    labels[parts.train.ids], labels[parts.valid.ids] = 0, 1
    return labels, parts
