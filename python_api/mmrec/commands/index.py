"""``mmrec index``: the items of a trained run into a store, from which requests are answered."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import say, status, write_json
from .data import load_catalogue
from .runs import TrainedRun, open_run
from .sharded import build_with_ray, build_with_torchrun, under_torchrun

if TYPE_CHECKING:
    from ..adaptation import Catalogue
    from ..recommender.encoder import ItemEncoder
    from ..recommender.store import ItemRows, Meta, StoreVersion

__all__ = ["index_command", "write_store"]

_PART = 1 << 16


def index_command(
    *, run: Path, out: Path, dtype: str, tokens: Sequence[str], items: Path | None, update: bool, remove: Path | None,
    engine: str, workers: int | None, data: Path | None, layout: str, json_file: Path | None,
) -> None:  # fmt: skip
    """See ``mmrec index --help``."""
    began = time.perf_counter()
    opened = open_run(run)
    several = engine == "ray" or under_torchrun()
    if remove is not None and (items is not None or update or tokens or several):
        raise ValueError(
            "--remove takes items out of the store that is there, in one process, without other options that write"
        )
    if items is None and (update or several):
        raise ValueError(f"{'--update' if update else 'building in shards'} needs --items, a folder of items to encode")
    if engine == "ray" and under_torchrun():
        raise ValueError("--engine ray is a job of one process; start it without torchrun")
    if update and several:
        raise ValueError("--update adds to a store in one process; without --engine and torchrun")
    if update and tokens:
        raise ValueError("--update keeps the tokens that the store has; --tokens is for a new one")
    meta = meta_of(opened, dtype, tokens)
    if remove is not None:
        version = _remove(opened, out, remove)
    elif items is not None and several:
        if not _build(opened, items, out, meta, engine, workers):
            return  # another rank tells of it
        version = _current(out)
    elif items is not None:
        encoder, others = _others(opened, items)
        version = _update(opened, out, encoder, others) if update else _encode(out, meta, encoder, others)
    elif tokens:  # a run does not keep them
        version = _encode(out, meta, opened.item_encoder(), _catalogue(opened, data, layout))
    else:
        version = write_store(opened, _catalogue(opened, data, layout), out, dtype)
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


def _others(run: TrainedRun, items: Path) -> tuple[ItemEncoder, Catalogue]:
    from ..adaptation import Catalogue

    encoder = run.item_encoder()
    return encoder, Catalogue.load_items(items, encoder.recipe.schema)


def _catalogue(run: TrainedRun, data: Path | None, layout: str) -> Catalogue:
    """What the run was trained on."""
    catalogue, fingerprint = load_catalogue(run.data if data is None else data, layout)
    run.check_data(catalogue, fingerprint)
    return catalogue


def _build(run: TrainedRun, items: Path, folder: Path, meta: Meta, engine: str, workers: int | None) -> bool:
    encoder = run.item_encoder()
    if engine == "ray":
        build_with_ray(run, items, folder, meta, encoder, workers)
        return True
    return build_with_torchrun(run, items, folder, meta, encoder)


def _current(folder: Path) -> StoreVersion:
    from ..recommender.store import ItemStore

    return ItemStore(folder).current()


def _encode(folder: Path, meta: Meta, encoder: ItemEncoder, catalogue: Catalogue) -> StoreVersion:
    """A store of a catalogue's items, as the run's model reads them."""
    from ..recommender.store import ItemStore

    store = ItemStore(folder)
    with status(f"encoding {catalogue.num_items} items"), store.writer() as writer:
        writer.create(meta, encoder.encode(catalogue))
    return store.current()


def _update(run: TrainedRun, folder: Path, encoder: ItemEncoder, catalogue: Catalogue) -> StoreVersion:
    """The same, into a store that is there."""
    from ..recommender.store import ItemStore

    store = ItemStore(folder)
    check_model(run, store.current())  # before hours of work
    with status(f"encoding {catalogue.num_items} items"), store.writer() as writer:
        check_model(run, store.current())  # it may have been written anew meanwhile
        for part in encoder.encode(catalogue):
            writer.upsert(part)
    return store.current()


def _remove(run: TrainedRun, folder: Path, file: Path) -> StoreVersion:
    """Without the items that a file names."""
    from ..recommender.store import ItemStore

    lines = file.read_text(encoding="utf-8-sig").split("\n")  # no other line ends: ids may hold anything
    ids = [name for line in lines if (name := line.removesuffix("\r"))]
    store = ItemStore(folder)
    check_model(run, store.current())
    with store.writer() as writer:
        check_model(run, store.current())
        unknown = [name for name, row in zip(ids, store.current().rows(ids).tolist(), strict=True) if row < 0]
        writer.remove(ids)
    shown = f": {', '.join(map(repr, unknown[:5]))}{', …' if len(unknown) > 5 else ''}" if unknown else ""
    say(f"{len(set(ids) - set(unknown))} items removed, {len(unknown)} of {file} are not in the store{shown}")
    return store.current()


def check_model(run: TrainedRun, version: StoreVersion) -> None:
    """``ValueError`` unless the store is of this run."""
    if version.meta.model != run.model_id:
        raise ValueError(f"the store holds items of model {version.meta.model}, {run.folder} is {run.model_id}")


def meta_of(run: TrainedRun, dtype: str, tokens: Sequence[str] = ()) -> Meta:
    """What a store of the run has for all items, with the token rows of some modalities of its content."""
    from ..recommender.store import Meta

    unknown = [name for name in tokens if name not in run.config.content]
    if unknown:
        raise ValueError(
            f"--tokens: the run's content is {', '.join(run.config.content) or 'none'}, not {unknown[0]!r}"
        )
    width = run.config.width
    return Meta(width, dtype, run.modalities, run.model_id, dict.fromkeys(tokens, width))


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
