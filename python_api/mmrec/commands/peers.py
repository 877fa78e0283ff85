"""``mmrec peers``: published models, trained and evaluated here, beside the floors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import say, status, write_json
from .data import Data, load_data
from .evaluate import SHOWN, figures, with_metrics
from .rankers import evaluate_floor, floor_names
from .results import print_means, seeds_of
from .runs import cache_folder
from .typed import parse_settings

if TYPE_CHECKING:
    from torch import Tensor

    from ..evaluation import Result
    from ..peers import Fitted, FittedSequence
    from ..peers.training import FitConfig
    from .settings import Choices

__all__ = ["NAMES", "Peers", "peers_command"]


@dataclass(frozen=True)
class _Peer:
    """What a model is made with, and what its training has that is not the default.

    Attributes:
        reads: "identities", "content" beside them, or the "order" of histories.
    """

    reads: str
    own: Mapping[str, Any]
    training: Mapping[str, Any] = field(default_factory=dict)


_SEQUENCE = {"width": 64, "layers": 2, "heads": 2, "dropout": 0.5, "max_length": 50, "negatives": 512}

# Weight decays were chosen on validation parts, protocol G: BPR's as the best of 1e-3, 1e-2 and 1e-1 on amazon-baby,
# BM3's as the best of 0, 1e-3 and 1e-2 on amazon-scientific. VBPR has BPR's.
NAMES: Mapping[str, _Peer] = {
    "bpr": _Peer("identities", {"width": 64}, {"weight_decay": 0.1}),
    "lightgcn": _Peer("identities", {"width": 64, "layers": 3}),
    "vbpr": _Peer("content", {"width": 64}, {"weight_decay": 0.1}),
    "bm3": _Peer("content", {"width": 64, "layers": 1, "dropout": 0.3, "content_weight": 2.0}, {"weight_decay": 0.0}),
    "freedom": _Peer(
        "content",
        {
            "width": 64, "layers": 2, "item_layers": 1, "neighbours": 10, "kept": 0.2, "content_weight": 1e-3,
            "shares": None,
        },
        {"weight_decay": 0.0},
    ),
    "sasrec": _Peer("order", {**_SEQUENCE, "gated": False, "loss": "binary"}),
    "esasrec": _Peer("order", {**_SEQUENCE, "gated": True, "loss": "softmax"}),
}  # fmt: skip


def peers_command(
    *, data: Path, protocol: str, models: Sequence[str], seeds: str, choices: Choices, layout: str,
    split_seed: int, hold_out: float | None, json_file: Path | None,
) -> None:  # fmt: skip
    """See ``mmrec peers --help``. `choices` has the options of the content, and the settings of models and training."""
    from ..evaluation import interval

    numbers = seeds_of(seeds, fewest=1)
    read = load_data(data, protocol, layout=layout, split_seed=split_seed, hold_out=hold_out)
    peers = Peers(read, choices, models)
    say(f"{read.catalogue!r}, protocol {read.split.protocol}: {read.split.origin}")
    results = {name: evaluate_floor(name, read, metrics=with_metrics(SHOWN)) for name in floor_names(None)}
    trained: dict[str, list[Result]] = {}
    facts: dict[str, list[dict[str, Any]]] = {}
    for name in peers.names:
        for seed in numbers:
            result, told = peers.result(name, seed)
            trained.setdefault(name, []).append(result)
            facts.setdefault(name, []).append(told)
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


class Peers:
    """Trains and evaluates peers on one split.

    Args:
        data, choices: what they learn from; `choices` has the options of the content, and settings of models and
            training.
        models: which; none: all that the data has enough for.

    Attributes:
        names: which.

    Raises:
        ValueError: a name or setting that there is not, or a model that the data has not enough for.
    """

    def __init__(self, data: Data, choices: Choices, models: Sequence[str]) -> None:
        for name in models:
            if name not in NAMES:
                raise ValueError(f"--model: there are {', '.join(NAMES)}; got {name!r}")
        self.data = data
        self._makers = _Makers(data, choices)
        self.names: list[str] = list(models) or self._makers.possible()
        for name in self.names:
            self._makers.check(name)
        given = _parsed(choices.settings, self.names)
        self._settings = {name: _settings(name, given) for name in self.names}

    def identity(self, name: str, seed: int) -> dict[str, Any]:
        """What decides the result of :meth:`result`, as JSON values."""
        own, training = self._settings[name]
        config = {**own, **dataclasses.asdict(dataclasses.replace(training, seed=seed))}
        content = {"content": self._makers.content()} if NAMES[name].reads == "content" else {}
        return {"model": name, "config": config, "split": self.data.split.id, "data": self.data.fingerprint, **content}

    def result(self, name: str, seed: int) -> tuple[Result, dict[str, Any]]:
        """The test result, and the facts of the training."""
        from ..evaluation import evaluate

        own, training = self._settings[name]
        config = dataclasses.replace(training, seed=seed)
        fitted, seconds = _fit(name, self._makers.maker(name, own), config, self.data)
        found = evaluate(
            fitted, self.data.split, model=name, dataset=self.data.catalogue.name, fingerprint=self.data.fingerprint,
            seed=seed, metrics=with_metrics(SHOWN),
        )  # fmt: skip
        facts = {"seed": seed, "best_epoch": fitted.best_epoch, "seconds": seconds}
        return found, {**facts, **own, **dataclasses.asdict(config)}


def _fit(name: str, make: Callable[[], Any], config: FitConfig, data: Data) -> tuple[Fitted | FittedSequence, float]:
    from ..peers import PairwiseConfig, SequenceConfig, fit_pairwise, fit_sequence

    with status(f"training {name}, seed {config.seed}"):
        fitted: Fitted | FittedSequence
        if isinstance(config, SequenceConfig):
            fitted = fit_sequence(make, data.split, config)
        else:
            assert isinstance(config, PairwiseConfig)
            fitted = fit_pairwise(make, data.split, config)
    seconds = sum(row["seconds"] for row in fitted.curves)
    say(f"{name}, seed {config.seed}: epoch {fitted.best_epoch} of {len(fitted.curves)} was best; {seconds:.0f} s")
    return fitted, round(seconds, 1)


class _Makers:
    """Makes models for one split; graph and content are read once, when the first model asks."""

    def __init__(self, data: Data, choices: Choices) -> None:
        self.data, self.choices = data, choices

    def possible(self) -> list[str]:
        """What this data and protocol have enough for."""
        reads = {"identities"} | ({"content"} if self._modalities else set())
        reads |= {"order"} if self.data.split.protocol != "G" else set()
        return [name for name, peer in NAMES.items() if peer.reads in reads]

    def check(self, name: str) -> None:
        """``ValueError`` where the data has not what the model reads."""
        if NAMES[name].reads == "order" and self.data.split.protocol == "G":
            raise ValueError(f"--model {name}: histories have no order under protocol G; take S or T")
        if NAMES[name].reads == "content" and not self._modalities:
            raise ValueError(f"--model {name}: {self.data.catalogue.name!r} has no text, images or feature files")

    def content(self) -> dict[str, Any]:
        """What is read of the items and how, as JSON values."""
        config = self.choices.config_of_content(self.data.catalogue).to_dict()
        read = ("backbone", "quantize", "text_max_length", "image_size", "image_patch", "mask_title")
        return {"modalities": list(self._modalities), **{name: config[name] for name in read}}

    def maker(self, name: str, own: Mapping[str, Any]) -> Callable[[], Any]:
        """Of the model."""
        from ..peers import BM3, BPR, FREEDOM, VBPR, LightGCN, SASRec

        split = self.data.split
        if NAMES[name].reads == "order":
            return lambda: SASRec(split.popularity > 0, **own)
        if name == "bpr":
            return lambda: BPR(split.num_users, split.num_items, **own)
        if name == "lightgcn":
            return lambda: LightGCN(self._graph, **own)
        features = self._features
        if name == "vbpr":
            import torch

            together = torch.cat(features, 1)
            return lambda: VBPR(split.num_users, split.num_items, together, **own)
        if name == "bm3":
            return lambda: BM3(self._graph, features, **own)
        return lambda: FREEDOM(self._graph, features, **own)

    @cached_property
    def _graph(self) -> Any:
        from ..peers import Graph

        return Graph(self.data.split.train, self.data.split.num_items)

    @cached_property
    def _modalities(self) -> tuple[str, ...]:
        config = self.choices.config_of_content(self.data.catalogue)
        return tuple(name for name in config.content if name != "table")

    @cached_property
    def _features(self) -> list[Tensor]:
        """Each modality's vectors, averaged per item. The table is among the texts."""
        from ..recommender.training.features import prepare_content

        config = self.choices.config_of_content(self.data.catalogue).replace(modalities=self._modalities)
        content = prepare_content(self.data.catalogue, config, ~self.data.split.cold_items, cache=cache_folder())
        return [content.inputs.tokens[name].mean() for name in self._modalities]


def _parsed(settings: Sequence[str], models: Sequence[str]) -> dict[str, Any]:
    """``--set NAME=VALUE`` as values of the type that the defaults have."""
    from ..peers import PairwiseConfig

    known: dict[str, Any] = {
        entry.name: entry.default for entry in dataclasses.fields(PairwiseConfig) if entry.name != "seed"
    }
    known |= {key: value for name in models for key, value in NAMES[name].own.items()}
    return parse_settings(settings, known, ", ".join(models))


def _settings(name: str, settings: Mapping[str, Any]) -> tuple[dict[str, Any], FitConfig]:
    """What the model itself is made with, and how it is trained."""
    from ..peers import PairwiseConfig, SequenceConfig

    peer = NAMES[name]
    own, given = dict(peer.own), dict(peer.training)
    training = {entry.name for entry in dataclasses.fields(PairwiseConfig)} - {"seed"}
    for key, value in settings.items():
        if key in own:
            own[key] = value
        elif key in training:
            given[key] = value
    return own, (SequenceConfig if peer.reads == "order" else PairwiseConfig)(**given)
