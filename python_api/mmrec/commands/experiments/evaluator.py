"""Judges against stars: a language model, simple ones, and judges whose faults were planted and have to be found."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ...evaluation.judge_bias import PlantedJudge
from ...evaluation.judges import ask_judge, pairs_within_users
from ..console import status
from ..data import Data
from ..kept import read_kept
from .base import Context, Findings, Table
from .prompting import check_settings

if TYPE_CHECKING:
    import numpy as np

    from ...evaluation import Interval
    from ...evaluation.judge_report import JudgeReport
    from ...evaluation.judges import Judgements
    from ...recommender.judging import LLMJudge

__all__ = ["EvaluatorSettings", "evaluator_run"]

_LIKED = 4.0
# Two users for an interval, two rows for a pair; with fewer tokens prompts and texts would lose their ends.
_LEAST = {"users": 2, "rows": 2, "history": 1, "pairs": 1, "text_chars": 0, "max_length": 128}
_UNCHECKED = "–"


@dataclass(frozen=True)
class EvaluatorSettings:
    """Who is judged by what.

    Attributes:
        users: drawn among those with enough ratings.
        rows: rated items of each that the judge is asked about; others that the user liked are the history. Of an item
            that a user rated more than once the last rating counts, so no item is in both.
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
    check_settings(settings, _LEAST)
    if not 0 < settings.noise < math.inf:
        raise ValueError(f"--set noise must be above 0 and finite, got {settings.noise}")
    data = context.load("S")
    seed = context.seeds[0]
    rows = _rows(data, settings, seed)
    pairs = pairs_within_users(rows.stars, rows.users, most=settings.pairs, seed=seed)
    _check_stars(data.catalogue.name, rows, pairs, settings)
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
    sentences = [*_about(settings.backbone, reports[settings.backbone]), _recovered(planted)]
    facts = {"rows": len(rows.stars), "users": len(set(rows.users.tolist())), "pairs": len(pairs),
             "reports": {name: report.to_dict() for name, report in reports.items()}}  # fmt: skip
    question, users = "How far can a language model be trusted as a judge?", facts["users"]
    return data, Findings(
        question, tables, sentences, facts=facts, protocol="ratings", split="ratings",
        split_rule=f"{settings.rows} rated items of each of {users} users, drawn", seeds=context.seeds[:1],
    )  # fmt: skip


_HINT = (
    "τ-b and Spearman's ρ of score and stars over all rows, τ-b within users, quadratic weighted κ of the level that "
    "the score is calibrated to on other users, calibration error of P(liked) so calibrated, and as the judge says it."
)
_BIAS_HINT = (
    "P(first chosen) − ½; standardised slope of the score on the length of the item's text and on its popularity, at "
    "fixed stars. * the interval excludes 0."
)


def _check_stars(name: str, rows: _Rows, pairs: np.ndarray, settings: EvaluatorSettings) -> None:
    """Refuses stars that a judge cannot be set against, before it is asked."""
    drawn = f"the {settings.rows} ratings drawn of each of {len(set(rows.users.tolist()))} users of {name!r}"
    if not len(pairs):
        raise ValueError(
            f"{drawn} differ within no user, so there is no order to judge: raise --set rows or --set users, or take "
            "data with ratings that differ"
        )
    if rows.stars.max() < _LIKED:
        raise ValueError(
            f"{drawn} reach {rows.stars.max():g} stars, and an item is liked from {_LIKED:g} on: raise --set rows or "
            "--set users, or take ratings of 1 to 5 stars"
        )


def _rows(data: Data, settings: EvaluatorSettings, seed: int) -> _Rows:
    """Drawn rows; of each user's ratings of an item the last one only, so that what is asked about is asked once and is
    not in the history."""
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
    rated = np.flatnonzero(~np.isnan(log.rating))[::-1]
    pair = log.user[rated].astype(np.int64) * catalogue.num_items + log.item[rated]
    last = np.sort(rated[np.unique(pair, return_index=True)[1]])
    enough = np.flatnonzero(np.bincount(log.user[last], minlength=catalogue.num_users) >= settings.rows + 4)
    if len(enough) < 2:
        raise ValueError(
            f"two users with {settings.rows + 4} rated items are needed, {settings.rows} to ask about and others for "
            f"the history; {catalogue.name!r} has {len(enough)}: lower --set rows"
        )
    chosen, histories = [], []
    for user in np.sort(random.choice(enough, min(settings.users, len(enough)), replace=False)).tolist():
        own = last[log.user[last] == user]
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
    kept = read_kept(path)
    if isinstance(kept, dict) and kept.get("identity") == identity:
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
            within = _UNCHECKED
            if interval is not None and _is_known(interval):
                within = "yes" if interval.low <= wanted <= interval.high else "no"
            values = {"planted": wanted, "found": _figure(interval)}
            table.append({"judge": name, "fault": fault, "within the interval": within, "values": values})
    return table, reports


def _recovered(planted: Sequence[dict[str, Any]]) -> str:
    checked = [row["within the interval"] for row in planted if row["within the interval"] != _UNCHECKED]
    if not checked:
        return "These rows give nothing to say about the planted values."
    found = f"{checked.count('yes')} of {len(checked)} planted values lie within the 95 % interval of what is found"
    missing = len(planted) - len(checked)
    return f"{found}; {missing} more cannot be found on these rows." if missing else f"{found}."


def _is_known(interval: Interval) -> bool:
    """Whether it has ends; there are none where a figure is not defined, and none of a single user."""
    return interval.low == interval.low and interval.high == interval.high


def _figure(interval: Interval | None) -> Interval | float | None:
    """What stands in a table: without ends the mean alone, and nothing where that is NaN."""
    return interval if interval is None or _is_known(interval) else interval.mean


def _agreement(name: str, report: JudgeReport) -> dict[str, Any]:
    figures = {
        "τ": report.tau, "τ within users": report.tau_within, "ρ": report.spearman, "κ": report.kappa,
        "ECE, calibrated": None if report.ece_calibrated is None else report.ece_calibrated.error,
        "ECE, as stated": None if report.ece is None else report.ece.error,
        "self-consistency": report.self_consistency, "pairs right": report.pairwise_accuracy,
    }  # fmt: skip
    return {"judge": name, "values": {column: _figure(figure) for column, figure in figures.items()}}


def _biases(name: str, report: JudgeReport) -> dict[str, Any]:
    figures = {
        "first place": report.position_bias,
        "length": None if report.verbosity_bias is None else report.verbosity_bias.standardised,
        "popularity": None if report.popularity_bias is None else report.popularity_bias.standardised,
    }
    return {"judge": name, "values": {column: _figure(figure) for column, figure in figures.items()}}


def _about(name: str, report: JudgeReport) -> list[str]:
    assert report.tau_within is not None and report.verbosity_bias is not None and report.popularity_bias is not None
    assert report.position_bias is not None and report.pairwise_accuracy is not None and report.ece is not None
    order, right, stated = report.tau_within, report.pairwise_accuracy, report.ece
    agrees = "in an order that is not told from chance"
    if order.excludes_zero:
        agrees = f"{'in' if order.mean > 0 else 'against'} the order of their stars"
    better = f"{right.mean:.0%} [{right.low:.0%}, {right.high:.0%}]"
    better = f"Of pairs with different stars it names the better one in {better} over both orders."
    found = [
        _said(order, f"{name} puts a user's items {agrees} (τ within users {order}).", "the order of a user's items"),
        _said(right, better, "which of two items it names"),
    ]
    biases = {
        "the first place": report.position_bias, "long texts": report.verbosity_bias.standardised,
        "popular items": report.popularity_bias.standardised,
    }  # fmt: skip
    for what, bias in biases.items():
        shown = f"No bias for or against {what} is shown ({bias})."
        if bias.excludes_zero:
            shown = f"It {'favours' if bias.mean > 0 else 'disfavours'} {what} ({bias})."
        found.append(_said(bias, shown, f"a bias for or against {what}"))
    missed = f"miss by {stated.error.mean:.2f} on average (ECE; {stated.by_chance:.2f} would be chance)"
    return [*found, _said(stated.error, f"Its stated probabilities {missed}.", "its stated probabilities")]


def _said(figure: Interval, words: str, what: str) -> str:
    return words if _is_known(figure) else f"These rows give nothing to say about {what}."
