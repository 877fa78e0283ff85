"""``mmrec index``: the items of a trained run into a store, from which requests are answered."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import say, status, write_json
from .data import load_catalogue
from .runs import TrainedRun, open_run
from .sharded import build_with_ray, build_with_torchrun, under_torchrun

if TYPE_CHECKING:
    from ..adaptation import Catalogue
    from ..recommender.store import ItemRows, Meta, StoreVersion

__all__ = ["index_command", "write_store"]

_PART = 1 << 16


def index_command(
    *, run: Path, out: Path, dtype: str, items: Path | None, update: bool, engine: str, workers: int | None,
    data: Path | None, layout: str, json_file: Path | None,
) -> None:  # fmt: skip
    """See ``mmrec index --help``."""
    began = time.perf_counter()
    opened = open_run(run)
    several = engine == "ray" or under_torchrun()
    if items is None and (update or several):
        raise ValueError(f"{'--update' if update else 'building in shards'} needs --items, a folder of items to encode")
    if engine == "ray" and under_torchrun():
        raise ValueError("--engine ray is a job of one process; start it without torchrun")
    if update and several:
        raise ValueError("--update adds to a store in one process; without --engine and torchrun")
    if items is not None and several:
        if not _build(opened, items, out, dtype, engine, workers):
            return  # another rank tells of it
        version = _current(out)
    elif items is not None:
        version = _write_items(opened, items, out, dtype, update)
    else:
        catalogue, fingerprint = load_catalogue(opened.data if data is None else data, layout)
        opened.check_data(catalogue, fingerprint)
        version = write_store(opened, catalogue, out, dtype)
    size = sum(os.path.getsize(out / file) for file in version.files)
    dtype = version.meta.dtype
    content: dict[str, Any] = {
        "command": "index", "store": str(out), "version": version.number, "items": len(version), "dtype": dtype,
        "bytes": size, "model": opened.model_id, "run": str(run), "seconds": round(time.perf_counter() - began, 3),
    }  # fmt: skip
    say(
        f"{out}: version {version.number}, {len(version)} items of width {version.meta.width} in {dtype}, "
        f"{size / 2**20:.1f} MiB"
    )
    write_json(json_file, content)


def _build(run: TrainedRun, items: Path, folder: Path, dtype: str, engine: str, workers: int | None) -> bool:
    encoder, meta = run.item_encoder(), meta_of(run, dtype)
    if engine == "ray":
        build_with_ray(run, items, folder, meta, encoder, workers)
        return True
    return build_with_torchrun(run, items, folder, meta, encoder)


def _current(folder: Path) -> StoreVersion:
    from ..recommender.store import ItemStore

    return ItemStore(folder).current()


def _write_items(run: TrainedRun, items: Path, folder: Path, dtype: str, update: bool) -> StoreVersion:
    """The items of a folder, encoded by the run's model: as a store of their own, or into one that is there."""
    from ..adaptation import Catalogue
    from ..recommender.store import ItemStore

    encoder = run.item_encoder()
    catalogue = Catalogue.load_items(items, encoder.recipe.schema)
    store = ItemStore(folder)
    if update:
        check_model(run, store.current())  # before hours of work
    with status(f"encoding {catalogue.num_items} items"), store.writer() as writer:
        if update:
            check_model(run, store.current())  # it may have been written anew meanwhile
            for part in encoder.encode(catalogue):
                writer.upsert(part)
        else:
            writer.create(meta_of(run, dtype), encoder.encode(catalogue))
    return store.current()


def check_model(run: TrainedRun, version: StoreVersion) -> None:
    """``ValueError`` unless the store is of this run."""
    if version.meta.model != run.model_id:
        raise ValueError(f"the store holds items of model {version.meta.model}, {run.folder} is {run.model_id}")


def meta_of(run: TrainedRun, dtype: str) -> Meta:
    """What a store of the run has for all items."""
    from ..recommender.store import Meta

    return Meta(width=run.config.width, dtype=dtype, modalities=run.modalities, model=run.model_id, tokens={})


def write_store(run: TrainedRun, catalogue: Catalogue, folder: Path, dtype: str) -> StoreVersion:
    """The run's items, with its stored vectors, as a new version of the store in ``folder``."""
    from ..recommender.store import ItemStore

    store = ItemStore(folder)
    with status(f"writing {catalogue.num_items} items"), store.writer() as writer:
        writer.create(meta_of(run, dtype), _parts(run, catalogue))
    return store.current()


def _parts(run: TrainedRun, catalogue: Catalogue) -> Iterator[ItemRows]:
    import torch

    from ..adaptation.fingerprint import item_fingerprints
    from ..recommender.store import ItemRows

    vectors, mass = run.items
    known, content = torch.from_numpy(run.trained_items), torch.from_numpy(item_fingerprints(catalogue))
    titles = catalogue.item_titles
    for begin in range(0, catalogue.num_items, _PART):
        part = slice(begin, begin + _PART)
        yield ItemRows(
            catalogue.item_ids[part], vectors[part], mass[part], known[part], content[part], titles[part], {}
        )
