"""``mmrec peers``: published models, trained and evaluated here, beside the floors."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import say, status, write_json
from .data import Data, load_data
from .evaluate import SHOWN, figures, with_metrics
from .rankers import evaluate_floor, floor_names
from .results import print_means, seeds_of

if TYPE_CHECKING:
    from ..evaluation import Result
    from ..peers import Pairwise, PairwiseConfig

__all__ = ["NAMES", "peers_command"]

# What a model is made with, and what its training has that is not PairwiseConfig's default. BPR's weight decay was the
# best of 1e-3, 1e-2 and 1e-1 on the validation part of amazon-baby, protocol G.
NAMES: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "bpr": ({"width": 64}, {"weight_decay": 0.1}),
    "lightgcn": ({"width": 64, "layers": 3}, {}),
}


def peers_command(
    *, data: Path, protocol: str, models: Sequence[str], seeds: str, settings: Sequence[str], layout: str,
    split_seed: int, hold_out: float | None, json_file: Path | None,
) -> None:  # fmt: skip
    """See ``mmrec peers --help``."""
    from ..evaluation import evaluate, interval

    numbers = seeds_of(seeds, fewest=1)
    chosen = {name: _settings(name, settings) for name in models or NAMES}
    read = load_data(data, protocol, layout=layout, split_seed=split_seed, hold_out=hold_out)
    say(f"{read.catalogue!r}, protocol {read.split.protocol}: {read.split.origin}")
    metrics = with_metrics(SHOWN)
    results = {name: evaluate_floor(name, read, metrics=metrics) for name in floor_names(None)}
    trained: dict[str, list[Result]] = {}
    facts: dict[str, list[dict[str, Any]]] = {}
    for name, (own, training) in chosen.items():
        for seed in numbers:
            config = dataclasses.replace(training, seed=seed)
            fitted, seconds = _fit(name, own, config, read)
            found = evaluate(
                fitted, read.split, model=name, dataset=read.catalogue.name, fingerprint=read.fingerprint, seed=seed,
                metrics=metrics, groups=False,
            )  # fmt: skip
            trained.setdefault(name, []).append(found)
            facts.setdefault(name, []).append(
                {"seed": seed, "best_epoch": fitted.best_epoch, "seconds": seconds, **own, **dataclasses.asdict(config)}
            )
    every = {**trained, **{name: [floor] for name, floor in results.items()}}
    means = {name: {metric: interval(entry, metric) for metric in SHOWN} for name, entry in every.items()}
    first = next(iter(results.values()))
    print_means("model", means, f"{first.dataset} ({first.fingerprint[:12]}), {first.protocol}, test; seeds {seeds}")
    content = {
        "command": "peers", "dataset": first.dataset, "fingerprint": first.fingerprint, "protocol": first.protocol,
        "split": first.split, "split_rule": read.split.origin, "mask": first.mask, "seed": numbers,
        "models": {name: figures(values) for name, values in means.items()}, "training": facts,
    }  # fmt: skip
    write_json(json_file, content)


def _fit(name: str, own: Mapping[str, Any], config: PairwiseConfig, data: Data) -> tuple[Any, float]:
    from ..peers import fit_pairwise

    with status(f"training {name}, seed {config.seed}"):
        fitted = fit_pairwise(_maker(name, own, data), data.split, config)
    seconds = sum(row["seconds"] for row in fitted.curves)
    say(f"{name}, seed {config.seed}: epoch {fitted.best_epoch} of {len(fitted.curves)} was best; {seconds:.0f} s")
    return fitted, round(seconds, 1)


def _maker(name: str, own: Mapping[str, Any], data: Data) -> Callable[[], Pairwise]:
    from ..peers import BPR, Graph, LightGCN

    users, items = data.split.num_users, data.split.num_items
    if name == "bpr":
        return lambda: BPR(users, items, **own)
    graph = Graph(data.split.train, items)
    return lambda: LightGCN(graph, **own)


def _settings(name: str, settings: Sequence[str]) -> tuple[dict[str, Any], PairwiseConfig]:
    """What the model itself is made with, and how it is trained."""
    from ..peers import PairwiseConfig

    if name not in NAMES:
        raise ValueError(f"--model: there are {', '.join(NAMES)}; got {name!r}")
    own, given = (dict(fields) for fields in NAMES[name])
    training = {field.name for field in dataclasses.fields(PairwiseConfig)} - {"seed"}
    every = {field for fields, _ in NAMES.values() for field in fields}
    for entry in settings:
        key, equals, text = entry.partition("=")
        if not equals or key not in training | every:
            raise ValueError(f"--set needs NAME=VALUE with one of {', '.join(sorted(training | every))}, got {entry!r}")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        if key in own:
            own[key] = value
        elif key in training:
            given[key] = value
    return own, PairwiseConfig(**given)
