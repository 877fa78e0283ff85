"""Judges against stars: a language model, simple ones, and judges whose faults were planted and have to be found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ...evaluation.judge_bias import PlantedJudge
from ...evaluation.judges import ask_judge, pairs_within_users
from ..console import status
from ..data import Data
from .base import Context, Findings, Table

if TYPE_CHECKING:
    import numpy as np

    from ...evaluation.judge_report import JudgeReport
    from ...evaluation.judges import Judgements
    from ...recommender.judging import LLMJudge

__all__ = ["EvaluatorSettings", "evaluator_run"]

_LIKED = 4.0
_AT_ONCE = 32


@dataclass(frozen=True)
class EvaluatorSettings:
    """Who is judged by what.

    Attributes:
        users: drawn among those with enough ratings.
        rows: rated items of each that the judge is asked about; others that the user liked are the history.
        history: titles of a prompt.
        pairs: comparisons per user, each in both orders.
        text_chars: of an item's text behind its title, at most: each item is cut at a place drawn by chance, so that
            how long a text is has nothing to do with how good the item is.
        backbone, quantize: the judge; a causal model.
        max_length: tokens of a prompt.
        noise: of the planted judges, in stars.
    """

    users: int = 60
    rows: int = 8
    history: int = 8
    pairs: int = 3
    text_chars: int = 160
    backbone: str = "smollm2"
    quantize: str = "nf4"
    max_length: int = 512
    noise: float = 1.0


@dataclass(frozen=True, eq=False)
class _Rows:
    """Rows to judge: `users [n]`, `items [n]`, `stars [n]`; per row the liked titles of its user, and what is shown of
    its item; `length` of that in characters, `popularity` among all other ratings."""

    users: np.ndarray
    items: np.ndarray
    stars: np.ndarray
    histories: list[list[str]]
    texts: list[str]
    length: np.ndarray
    popularity: np.ndarray


def evaluator_run(context: Context) -> tuple[Data, Findings]:
    """Reports on the model, on simple judges, and on planted ones; whether each planted fault is found."""
    import numpy as np

    from ...evaluation.judge_report import judge_report

    settings: EvaluatorSettings = context.settings
    data = context.load("S")
    seed = context.seeds[0]
    rows = _rows(data, settings, seed)
    pairs = pairs_within_users(rows.stars, rows.users, most=settings.pairs, seed=seed)
    whole = [1.0, 2.0, 3.0, 4.0, 5.0]
    known: dict[str, Any] = {
        "text_length": rows.length, "popularity": rows.popularity, "item_ids": rows.items, "liked": _LIKED,
        "seed": seed, "levels": whole if set(rows.stars.tolist()) <= set(whole) else None,
    }  # fmt: skip
    judged = _kept(context, rows, pairs, settings)
    assert judged.scores is not None
    stated = 1 / (1 + np.exp(-np.clip(judged.scores, -700, 700)))
    simple = {
        "popularity as judge": rows.popularity,
        "chance": np.random.default_rng(seed).normal(size=len(rows.stars)),
    }
    reports = {settings.backbone: judge_report(judged, rows.stars, rows.users, probability=stated, **known)}
    reports |= {name: judge_report(scores, rows.stars, rows.users, **known) for name, scores in simple.items()}
    planted, found = _planted(rows, pairs, settings, known)
    everyone = (reports | found).items()
    tables = [
        Table("Agreement with stars", ("judge",), [_agreement(n, r) for n, r in everyone], hint=_HINT),
        Table("Biases", ("judge",), [_biases(n, r) for n, r in everyone], signed=True, hint=_BIAS_HINT),
        Table("Planted faults, and what is found of them", ("judge", "fault", "within the interval"), planted),
    ]
    missed = [row for row in planted if row["within the interval"] == "no"]
    sentences = [*_about(settings.backbone, reports[settings.backbone])]
    sentences.append(
        f"{len(planted) - len(missed)} of {len(planted)} planted values lie within the 95 % interval of what is found."
    )
    facts = {"rows": len(rows.stars), "users": len(set(rows.users.tolist())), "pairs": len(pairs),
             "reports": {name: report.to_dict() for name, report in reports.items()}}  # fmt: skip
    return data, Findings("How far can a language model be trusted as a judge?", tables, sentences, facts=facts)


_HINT = (
    "τ-b and Spearman's ρ of score and stars over all rows, τ-b within users, quadratic weighted κ of the level that "
    "the score is calibrated to on other users, calibration error of P(liked) so calibrated, and as the judge says it."
)
_BIAS_HINT = (
    "P(first chosen) − ½; standardised slope of the score on the length of the item's text and on its popularity, at "
    "fixed stars. * the interval excludes 0."
)


def _rows(data: Data, settings: EvaluatorSettings, seed: int) -> _Rows:
    import numpy as np

    from ...adaptation import item_texts

    catalogue, log = data.catalogue, data.catalogue.interactions
    if log.rating is None:
        raise ValueError(f"{catalogue.name!r} has no ratings: judges are set against stars")
    random = np.random.default_rng(seed)
    texts, _ = item_texts(catalogue, template="text", max_chars=None)
    titles = catalogue.item_titles
    behind = random.integers(settings.text_chars + 1, size=catalogue.num_items)
    shown = [
        _cut(text or title, len(title) + more) for text, title, more in zip(texts, titles, behind.tolist(), strict=True)
    ]
    rated = ~np.isnan(log.rating)
    enough = np.flatnonzero(np.bincount(log.user[rated], minlength=catalogue.num_users) >= settings.rows + 4)
    if not len(enough):
        raise ValueError(f"{catalogue.name!r} has no user with {settings.rows + 4} ratings; lower --set rows")
    chosen, histories = [], []
    for user in np.sort(random.choice(enough, min(settings.users, len(enough)), replace=False)).tolist():
        own = np.flatnonzero((log.user == user) & rated)
        asked = np.sort(random.choice(own, settings.rows, replace=False))
        rest = np.setdiff1d(own, asked)
        liked = [titles[log.item[row]] for row in rest if log.rating[row] >= _LIKED][-settings.history :]
        chosen += asked.tolist()
        histories += [liked] * len(asked)
    rows = np.array(chosen)
    counts = np.bincount(log.item, minlength=catalogue.num_items) - np.bincount(
        log.item[rows], minlength=catalogue.num_items
    )
    items = log.item[rows].astype(np.int64)
    return _Rows(
        log.user[rows].astype(np.int64), items, log.rating[rows].astype(np.float64), histories,
        [shown[item] for item in items], np.array([len(shown[item]) for item in items], dtype=np.float64),
        counts[items].astype(np.float64),
    )  # fmt: skip


def _cut(text: str, most: int) -> str:
    return " ".join(text.split())[:most]


def _judge(settings: EvaluatorSettings) -> LLMJudge:
    from ...llm import Backbone
    from ...prompting import HardPrompt
    from ...recommender.judging import LLMJudge

    quantize = None if settings.quantize == "none" else settings.quantize
    backbone = Backbone.load(settings.backbone, quantize=quantize, max_length=settings.max_length)
    template = HardPrompt(
        intro="Someone liked these items:", question="Will this person like the following item? Answer Yes or No.",
        history=settings.history, value_chars=200 + settings.text_chars,
    )  # fmt: skip
    return LLMJudge(backbone, template=template)


def _kept(context: Context, rows: _Rows, pairs: np.ndarray, settings: EvaluatorSettings) -> Judgements:
    """The model's judgements; those that are there already for the same question are read."""
    import numpy as np

    from ...evaluation.judges import Judgements
    from ...files import write_atomic

    path = context.out / "judgements.json"
    asked = {name: value for name, value in asdict(settings).items() if name != "noise"}
    identity = {
        "settings": asked, "users": rows.users.tolist(), "items": rows.items.tolist(), "pairs": pairs.tolist(),
        "texts": rows.texts, "histories": rows.histories,
    }  # fmt: skip
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["identity"] == identity:
            return Judgements(*(np.array(kept[name]) for name in ("scores", "pairs", "forward", "backward")))
    with status(f"asking {settings.backbone} about {len(rows.stars)} items and {len(pairs)} pairs"):
        found = ask_judge(_judge(settings), rows.histories, rows.texts, pairs=pairs)
    arrays = {name: getattr(found, name).tolist() for name in ("scores", "pairs", "forward", "backward")}
    write_atomic(path, json.dumps({"identity": identity, **arrays}).encode())
    return found


def _planted(
    rows: _Rows, pairs: np.ndarray, settings: EvaluatorSettings, known: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, JudgeReport]]:
    """Each planted fault beside the interval of what is found of it."""
    import numpy as np

    from ...evaluation.judge_report import judge_report

    of_rows = list(range(len(rows.stars)))
    shared: dict[str, Any] = {
        "noise": settings.noise, "length": lambda chosen: rows.length[np.array(chosen)],
        "popularity": lambda chosen: rows.popularity[np.array(chosen)],
    }  # fmt: skip

    def stars(_: Sequence[Any], chosen: Sequence[int]) -> np.ndarray:
        return rows.stars[np.array(chosen)]

    judges: dict[str, dict[str, Any]] = {
        "planted: noise only": {},
        "planted: first place": {"position_bias": 0.2},
        "planted: long texts": {"verbosity_bias": 1.0},
        "planted: popular items": {"popularity_bias": 0.5},
    }
    table, reports = [], {}
    for n, (name, faults) in enumerate(judges.items()):
        judge = PlantedJudge(stars, **shared, **faults, seed=n)
        judged = ask_judge(judge, of_rows, of_rows, pairs=pairs, repeats=2)
        report = judge_report(judged, rows.stars, rows.users, **known)
        reports[name] = report
        found = {
            "position_bias": report.position_bias,
            "verbosity_bias": report.verbosity_bias.slope if report.verbosity_bias else None,
            "popularity_bias": report.popularity_bias.slope if report.popularity_bias else None,
        }
        for fault, interval in found.items():
            wanted = float(faults.get(fault, 0.0))
            within = interval is not None and interval.low <= wanted <= interval.high
            values = {"planted": wanted, "found": interval}
            table.append(
                {"judge": name, "fault": fault, "within the interval": "yes" if within else "no", "values": values}
            )
    return table, reports


def _agreement(name: str, report: JudgeReport) -> dict[str, Any]:
    return {
        "judge": name,
        "values": {
            "τ": report.tau, "τ within users": report.tau_within, "ρ": report.spearman, "κ": report.kappa,
            "ECE, calibrated": None if report.ece_calibrated is None else report.ece_calibrated.error,
            "ECE, as stated": None if report.ece is None else report.ece.error,
            "self-consistency": report.self_consistency, "pairs right": report.pairwise_accuracy,
        },
    }  # fmt: skip


def _biases(name: str, report: JudgeReport) -> dict[str, Any]:
    return {
        "judge": name,
        "values": {
            "first place": report.position_bias,
            "length": None if report.verbosity_bias is None else report.verbosity_bias.standardised,
            "popularity": None if report.popularity_bias is None else report.popularity_bias.standardised,
        },
    }


def _about(name: str, report: JudgeReport) -> list[str]:
    assert report.tau_within is not None and report.verbosity_bias is not None and report.popularity_bias is not None
    assert report.position_bias is not None and report.pairwise_accuracy is not None and report.ece is not None
    order = report.tau_within
    if order.excludes_zero:
        agrees = "in the order of their stars" if order.mean > 0 else "against the order of their stars"
    else:
        agrees = "in an order that is not told from chance"
    found = [f"{name} puts a user's items {agrees} (τ within users {order})."]
    found.append(
        f"Of pairs with different stars it names the better one in {report.pairwise_accuracy.mean:.0%} "
        f"[{report.pairwise_accuracy.low:.0%}, {report.pairwise_accuracy.high:.0%}] over both orders."
    )
    biases = {
        "the first place": report.position_bias, "long texts": report.verbosity_bias.standardised,
        "popular items": report.popularity_bias.standardised,
    }  # fmt: skip
    for what, bias in biases.items():
        if bias.excludes_zero:
            found.append(f"It {'favours' if bias.mean > 0 else 'disfavours'} {what} ({bias}).")
        else:
            found.append(f"No bias for or against {what} is shown ({bias}).")
    stated, chance = report.ece.error, report.ece.by_chance
    found.append(f"Its stated probabilities miss by {stated.mean:.2f} on average (ECE; {chance:.2f} would be chance).")
    return found
