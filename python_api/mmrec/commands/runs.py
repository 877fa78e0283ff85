"""The folder of a run: training into it, and reading it back.

``config.json`` (config, seed, data, fingerprint) is there from the start, ``checkpoint.*`` while training goes on,
``run.*`` (weights and item vectors) once it is finished; ``metrics.json`` with its columns holds the test result,
``curves.json`` the training curves, ``report.html`` the page for people.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..files import cache_root
from .console import Interrupted, say, status
from .data import Data, load_data
from .settings import label

if TYPE_CHECKING:
    import torch

    from ..adaptation import Catalogue
    from ..evaluation import Ragged, Result, Seen, Split, Stage
    from ..recommender.config import RecommenderConfig
    from ..recommender.encoder import ItemEncoder
    from ..recommender.model import Answers, ItemVectors, Recommender
    from ..recommender.parallel import Alone
    from ..recommender.training import Content, Trained

__all__ = ["Source", "TrainedRun", "cache_folder", "describe_run", "fit", "open_run"]

_IDS = ("items.ids.values", "items.ids.offsets")
RUN, CONFIG, METRICS, CURVES, REPORT = "run", "config.json", "metrics.json", "curves.json", "report.html"


@dataclass(frozen=True)
class Source:
    """Where a run's data comes from, so that later commands find it again."""

    data: Path
    layout: str
    protocol: str
    split_seed: int
    hold_out: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "data": str(self.data)}


def cache_folder() -> Path:
    """Where embeddings are kept between runs."""
    return cache_root() / "embeddings"


class TrainedRun:
    """A finished run. Weights are read, and their hash checked, when the run is opened."""

    def __init__(self, folder: Path, facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        from ..recommender.config import RecommenderConfig

        self.folder = folder
        self.facts = facts
        self.tensors = tensors
        self.config: RecommenderConfig = RecommenderConfig.from_dict(facts["config"])
        self.label = label(self.config)
        self.modalities: tuple[str, ...] = self.config.modalities
        self.seed = int(self.config.seed)
        self.protocol: str = facts["source"]["protocol"]
        self.fingerprint: str = facts["fingerprint"]

    @property
    def model_id(self) -> str:
        """Names the weights, and the item vectors that belong to them: the beginning of their SHA-256."""
        return str(self.facts["sha256"])[:16]

    @property
    def data(self) -> Path:
        """The folder that it was trained on."""
        return Path(self.facts["source"]["data"])

    @cached_property
    def model(self) -> Recommender:
        """The model of the best epoch, in eval mode."""
        from ..recommender.inputs import ItemSpec
        from ..recommender.model import Recommender

        model = Recommender(self.config, ItemSpec.from_dict(self.facts["spec"]), self.tensors["model.trained"])
        prefix = "model."
        model.load_state_dict({k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)})
        return model.eval()

    @property
    def items(self) -> ItemVectors:
        """The stored vectors of all items."""
        from ..recommender.model import ItemVectors

        return ItemVectors(self.tensors["items.vectors"], self.tensors["items.mass"])

    @property
    def trained_items(self) -> np.ndarray:
        """bool ``[I]``: items that training interacted with."""
        return self.tensors["model.trained"].numpy()

    def item_encoder(self) -> ItemEncoder:
        """What reads other items as training read its own; ``ValueError`` for a run of an earlier version, which does
        not say how that was."""
        from ..recommender.encoder import ItemEncoder
        from ..recommender.store.columns import Ragged
        from ..recommender.training import Recipe

        if "recipe" not in self.facts or not set(_IDS) <= set(self.tensors):
            raise ValueError(f"{self.folder} does not say how its items were read: train it anew to add others")
        adapter = {k.removeprefix("adapter."): v for k, v in self.tensors.items() if k.startswith("adapter.")}
        ids = Ragged(*(self.tensors[name] for name in _IDS)).strings()
        return ItemEncoder(self.model, Recipe.from_dict(self.facts["recipe"]), ids, adapter=adapter)

    @cached_property
    def result(self) -> Result:
        """The test result that was stored when training ended."""
        from ..evaluation import Result

        return Result.load(self.folder / METRICS)

    def curves(self) -> dict[str, Any]:
        """Training curves for the report: ``{chart: {series: [(epoch, value)]}}``."""
        try:
            rows = json.loads((self.folder / CURVES).read_text(encoding="utf-8"))["epochs"]
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{self.folder / CURVES} cannot be read ({error})") from error
        charts = {
            "training loss": ("loss",),
            "auxiliary losses": ("alignment", "disentangle", "router"),
            "validation NDCG@10": ("valid",),
        }
        drawn = {
            chart: {name: [(row["epoch"], row[name]) for row in rows if name in row] for name in names}
            for chart, names in charts.items()
        }
        return {chart: series for chart, series in drawn.items() if any(series.values())}

    def attention(self) -> dict[str, dict[str, float]]:
        """Mean attention mass of each modality: over all items, those known from training, and the others."""
        mass, known = self.tensors["items.mass"].numpy(), self.trained_items
        groups = {"all items": np.ones_like(known), "seen in training": known, "never seen": ~known}
        return {
            name: dict(zip(self.modalities, mass[rows].mean(0).tolist(), strict=True))
            for name, rows in groups.items()
            if rows.any()
        }

    def expert_shares(self) -> dict[str, list[float]]:
        """Share of each content modality's tokens that every expert had in the last epoch; empty without experts."""
        load = self.facts["load"] or []
        return {
            name: [count / max(sum(counts), 1) for count in counts]
            for name, counts in zip(self.config.content, load, strict=False)
        }

    def check_data(self, catalogue: Catalogue, fingerprint: str) -> None:
        """``ValueError`` unless this is the catalogue that the run was trained on, bit for bit."""
        if fingerprint != self.fingerprint:
            raise ValueError(
                f"{self.folder} was trained on {self.facts['dataset']} ({self.fingerprint[:12]}), and {catalogue.name} "
                f"({fingerprint[:12]}) is other data"
            )

    def load_data(self, folder: Path | None, layout: str) -> Data:
        """The run's data and split, from where it was or from ``folder``."""
        source = self.facts["source"]
        layout = source["layout"] if folder is None else layout
        settings = {"split_seed": source["split_seed"], "hold_out": source["hold_out"]}
        data = load_data(folder or self.data, self.protocol, layout=layout, **settings)
        self.check_data(data.catalogue, data.fingerprint)
        return data

    def evaluate(
        self, data: Data, *, stage: Stage, mask: Seen | None, metrics: Sequence[str], groups: bool = True
    ) -> Result:
        """The result of the run on its own split; ``ValueError`` for other data or another split."""
        from ..evaluation import evaluate

        self.check_data(data.catalogue, data.fingerprint)
        if data.split.id != self.facts["split"]:
            raise ValueError(f"{self.folder} was trained on split {self.facts['split']}, this is {data.split.id}")
        with status(f"ranking all items by {self.label}"):
            return evaluate(
                self._rank, data.split, model=self.label, dataset=data.catalogue.name, fingerprint=data.fingerprint,
                stage=stage, mask=mask, metrics=metrics, seed=self.seed, groups=groups,
            )  # fmt: skip

    def recommend(self, rows: np.ndarray, k: int) -> Answers:
        """The ``k`` best items after the history ``rows``; ``ValueError`` if the model knows nothing about it."""
        from ..evaluation import Ragged

        known = self.trained_items[rows] | (self.tensors["items.mass"][rows].sum(1) > 0).numpy()
        if not known.any():
            raise ValueError(
                f"history: none of its {len(rows)} item(s) was in training, and {self.label} knows nothing else of them"
            )
        return self.model.recommend(Ragged.from_lists([rows.tolist()]), k, self.items)

    def _rank(
        self, split: Split, stage: Stage, k: int, *, mask: Seen | None = None, candidates: np.ndarray | None = None
    ) -> np.ndarray:
        from ..evaluation import rank

        histories: Ragged = split.history(stage).rows(split.users(stage))
        query = self.model.user_vectors(histories, self.items)
        return rank(query, self.items.vectors, split, stage, k, mask=mask, candidates=candidates)


def open_run(folder: str | Path) -> TrainedRun:
    """The finished run in ``folder``; ``ValueError`` if there is none, or a file of it is damaged."""
    from ..recommender.training.storage import exists, load_tensors

    folder = Path(folder)
    if not exists(folder, RUN):
        raise ValueError(_no_run(folder))
    tensors, facts = load_tensors(folder, RUN)
    try:
        return TrainedRun(folder, facts, tensors)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'run.json'} is corrupt ({type(error).__name__}: {error})") from error


def describe_run(folder: Path) -> dict[str, Any]:
    """What ``mmrec info --run`` shows of a finished run."""
    run = open_run(folder)
    facts = run.facts
    return {
        "folder": str(folder),
        "model": run.label,
        "dataset": facts["dataset"],
        "fingerprint": run.fingerprint,
        "data": facts["source"]["data"],
        "protocol": run.protocol,
        "split": facts["split"],
        "seed": run.seed,
        "best_epoch": facts["best_epoch"],
        "epochs": facts["epochs"],
        "seconds": facts["seconds"],
        "parameters": sum(value.numel() for name, value in run.tensors.items() if name.startswith("model.")),
        "metrics": {name: run.result.metrics[name] for name in ("HR@10", "NDCG@10", "Recall@20")},
        "config": run.config.to_dict(),
    }


def fit(
    data: Data,
    config: RecommenderConfig,
    folder: Path,
    source: Source,
    *,
    resume: bool = False,
    metrics: Sequence[str],
    ranks: Alone | None = None,
) -> TrainedRun:
    """Trains into ``folder`` and evaluates on the test items.

    Args:
        resume: go on from a checkpoint; a finished run of the same data, split and config is returned as it is.
        ranks: who trains together; the first one writes, and all must read what it wrote. None: this process alone.

    Raises:
        ValueError: the folder holds a run (without ``resume``) or a run of something else (with it).
    """
    from ..recommender.parallel import ALONE
    from ..recommender.training import prepare_content, train
    from ..recommender.training.storage import save_json

    ranks = ALONE if ranks is None else ranks
    identity = {"config": config.to_dict(), "fingerprint": data.fingerprint, "split": data.split.id}
    run = _existing(folder, identity, resume)
    ranks.check_same("no finished run" if run is None else f"run {run.model_id}", folder)
    if run is None:
        facts = {**identity, "dataset": data.catalogue.name, "source": source.to_dict()}
        if ranks.rank == 0:
            save_json(folder / CONFIG, {**facts, "seed": config.seed})
        read = partial(prepare_content, data.catalogue, config, ~data.split.cold_items, cache=cache_folder())
        try:
            content = ranks.in_turn(read)
            trained = train(content, data.split, config, folder, identity, resume=resume, ranks=ranks)
        except KeyboardInterrupt as stop:
            kept = f"{folder}: nothing trained yet; embeddings computed so far are kept in {cache_folder()}"
            raise Interrupted(str(stop) or kept) from None
        ranks.by_first(partial(_write, folder, facts, data, content, trained))
        run = open_run(folder)
    ranks.by_first(partial(_evaluate, run, data, metrics))
    return run


def _write(folder: Path, facts: dict[str, Any], data: Data, content: Content, trained: Trained) -> None:
    """A finished run in place of its checkpoint."""
    from ..recommender.store.columns import ragged_strings
    from ..recommender.training.storage import remove, save_json, save_tensors

    facts = {
        **facts,
        "spec": trained.model.spec.to_dict(),
        "best_epoch": trained.best_epoch,
        "epochs": len(trained.curves),
        "seconds": round(sum(row["seconds"] for row in trained.curves), 1),
        "load": trained.load,
        "recipe": content.recipe.to_dict(),
    }
    tensors = {f"model.{name}": value for name, value in trained.model.state_dict().items()}
    tensors |= {"items.vectors": trained.items.vectors, "items.mass": trained.items.mass}
    tensors |= {f"adapter.{name}": value for name, value in trained.adapter.items()}
    tensors |= dict(zip(_IDS, ragged_strings(data.catalogue.item_ids), strict=True))
    save_json(folder / CURVES, {"epochs": trained.curves})
    save_tensors(folder, RUN, tensors, facts)
    remove(folder, "checkpoint")


def _existing(folder: Path, identity: dict[str, Any], resume: bool) -> TrainedRun | None:
    from ..recommender.training.storage import exists

    if exists(folder, RUN):
        run = open_run(folder)
        if not resume:
            raise ValueError(f"{folder} holds a finished run; choose another folder for --out")
        # A field that came later has its default in a run of before.
        facts = {**run.facts, "config": run.config.to_dict()}
        different = sorted(name for name, value in identity.items() if facts.get(name) != value)
        if different:
            raise ValueError(
                f"{folder} holds a finished run with another {', '.join(different)}; choose another folder"
            )
        say(f"{folder}: finished already, used as it is")
        return run
    if exists(folder, "checkpoint") and not resume:
        raise ValueError(
            f"{folder} holds an interrupted run: --resume goes on with it; or choose another folder for --out"
        )
    return None


def _evaluate(run: TrainedRun, data: Data, metrics: Sequence[str]) -> None:
    """Stores the test result, where it is not stored yet or lacks a metric."""
    if (run.folder / METRICS).is_file() and set(metrics) <= set(run.result.metrics):
        return
    run.result = run.evaluate(data, stage="test", mask=None, metrics=metrics)
    run.result.save(run.folder / METRICS)


def _no_run(folder: Path) -> str:
    from ..recommender.training.storage import exists

    if not folder.exists():
        return f"{folder}: no such run; models are most-popular, item-knn or the folder of a trained run"
    if exists(folder, "checkpoint"):
        return f"{folder} holds an interrupted run; finish it with mmrec train --resume"
    return f"{folder}: no run there (no run.json)"
