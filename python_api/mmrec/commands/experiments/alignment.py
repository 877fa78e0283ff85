"""Aligning modalities: cold items with and without it, in every way, and what shared parts then hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..data import Data
from ..evaluate import with_metrics
from ..rankers import evaluate_floor, floor_names
from ..runs import TrainedRun, cache_folder
from ..settings import only
from .base import Context, Findings, Table, means, pairs, sentence
from .trained import METRICS, TrainingSettings, train_all

if TYPE_CHECKING:
    from ...evaluation import Leakage, Result
    from ...recommender.config import RecommenderConfig

__all__ = ["AlignmentSettings", "alignment_run"]

_GROUPS = {
    "all": "All items",
    "warm": "Targets that training saw",
    "cold-among-all": "Targets that training never saw, ranked among all items",
    "cold-among-cold": "The same targets, ranked among items that training never saw",
}
_OWN = ("align", "align_weight", "disentangle")
_NONE, _IDENTITY = "none", "identity-only"


@dataclass(frozen=True)
class AlignmentSettings(TrainingSettings):
    """What is compared.

    Attributes:
        kinds: ways of aligning, "none", or one with a way of disentangling: "infonce+contrast".
        hold_out: share of items that training never sees.
        align_weight: of the alignment's loss.
    """

    kinds: tuple[str, ...] = (
        "none", "infonce", "adapters", "projection", "bootstrap", "vae", "infonce+contrast",
    )  # fmt: skip
    hold_out: float = 0.1
    align_weight: float = 0.1


def alignment_run(context: Context) -> tuple[Data, Findings]:
    """Trains every kind with every seed, an identity-only model beside, and probes what the parts hold."""
    settings: AlignmentSettings = context.settings
    if _NONE not in settings.kinds or len(set(settings.kinds)) != len(settings.kinds):
        raise ValueError(f"--set kinds must be distinct and hold {_NONE!r}, got {', '.join(settings.kinds)}")
    own = [entry for entry in settings.train if entry.partition("=")[0] in _OWN]
    if own:
        raise ValueError(f"--set train cannot hold {', '.join(own)}: --set kinds and align_weight say how to align")
    data = context.load("S", hold_out=settings.hold_out)
    configs = {kind: _config(kind, settings, data) for kind in settings.kinds}
    plain = {_IDENTITY: only(configs[_NONE], ("identity",))}
    runs = train_all(context, data, configs | plain, hold_out=settings.hold_out)
    results = {kind: [run.result for run in found] for kind, found in runs.items()}
    floors = {name: [evaluate_floor(name, data, metrics=with_metrics(METRICS))] for name in floor_names(None)}
    leaks = {kind: [_leakage(run, data) for run in runs[kind]] for kind in configs}
    tables = [*_group_tables(results, floors), *_difference_tables(results), _leak_table(leaks)]
    never_seen = int((~runs[_NONE][0].trained_items).sum())
    return data, Findings(
        "What does aligning modalities do for cold items, and what does it cost warm ones?", tables,
        _sentences(results, leaks), facts={"items that training never saw": never_seen},
    )  # fmt: skip


def _config(kind: str, settings: AlignmentSettings, data: Data) -> RecommenderConfig:
    from ...fusion import ALIGNMENTS, DISENTANGLERS

    align, _, apart = kind.partition("+")
    if align not in (_NONE, *ALIGNMENTS) or (apart and apart not in DISENTANGLERS):
        raise ValueError(
            f"--set kinds: {kind!r} is not {_NONE} or one of {', '.join(ALIGNMENTS)}, "
            f"alone or with +{', +'.join(DISENTANGLERS)}"
        )
    config = settings.config(data.catalogue)
    if len(config.modalities) < 2:
        raise ValueError(f"--set modalities: two at least are needed to align, got {config.modalities}")
    weight = 0.0 if align == _NONE else settings.align_weight
    return config.replace(align="infonce" if align == _NONE else align, align_weight=weight, disentangle=apart or None)


def _leakage(run: TrainedRun, data: Data) -> Leakage:
    """Of the parts that are aligned, over all items; the mean tokens themselves where nothing takes them apart."""
    import torch

    from ...evaluation import leakage
    from ...recommender.training import prepare_content

    content = prepare_content(data.catalogue, run.config, run.trained_items, cache=cache_folder())
    with torch.no_grad():
        output = run.model.encode(content.inputs, torch.arange(data.catalogue.num_items))
    private = {} if output.parts is None else output.parts.private
    shared, own, present = (
        {name: part.numpy() for name, part in parts.items()} for parts in (output.pooled, private, output.present)
    )
    return leakage(shared, own, present)


def _group_tables(results: Mapping[str, Sequence[Result]], floors: Mapping[str, Sequence[Result]]) -> list[Table]:
    tables = []
    for group, title in _GROUPS.items():
        trained, plain = means(results, METRICS, row=group), means(floors, METRICS, row=group)
        rows: list[dict[str, Any]] = [{"model": name, "values": values} for name, values in trained.items()]
        rows += [{"model": name, "values": values, "floor": True} for name, values in plain.items()]
        if rows:
            tables.append(Table(title, ("model",), rows))
    return tables


def _difference_tables(results: Mapping[str, Sequence[Result]]) -> list[Table]:
    tables = []
    for group, title in _GROUPS.items():
        if all(group in result.rows for found in results.values() for result in found):
            rows = [{"model": name, "values": v} for name, v in pairs(results, _NONE, METRICS, row=group).items()]
            tables.append(Table(f"Minus no alignment: {title[0].lower()}{title[1:]}", ("model",), rows, signed=True))
    return tables


def _known_mean(values: Sequence[float]) -> float:
    """Of those that are not NaN; NaN of none."""
    known = [value for value in values if value == value]
    return sum(known) / len(known) if known else float("nan")


def _agreement(leaks: Sequence[Leakage]) -> float:
    return _known_mean([value for leak in leaks for value in leak.agreement.values()])


def _leak_table(leaks: Mapping[str, Sequence[Leakage]]) -> Table:
    rows = []
    for kind, found in leaks.items():
        values: dict[str, float] = {
            "modality told from it": _known_mean([leak.modality for leak in found]),
            "agreement": _agreement(found),
            "private from shared": _known_mean([value for leak in found for value in leak.within.values()]),
            "private from private": _known_mean([value for leak in found for value in leak.across.values()]),
        }
        rows.append({"model": kind, "values": values})
    hint = (
        "Linear probes, held out: how well the modality is told from what is aligned (0 chance, 1 always), R² of one "
        "modality's part from another's, and R² of private parts, where there are any; means over seeds, and over the "
        "modalities and pairs that a probe can be fitted to."
    )
    return Table("What the aligned vectors hold", ("model",), rows, hint=hint)


def _sentences(results: Mapping[str, Sequence[Result]], leaks: Mapping[str, Sequence[Leakage]]) -> list[str]:
    found: list[str] = []
    for group, words in {"cold-among-all": "cold items among all", "warm": "warm items"}.items():
        if any(group not in result.rows for entry in results.values() for result in entry):
            continue
        compared = pairs(results, _NONE, METRICS, row=group)
        found += [
            f"On {words}: {sentence(name, 'no alignment', 'NDCG@10', values['NDCG@10'])}"
            for name, values in compared.items()
            if name != _IDENTITY
        ]
        if group == "cold-among-all":
            level: Any = means(results, METRICS, row=group)
            found.append(
                f"On {words} HR@10 is {level[_IDENTITY]['HR@10'].mean:.4f} for identities alone and "
                f"{level[_NONE]['HR@10'].mean:.4f} with content and no alignment."
            )
    told = {kind: _agreement(entry) for kind, entry in leaks.items()}
    told = {kind: value for kind, value in told.items() if value == value}
    if told:
        best = max(told, key=lambda kind: told[kind])
        found.append(f"One modality's part says most of another's with {best} (R² {told[best]:.2f}).")
    return found
