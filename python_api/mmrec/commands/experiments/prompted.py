"""Prompts and adapters of one language model that reads histories and titles: three questions about them.

All rank every item for a sample of the test users by `PromptedRecommender`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from ..data import Data
from .base import Chart, Context, Findings, Table, means, pairs, sentence
from .cells import METRICS, Cells, CellSettings, facts_of, mean_of, means_table, per_user_values, row

if TYPE_CHECKING:
    from ...evaluation import Result
    from ...recommender.prompted import PromptedConfig

__all__ = ["factorial_run", "gap_run", "soft_prompt_lora_run"]

_SURE = 0.05
_PLAIN, _HARD = "frozen, plain", "frozen, hard prompt"


@dataclass(frozen=True)
class SoftPromptLoraSettings(CellSettings):
    """`rank` and `last_layers` of the adapter, `soft_tokens` trained vectors."""

    rank: int = 8
    last_layers: int = 2
    soft_tokens: int = 8


@dataclass(frozen=True)
class GapSettings(CellSettings):
    """`examples`: how many training interactions there are; the steps stay the same, and see all of them. `rank` of
    adapters of all linear layers, `soft_tokens` trained vectors."""

    rank: int = 8
    soft_tokens: int = 8
    examples: tuple[int, ...] = (64, 512, 2048)


@dataclass(frozen=True)
class FactorialSettings(CellSettings):
    """Levels of each factor, "last" being that of `last_layers`; fewer steps than the others have, for there are many
    cells."""

    steps: int = 24
    prompts: tuple[str, ...] = ("soft", "hybrid")
    ranks: tuple[int, ...] = (2, 8)
    placements: tuple[str, ...] = ("attention", "last")
    orders: tuple[str, ...] = ("joint", "prompt-first", "adapter-first")
    last_layers: int = 2
    soft_tokens: int = 8


def soft_prompt_lora_run(context: Context) -> tuple[Data, Findings]:
    """Soft prompts, LoRA on the last layers, both, neither; and whether both together bring what each brings."""
    from ...evaluation import paired_bootstrap

    settings: SoftPromptLoraSettings = context.settings
    cells = Cells(context)
    soft = {"prompt": "soft", "soft_tokens": settings.soft_tokens}
    lora = {"rank": settings.rank, "placement": "last", "last_layers": settings.last_layers}
    configs = {
        "frozen": settings.config(prompt="plain", rank=0),
        "soft prompt": settings.config(rank=0, **soft),
        "LoRA, last layers": settings.config(prompt="plain", **lora),
        "both": settings.config(**soft, **lora),
    }
    results = {name: cells.results(name, config) for name, config in configs.items()}
    to_frozen = pairs(results, "frozen", METRICS)
    to_lora = pairs({n: results[n] for n in ("LoRA, last layers", "both")}, "LoRA, last layers", METRICS)["both"]
    columns = {name: per_user_values(found) for name, found in results.items()}
    together = paired_bootstrap(
        columns["both"] - columns["LoRA, last layers"], columns["soft prompt"] - columns["frozen"]
    )
    tables = [
        means_table(results, cells.floors()),
        Table("Minus frozen", ("model",), [row(name, values) for name, values in to_frozen.items()], signed=True),
        Table("Minus LoRA alone", ("model",), [row("both", to_lora)], signed=True),
        Table(
            "Interaction: what the soft prompt adds beside LoRA, less what it adds alone", ("effect",),
            [{"effect": "soft prompt × LoRA", "values": {"NDCG@10": together}}], signed=True,
        ),
    ]  # fmt: skip
    sentences = [sentence(name, "frozen", "NDCG@10", values["NDCG@10"]) for name, values in to_frozen.items()]
    kind = "do more than add up" if together.mean > 0 else "do less than add up"
    kind = kind if together.excludes_zero else "cannot be told from adding up"
    sentences.append(f"Soft prompt and LoRA {kind}: interaction {together} in NDCG@10.")
    return cells.data, Findings(
        "Do soft prompts and LoRA on the last layers add up?", tables, sentences, facts=facts_of(cells, configs),
    )  # fmt: skip


def gap_run(context: Context) -> tuple[Data, Findings]:
    """Hard against soft prompts against LoRA, by how many examples there are."""
    settings: GapSettings = context.settings
    cells = Cells(context)
    _check_examples(settings, cells)
    soft = {"soft_tokens": settings.soft_tokens}
    ways = {
        "soft prompt": settings.config(prompt="soft", rank=0, **soft),
        "LoRA": settings.config(prompt="plain", rank=settings.rank),
        "LoRA, hard prompt": settings.config(prompt="hard", rank=settings.rank),
        "hybrid": settings.config(prompt="hybrid", rank=settings.rank, **soft),
    }
    still = {name: settings.config(prompt=prompt, rank=0) for name, prompt in {_PLAIN: "plain", _HARD: "hard"}.items()}
    frozen = {name: cells.results(name, config) for name, config in still.items()}
    trained: dict[tuple[str, int], list[Result]] = {
        (name, most): cells.results(f"{name} {most}", config, most=most)
        for most, (name, config) in product(settings.examples, ways.items())
    }
    base = frozen[_PLAIN]
    rows = [{"way": name, "examples": "0", "values": values} for name, values in means(frozen, METRICS).items()]
    gaps, sentences = [], []
    for (name, most), found in trained.items():
        both = {name: found, _PLAIN: base}
        rows.append({"way": name, "examples": str(most), "values": means({name: found}, METRICS)[name]})
        gaps.append({"way": name, "examples": str(most), "values": pairs(both, _PLAIN, METRICS)[name]})
    hard = pairs(frozen, _PLAIN, METRICS)[_HARD]
    sentences.append(sentence("The hard prompt, frozen,", "plain titles", "NDCG@10", hard["NDCG@10"]))
    for most in settings.examples:
        both = {name: trained[name, most] for name in ways}
        sentences.append(
            sentence(f"With {most} examples LoRA", "the soft prompt", "NDCG@10",
                     pairs(both, "soft prompt", METRICS)["LoRA"]["NDCG@10"])
        )  # fmt: skip
    lines = {name: {most: trained[name, most] for most in settings.examples} for name in ways}
    lines |= {name: dict.fromkeys(settings.examples, found) for name, found in frozen.items()}
    charts = [
        Chart(
            metric,
            "training interactions",
            {n: [(float(most), mean_of(found, metric)) for most, found in line.items()] for n, line in lines.items()},
        )
        for metric in METRICS
    ]
    tables = [
        means_table({}, cells.floors(), title="Floors"),
        Table("Every way", ("way", "examples"), rows),
        Table("Minus plain titles, frozen", ("way", "examples"), gaps, signed=True),
    ]
    question = "How far apart are hard prompts, soft prompts and LoRA, and how many examples does each need?"
    facts = facts_of(cells, still | ways)
    return cells.data, Findings(question, tables, sentences, charts, facts)


def _check_examples(settings: GapSettings, cells: Cells) -> None:
    seen, there = settings.steps * settings.batch_size, cells.available(settings.history)
    wrong = [most for most in settings.examples if not 1 <= most <= min(seen, there)]
    if wrong:
        raise ValueError(
            f"--set examples must be from 1 to {min(seen, there)}, for {settings.steps} steps of {settings.batch_size} "
            f"see {seen} and there are {there}; got {wrong[0]}"
        )


def factorial_run(context: Context) -> tuple[Data, Findings]:
    """Prompt × rank × placement × order of tuning: effect sizes, and whether prompt and adapter interfere."""
    import numpy as np

    from ...evaluation import factorial, level_means

    settings: FactorialSettings = context.settings
    cells = Cells(context)
    factors = {
        "prompt": settings.prompts, "rank": tuple(map(str, settings.ranks)), "placement": settings.placements,
        "order": settings.orders,
    }  # fmt: skip
    configs = _factorial_configs(settings, factors)
    results = {levels: cells.results(" ".join(levels), config) for levels, config in configs.items()}
    shape = [len(levels) for levels in factors.values()]
    values = {
        metric: np.stack([per_user_values(found, metric) for found in results.values()]).reshape(
            *shape, len(context.seeds), -1
        )
        for metric in METRICS
    }
    varying = {name: levels for name, levels in factors.items() if len(levels) > 1}
    squeezed = {metric: np.squeeze(table, tuple(n for n, size in enumerate(shape) if size == 1))
                for metric, table in values.items()}  # fmt: skip
    effects = {metric: factorial(table, varying) for metric, table in squeezed.items()}
    still = {name: settings.config(prompt=prompt, rank=0) for name, prompt in {_PLAIN: "plain", _HARD: "hard"}.items()}
    reference = {name: cells.results(name, config) for name, config in still.items()}
    rows = [
        {"effect": _effect_name(effect.factors, len(varying)),
         "values": {"share": _share(effect), "by chance": effect.by_chance, "freedom": effect.freedom,
                    "p": effect.p}}
        for effect in effects["NDCG@10"]
    ]  # fmt: skip
    levels_rows = [
        {"factor": name, "level": level, "values": {m: level_means(squeezed[m], varying)[name][level] for m in METRICS}}
        for name, levels in varying.items()
        for level in levels
    ]
    cell_rows = [
        {**dict(zip(factors, levels, strict=True)), "values": means({"": found}, METRICS)[""]}
        for levels, found in results.items()
    ]
    tables = [
        Table(
            "Effects on NDCG@10", ("effect",), rows,
            hint=(
                "Share of the variation between runs (η²) with its interval over users, its mean by chance, degrees of "
                "freedom, and p of the F-test against seeds, corrected for all effects (Holm)."
            ),
        ),
        Table("Levels", ("factor", "level"), levels_rows, hint="Means over all cells with that level."),
        Table("Cells", tuple(factors), cell_rows),
        means_table(reference, cells.floors(), title="References"),
    ]  # fmt: skip
    sentences = _about_effects(effects["NDCG@10"], len(varying))
    orders = level_means(squeezed["NDCG@10"], varying).get("order", {})
    if orders:
        best = max(orders, key=lambda level: orders[level].mean)
        sentences.append(f"Of the orders of tuning, {best} has the highest mean: {orders[best].mean:.4f}.")
    question = "Which of prompt, rank, placement and order of tuning matter, and do prompt and adapter interfere?"
    facts = facts_of(cells, still | {" ".join(levels): config for levels, config in configs.items()})
    return cells.data, Findings(question, tables, sentences, facts=facts)


def _factorial_configs(
    settings: FactorialSettings, factors: Mapping[str, Sequence[str]]
) -> dict[tuple[str, ...], PromptedConfig]:
    """Of every cell, before any is trained."""
    repeated = [name for name, levels in factors.items() if len(set(levels)) < len(levels)]
    if repeated or all(len(levels) < 2 for levels in factors.values()):
        raise ValueError(
            f"--set prompts, ranks, placements, orders: levels must be distinct, and two at least of one factor; got "
            f"{', '.join(f'{name} {list(levels)}' for name, levels in factors.items())}"
        )
    found = {}
    for levels in product(*factors.values()):
        prompt, rank, placement, order = levels
        try:
            found[levels] = settings.config(
                prompt=prompt, rank=int(rank), placement=placement, order=order,
                last_layers=settings.last_layers, soft_tokens=settings.soft_tokens,
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(f"cell {' '.join(levels)}: {error}") from None
    return found


def _about_effects(effects: Sequence[Any], count: int) -> list[str]:
    left = next((e for e in effects if not e.factors), None)
    if left is None:
        return ["One seed per cell does not tell what the factors do from what seeds do."]
    clear = [e for e in effects if e.factors and e.p < _SURE]
    shown = [f"{_effect_name(e.factors, count)} ({e.share:.0%} of the variation, p {_small(e.p)})" for e in clear]
    found = [f"More than seeds explain: {', '.join(shown)}." if clear else "No effect is more than seeds explain."]
    found.append(f"{left.share:.0%} of the variation lies between seeds of one cell.")
    between = [_effect_name(e.factors, count) for e in clear if len(e.factors) == 2 and "prompt" in e.factors]
    if between:
        found.append(f"Prompt and adapter interfere: {', '.join(between)}.")
    else:
        found.append("No interaction of the prompt with rank, placement or order is more than seeds explain.")
    return found


def _small(p: float) -> str:
    return "< .001" if p < 0.001 else f"{p:.3f}".lstrip("0")


def _effect_name(factors: tuple[str, ...], count: int) -> str:
    if not factors:
        return "between seeds"
    return "three and more together" if len(factors) == count > 2 else " × ".join(factors)


def _share(effect: Any) -> Any:
    from ...evaluation import Interval

    return Interval(effect.share, effect.low, effect.high, 0.95, 0, 0, 0)
