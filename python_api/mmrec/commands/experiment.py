"""``mmrec experiment``: one question, its trainings, its tables and its report."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

from .console import print_rows, say, write_json
from .experiments import EXPERIMENTS
from .results import seeds_of
from .typed import parse_settings

__all__ = ["experiment_command", "list_experiments"]


def list_experiments() -> None:
    """Prints what there is, with settings and their defaults."""
    for name, experiment in EXPERIMENTS.items():
        _, settings = experiment.load()
        rows = [[field.name, str(getattr(settings(), field.name))] for field in dataclasses.fields(settings)]
        say(f"{name}: {experiment.question}")
        print_rows(["--set", "default"], rows, left=2)


def experiment_command(
    *, name: str, data: Path, out: Path, seeds: str | None, settings: Sequence[str], layout: str, json_file: Path | None
) -> None:
    """See ``mmrec experiment --help``."""
    import torch

    from .experiments.base import Context

    if name not in EXPERIMENTS:
        raise ValueError(f"experiment {name!r}: there are {', '.join(EXPERIMENTS)}")
    experiment = EXPERIMENTS[name]
    run, kind = experiment.load()
    known = {field.name: getattr(kind(), field.name) for field in dataclasses.fields(kind)}
    given = parse_settings(settings, known, name)
    numbers = experiment.seeds if seeds is None else tuple(seeds_of(seeds, fewest=1))
    context = Context(name, data, layout, out, numbers, kind(**given))
    started = time.monotonic()
    say(f"{name}: {experiment.question}")
    read, found = run(context)
    facts = {**found.facts, "threads": torch.get_num_threads(), "torch": torch.__version__}
    content = context.write(read, dataclasses.replace(found, facts=facts), started)
    write_json(json_file, content)
