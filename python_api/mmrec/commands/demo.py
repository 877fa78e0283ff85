"""``mmrec demo``: the whole way on a generated catalogue."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .console import say, status, write_json
from .data import Data, load_data
from .recommend import answer, print_answer
from .runs import REPORT, Source, open_run
from .settings import Choices
from .train import train_and_report

if TYPE_CHECKING:
    from ..adaptation import Catalogue

__all__ = ["demo_command"]

_EPOCHS = 40
_SHOWN = 5


def demo_command(
    *,
    out: Path,
    users: int,
    items: int,
    epochs: int | None,
    seed: int,
    backbone: str | None,
    settings: Sequence[str],
    json_file: Path | None,
) -> None:
    """See ``mmrec demo --help``."""
    start = time.monotonic()
    _check_backbone(backbone)
    folder = out / "catalogue"
    _generate(folder, users, items, seed)
    data = load_data(folder, "S", layout="folder")
    chosen = Choices(backbone=backbone, epochs=epochs or _EPOCHS, settings=tuple(settings))
    source = Source(folder.absolute(), "folder", "S", 0)
    content = train_and_report(data, chosen.config(data.catalogue, seed), out / "run", source, resume=True)
    answers = _recommend(data, out / "run")
    seconds = time.monotonic() - start
    say(f"The whole demo took {seconds:.0f} s. Report: {(out / 'run' / REPORT).absolute()}")
    say(f"Next: mmrec recommend --run {out / 'run'} --user {data.catalogue.user_ids[1]}")
    write_json(json_file, {**content, "command": "demo", "demo_seconds": round(seconds, 1), "recommendations": answers})


def _check_backbone(backbone: str | None) -> None:
    """Fails before any work if the language model is not there: no other encoder takes its place."""
    if backbone is not None:
        return
    from ..llm.minilm import minilm_path

    minilm_path()


def _generate(folder: Path, users: int, items: int, seed: int) -> None:
    from ..adaptation import Catalogue, CatalogueError, generate_catalogue

    name = f"generated-{users}x{items}-seed{seed}"
    try:
        there: Catalogue | None = Catalogue.load(folder, layout="folder") if folder.exists() else None
    except CatalogueError:
        there = None
    if there is not None and there.name == name:
        say(f"{folder}: {name} is there already")
        return
    say(f"generating {users} users and {items} items in {folder}")
    with status("generating a catalogue"):
        generate_catalogue(folder, users=users, items=items, seed=seed)


def _recommend(data: Data, folder: Path) -> list[dict[str, Any]]:
    """For a known user, and for a history that holds an item which training never saw."""
    run, catalogue = open_run(folder), data.catalogue
    answers = [answer(run, catalogue, _SHOWN, user=catalogue.user_ids[0])]
    cold = np.flatnonzero(~run.trained_items)
    warm = np.flatnonzero(run.trained_items)
    pasted = [catalogue.item_ids[row] for row in (*warm[:1], *cold[:1])]
    answers.append(answer(run, catalogue, _SHOWN, history=pasted))
    for found in answers:
        print_answer(found)
    return answers
