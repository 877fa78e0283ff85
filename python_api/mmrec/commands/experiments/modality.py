"""Which modality a model listens to, and how it bears missing ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..data import Data
from ..results import variants
from ..runs import TrainedRun, cache_folder
from ..settings import label
from .base import Chart, Context, Findings, Table, means, sentence
from .trained import METRICS, TrainingSettings, train_all

if TYPE_CHECKING:
    import numpy as np

    from ...evaluation.floors import Neighbours
    from ...recommender.sources import SourceScorer

__all__ = ["ModalitySettings", "MissingSettings", "missing_run", "modality_run"]

_METRIC = "NDCG@10"
_KINDS = ("random", "popularity", "whole")


@dataclass(frozen=True)
class ModalitySettings(TrainingSettings):
    """`permutations` of each modality's contents across items."""

    permutations: int = 2


@dataclass(frozen=True)
class MissingSettings(TrainingSettings):
    """What is taken away, and what a model is trained with.

    Attributes:
        rates: shares of the content that are taken away.
        dropout: values of `modality_dropout`, each a model of its own: shares of content that training hides.
    """

    rates: tuple[float, ...] = (0.0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9)
    dropout: tuple[float, ...] = (0.0, 0.3)


def modality_run(context: Context) -> tuple[Data, Findings]:
    """Drops, permutes and isolates each modality of the whole model, beside models of one modality."""
    import numpy as np

    from ...evaluation import bootstrap, paired_bootstrap

    settings: ModalitySettings = context.settings
    data = context.load("S")
    configs = {label(config): config for config in variants(settings.config(data.catalogue))}
    runs = train_all(context, data, configs)
    whole = next(iter(runs))
    modalities = configs[whole].modalities
    if len(modalities) < 2:
        raise ValueError(f"--set modalities: two at least are needed, got {modalities}")
    parts = [_probed(_scorer(run, data), settings.permutations, seed) for run, seed in _seeded(runs[whole], context)]
    full = np.stack([part["full"] for part in parts])
    rows: list[dict[str, Any]] = []
    for name in modalities:
        without, alone, permuted = (
            np.stack([part[kind][name] for part in parts]) for kind in ("without", "alone", "permuted")
        )
        values: dict[str, Any] = {
            "drop": paired_bootstrap(full, without), "only": bootstrap(alone),
            "noise": paired_bootstrap(full, permuted),
        }  # fmt: skip
        one = label(configs[whole].replace(modalities=(name,)))
        if one in runs:
            own = np.stack([run.result.rows["all"].values[_METRIC] for run in runs[one]])
            values |= {"trained alone": bootstrap(own), "only less trained alone": paired_bootstrap(alone, own)}
        rows.append({"modality": name, "values": values})
    total = sum(max(row["values"]["drop"].mean, 0.0) for row in rows)
    for row in rows:
        index = max(row["values"]["drop"].mean, 0.0) / total if total else float("nan")
        row["values"] = {"dominance index": index, **row["values"]}
    results = {name: [run.result for run in found] for name, found in runs.items()}
    mass = _mass(runs[whole])
    tables = [
        Table("Models", ("model",), [{"model": n, "values": v} for n, v in means(results, METRICS).items()]),
        Table(f"Dependence of {whole} on each modality, {_METRIC}", ("modality",), rows, hint=_HINT),
        Table("Attention mass", ("items",), [{"items": name, "values": shares} for name, shares in mass.items()]),
    ]
    return data, Findings(
        "Which modality does the model listen to?", tables, _about(rows, whole, results),
        sections={"modalities": mass},
    )  # fmt: skip


_HINT = (
    "drop: lost without the modality; only: with it alone; noise: lost when its contents are permuted across items; "
    "dominance index: its part of all drops; trained alone: a model of this modality, and what the whole model given "
    "this modality alone lacks to it."
)


def missing_run(context: Context) -> tuple[Data, Findings]:
    """Takes content away at every rate, fills it in in several ways, and trains with gaps."""
    import numpy as np

    from ...evaluation.floors import cosine_neighbours
    from ...evaluation.modality import area

    settings: MissingSettings = context.settings
    if len(settings.rates) < 2 or any(b <= a for a, b in zip(settings.rates, settings.rates[1:], strict=False)):
        raise ValueError(f"--set rates must be two at least and increase, got {settings.rates}")
    data = context.load("S")
    base = settings.config(data.catalogue)
    if not base.content:
        raise ValueError(f"--set modalities: there must be content to take away, got {base.modalities}")
    configs = {f"modality_dropout {rate:g}": base.replace(modality_dropout=rate) for rate in settings.dropout}
    runs = train_all(context, data, configs)
    nearest = cosine_neighbours(data.split.train, data.split.num_items)
    curves: dict[tuple[str, str, str], list[np.ndarray]] = {}
    for name, found in runs.items():
        for run, seed in _seeded(found, context):
            score = _scorer(run, data)
            for kind in _KINDS:
                for fill in _FILLS if kind == "random" else ("nothing",):
                    values = [_at(score, nearest, base.content, kind, rate, fill, seed) for rate in settings.rates]
                    curves.setdefault((name, kind, fill), []).append(np.stack(values))
    areas = {key: np.stack([area(settings.rates, values) for values in entry]) for key, entry in curves.items()}
    levels = {key: np.mean([values.mean(1) for values in entry], axis=0).tolist() for key, entry in curves.items()}
    rows = [_curve_row(key, areas[key], levels[key], settings.rates) for key in curves]
    charts = [
        Chart(
            f"{kind}: {_METRIC}", "share taken away",
            {
                f"{name}, {fill}": list(zip(settings.rates, values, strict=True))
                for (name, of, fill), values in levels.items()
                if of == kind and (fill == "nothing" or name == next(iter(configs)))
            },
        )
        for kind in _KINDS
    ]  # fmt: skip
    results = {name: [run.result for run in found] for name, found in runs.items()}
    plain = means(results, METRICS)
    tables = [
        Table("Models, nothing taken away", ("model",), [{"model": name, "values": v} for name, v in plain.items()]),
        Table(f"Curves, {_METRIC}", ("model", "taken away", "filled by"), rows, hint=_CURVE_HINT),
    ]  # fmt: skip
    question = "How does the model bear missing content, and does filling it in help?"
    return data, Findings(question, tables, _about_curves(areas), charts)


_FILLS = {
    "nothing": "leaving them", "mean": "Filling gaps by the mean", "neighbour": "Filling gaps by a neighbour",
    "left out": "Leaving their items out",
}  # fmt: skip
_CURVE_HINT = (
    "Means over users and seeds; area: mean level over the rates. Taken away of random items, of rare items first, or "
    "whole modalities; identities stay. Filled by nothing (the model's own way), the mean content, that of the item "
    "most often chosen with it, or the item left out of the ranking once it has lost anything."
)


def _scorer(run: TrainedRun, data: Data) -> SourceScorer:
    from ...recommender.sources import SourceScorer
    from ...recommender.training import prepare_content

    content = prepare_content(data.catalogue, run.config, run.trained_items, cache=cache_folder())
    return SourceScorer(run.model, content.inputs, data.split, metric=_METRIC)


def _probed(score: SourceScorer, permutations: int, seed: int) -> dict[str, Any]:
    """Per user: the model as it is, without each modality, with it alone, and with its contents permuted."""
    import numpy as np

    from ...evaluation.modality import permuted, sources_of

    own = sources_of(score.present)
    nothing = {name: np.full_like(rows, -1) for name, rows in own.items()}
    found: dict[str, Any] = {"full": score.per_user(own), "without": {}, "alone": {}, "permuted": {}}
    for name in own:
        found["without"][name] = score.per_user(own | {name: nothing[name]})
        found["alone"][name] = score.per_user(nothing | {name: own[name]})
        moved = permuted(own[name], name, permutations, seed=seed)
        found["permuted"][name] = np.mean([score.per_user(own | {name: rows}) for rows in moved], axis=0)
    return found


def _at(
    score: SourceScorer, nearest: Neighbours, content: Sequence[str], kind: Any, rate: float, fill: str, seed: int
) -> np.ndarray:
    """The metric per user with this share of the content taken away and filled in."""
    import numpy as np

    from ...evaluation.modality import missing, sources_of
    from ...recommender.sources import MEAN

    own = sources_of(score.present)
    left = missing(score.present, rate, kind, popularity=score.split.popularity, modalities=list(content), seed=seed)
    if fill == "left out":
        lost = np.any([(left[name] < 0) & (own[name] >= 0) for name in content], axis=0)
        return score.per_user(left, candidates=np.flatnonzero(~lost))
    if fill == "mean":
        left |= {name: np.where((left[name] < 0) & (own[name] >= 0), MEAN, left[name]) for name in content}
    elif fill == "neighbour":
        left |= {name: _from_neighbours(left[name], own[name], nearest) for name in content}
    return score.per_user(left)


def _from_neighbours(left: np.ndarray, own: np.ndarray, nearest: Neighbours) -> np.ndarray:
    """What was taken away comes from the item of the highest cosine of users that still has it; ties to the lower."""
    import numpy as np

    filled = left.copy()
    for item in np.flatnonzero((left < 0) & (own >= 0)).tolist():
        rows = slice(nearest.lists.offsets[item], nearest.lists.offsets[item + 1])
        others, weights = nearest.lists.ids[rows], nearest.weights[rows]
        weights = np.where(left[others] >= 0, weights, 0.0)
        if len(weights) and weights.max() > 0:
            filled[item] = others[int(weights.argmax())]
    return filled


def _seeded(runs: Sequence[TrainedRun], context: Context) -> list[tuple[TrainedRun, int]]:
    return list(zip(runs, context.seeds, strict=True))


def _mass(runs: Sequence[TrainedRun]) -> dict[str, dict[str, float]]:
    """Mean over the seeds."""
    told = [run.attention() for run in runs]
    return {
        group: {name: sum(one[group][name] for one in told) / len(told) for name in shares}
        for group, shares in told[0].items()
    }


def _curve_row(
    key: tuple[str, str, str], areas: np.ndarray, level: Sequence[float], rates: Sequence[float]
) -> dict[str, Any]:
    from ...evaluation import bootstrap

    shown = {f"{rate:.2g}": value for rate, value in zip(rates, level, strict=True)}
    return {
        "model": key[0], "taken away": key[1], "filled by": key[2], "values": {"area": bootstrap(areas), **shown},
    }  # fmt: skip


def _about(rows: Sequence[Mapping[str, Any]], whole: str, results: Mapping[str, Any]) -> list[str]:
    from ...evaluation import compare

    ordered = sorted(rows, key=lambda row: -row["values"]["drop"].mean)
    found = [
        f"{whole} depends most on {ordered[0]['modality']}: dropping it costs {ordered[0]['values']['drop']} {_METRIC}."
    ]
    idle = [row["modality"] for row in rows if not row["values"]["drop"].excludes_zero]
    if idle:
        found.append(f"Dropping {', '.join(idle)} is not told from dropping nothing.")
    behind = [row for row in rows if row["values"].get("only less trained alone") is not None]
    for row in behind:
        gap = row["values"]["only less trained alone"]
        if gap.excludes_zero and gap.mean < 0:
            found.append(
                f"{row['modality']} is under-used: alone in the whole model it lacks {gap} to one trained on it."
            )
    for name in results:
        if name != whole:
            found.append(sentence(whole, name, _METRIC, compare(list(results[whole]), list(results[name]), _METRIC)))
    return found


def _about_curves(areas: Mapping[tuple[str, str, str], np.ndarray]) -> list[str]:
    from ...evaluation import paired_bootstrap

    found = []
    models = list(dict.fromkeys(model for model, _, _ in areas))
    for kind in _KINDS:
        for model in models[1:]:
            more = paired_bootstrap(areas[model, kind, "nothing"], areas[models[0], kind, "nothing"])
            found.append(f"{kind}: {sentence(model, models[0], 'area', more)}")
    for model in models:
        for fill, words in _FILLS.items():
            if fill != "nothing":
                more = paired_bootstrap(areas[model, "random", fill], areas[model, "random", "nothing"])
                found.append(f"{model}: {sentence(words, _FILLS['nothing'], 'area', more)}")
    return found
