"""`judge_report`: how far a judge can be trusted against the stars that users gave."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .intervals import Interval
from .judge_agreement import (
    Reliability,
    cross_fitted,
    expected_calibration_error,
    kendall_tau,
    level_codes,
    level_scale,
    spearman,
    weighted_kappa,
)
from .judge_bias import Pull, position_bias, pulls, self_consistency
from .judge_intervals import cluster_bootstrap, mean_over_users
from .judges import Judge, Judgements, PairwiseJudge, ask_judge
from .ragged import Ragged

__all__ = ["CalibrationError", "JudgeReport", "judge_report"]

_CHANCE_DRAWS = 200


@dataclass(frozen=True)
class CalibrationError:
    """The expected calibration error of a probability that an item is liked.

    Args:
        error: with the reverse percentile interval: resampling adds to an error that cannot be negative what sampling
            added already, and the percentile interval would count it twice.
        by_chance: what the error of probabilities that are right stays below, with these rows, in the interval's
            level of the cases (drawn; Bröcker and Smith, 2007). An error below it is no sign of miscalibration.
        bins: what the error consists of.
    """

    error: Interval
    by_chance: float
    bins: Reliability


@dataclass(frozen=True)
class JudgeReport:
    """What :func:`judge_report` found. None: not asked for; NaN: not defined on these rows.

    ``tau``, ``spearman``, ``kappa``, the errors and ``self_consistency`` are of all rows together, with users drawn for
    the interval; ``tau_within``, ``abstained`` and what comes from pairs are means over users.

    Args:
        rows, users: how many the judge was asked about.
        abstained: share of rows without an answer; they are left out of everything else.
        tau, spearman: order of scores against order of stars.
        tau_within: Kendall's τ-b among each user's own rows, mean over the users for whom it is defined: what counts
            for a ranking, where it does not matter who is a harsh critic.
        kappa: quadratic weighted κ of the stars and the level that the score is calibrated to.
        ece: calibration error of the probability that the judge itself states.
        ece_calibrated: the same of P(stars ≥ liked | score), fitted on other users.
        self_consistency: see :func:`.self_consistency`.
        verbosity_bias, popularity_bias: see :class:`Pull`, for the length of the item's text and its popularity.
        pairs: how many the judge was asked about, in both orders.
        pairs_abstained: share of pairs without an answer in one order or both.
        position_bias, inconsistency: see :func:`.position_bias`.
        pairwise_accuracy: share of verdicts, over both orders, for the item with more stars; a tie counts ½.
    """

    rows: int
    users: int
    abstained: Interval | None = None
    tau: Interval | None = None
    tau_within: Interval | None = None
    spearman: Interval | None = None
    kappa: Interval | None = None
    ece: CalibrationError | None = None
    ece_calibrated: CalibrationError | None = None
    self_consistency: Interval | None = None
    verbosity_bias: Pull | None = None
    popularity_bias: Pull | None = None
    pairs: int = 0
    pairs_abstained: Interval | None = None
    position_bias: Interval | None = None
    inconsistency: Interval | None = None
    pairwise_accuracy: Interval | None = None

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; NaN becomes None."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}


def judge_report(
    judge: Judge | PairwiseJudge | Judgements | np.ndarray,
    stars: np.ndarray,
    users: np.ndarray,
    *,
    histories: Sequence[Any] | None = None,
    items: Sequence[Any] | None = None,
    pairs: np.ndarray | None = None,
    repeats: int = 1,
    probability: np.ndarray | None = None,
    text_length: np.ndarray | None = None,
    popularity: np.ndarray | None = None,
    item_ids: np.ndarray | None = None,
    levels: Sequence[float] | None = None,
    liked: float = 4.0,
    folds: int = 5,
    bins: int = 10,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> JudgeReport:
    """Sets a judge against stars; what it needs and is not given stays None in the report.

    Args:
        judge: :class:`.Judgements` or float ``[n]`` scores; or the judge itself, with ``histories``, ``items``,
            ``pairs`` and ``repeats`` as in :func:`.ask_judge`.
        stars: float ``[n]``.
        users: ``[n]``, any labels. Intervals speak about other users of the same items.
        probability: float ``[n]`` in [0, 1], what the judge itself states for P(stars ≥ liked), such as the sigmoid of
            a logit of "Yes"; NaN: nothing stated.
        text_length, popularity: float ``[n]``, at least 0, of the row's item: characters, training interactions.
        item_ids: ``[n]``, any labels. A judge errs alike about an item whoever is asked for, so the intervals of
            ``verbosity_bias`` and ``popularity_bias`` are far too narrow over users: with this, items are drawn.
        levels: the scale of the stars, ascending; None for those that occur.
        liked: this many stars or more count as liked.
        folds: of the users, for the calibration (:func:`.cross_fitted`).
        bins: of the calibration errors.
        resamples, level, seed: of the intervals, as in :func:`.bootstrap`; the seed also deals users into folds.

    Raises:
        TypeError: see :func:`.ask_judge`.
        ValueError: an argument of another shape or range than it must have, which the message names.
    """
    if isinstance(judge, (Judge, PairwiseJudge)):
        if histories is None or items is None:
            raise ValueError("histories and items must be given for a judge that is yet to be asked")
        judged = ask_judge(judge, histories, items, pairs=pairs, repeats=repeats)
    elif any(part is not None for part in (histories, items, pairs)) or repeats != 1:
        raise ValueError("histories, items, pairs and repeats are for a judge that is yet to be asked")
    else:
        judged = judge if isinstance(judge, Judgements) else Judgements(judge)
    stars, labels = np.asarray(stars, dtype=np.float64), np.asarray(users)
    if stars.ndim != 1 or not len(stars) or not np.isfinite(stars).all():
        raise ValueError(f"stars must be [n], finite and not empty, got shape {stars.shape}")
    if labels.shape != stars.shape:
        raise ValueError(f"users must be {stars.shape} like stars, got shape {labels.shape}")
    names, code = np.unique(labels, return_inverse=True)
    options = {"resamples": resamples, "level": level, "seed": seed}
    found: dict[str, Any] = {}
    if judged.scores is not None:
        if len(judged.scores) != len(stars):
            raise ValueError(f"scores must have a row for each of {len(stars)} stars, got {len(judged.scores)}")
        rows = _Rows(judged.scores, stars, code)
        found |= _agreement(rows, probability, levels, liked, folds, bins, options)
        properties = {"text_length": text_length, "popularity": popularity}
        found |= _pulls(rows, properties, item_ids, options)
    if judged.pairs is not None:
        found |= _pairwise(judged, stars, code, options)
    return JudgeReport(len(stars), len(names), **found)


@dataclass(frozen=True, eq=False)
class _Rows:
    """The rows that were asked about; ``answered`` are those that count."""

    scores: np.ndarray
    stars: np.ndarray
    users: np.ndarray

    @property
    def single(self) -> np.ndarray:
        return self.scores if self.scores.ndim == 1 else self.scores[:, 0]

    @property
    def answered(self) -> np.ndarray:
        return ~np.isnan(self.single)

    def column(self, name: str, values: np.ndarray, *, most: float = math.inf, missing: bool = False) -> np.ndarray:
        """What the caller knows about each row, checked, and of the answered rows."""
        column = np.asarray(values, dtype=np.float64)
        if column.shape != self.stars.shape:
            raise ValueError(f"{name} must be {self.stars.shape} like stars, got shape {column.shape}")
        wrong = ~((column >= 0) & (column <= most) & np.isfinite(column)) & ~(missing & np.isnan(column))
        if wrong.any():
            raise ValueError(f"{name} must be finite and lie in [0, {most}], got {column[np.argmax(wrong)]}")
        return column[self.answered]


def _agreement(
    rows: _Rows,
    probability: np.ndarray | None,
    levels: Sequence[float] | None,
    liked: float,
    folds: int,
    bins: int,
    options: dict[str, Any],
) -> dict[str, Any]:
    scale = level_scale(np.unique(rows.stars) if levels is None else levels)
    level_codes("stars", rows.stars, scale)
    if liked > scale[-1]:
        raise ValueError(f"liked must be stars that can be given, at most {scale[-1]}, got {liked}")
    abstained = mean_over_users((~rows.answered).astype(np.float64), rows.users, **options)
    scores, stars, users = (column[rows.answered] for column in (rows.single, rows.stars, rows.users))
    outcome = (stars >= liked).astype(np.float64)
    fitted, calibrated = cross_fitted(scores, stars, users, scale, liked, folds, options["seed"])
    statistics = {
        "tau": _of(kendall_tau, scores, stars),
        "spearman": _of(spearman, scores, stars),
        "kappa": _of(lambda a, b: weighted_kappa(a, b, scale), fitted, stars),
    }
    stated = {"ece_calibrated": calibrated}
    if probability is not None:
        stated["ece"] = rows.column("probability", probability, most=1.0, missing=True)
    for name, p in stated.items():
        statistics[name] = _of(lambda p, y: expected_calibration_error(p, y, bins).error, p, outcome)
    if rows.scores.ndim == 2 and rows.scores.shape[1] > 1:
        statistics["self_consistency"] = _of(self_consistency, rows.scores[rows.answered])
    intervals = cluster_bootstrap(lambda drawn: [of(drawn) for of in statistics.values()], users, **options)
    found: dict[str, Any] = {"abstained": abstained} | dict(zip(statistics, intervals, strict=True))
    for name, p in stated.items():
        found[name] = _calibration_error(found[name], p, outcome, bins, options["seed"])
    of_user = Ragged.from_pairs(users, np.arange(len(users)), int(rows.users.max()) + 1).to_lists()
    each = np.array([kendall_tau(scores[own], stars[own]) if own else np.nan for own in of_user])
    return found | {"tau_within": mean_over_users(each, np.arange(len(each)), **options)}


def _pulls(
    rows: _Rows, properties: dict[str, np.ndarray | None], item_ids: np.ndarray | None, options: dict[str, Any]
) -> dict[str, Pull]:
    clusters = rows.users
    if item_ids is not None:
        if np.shape(item_ids) != rows.stars.shape:
            raise ValueError(f"item_ids must be {rows.stars.shape} like stars, got shape {np.shape(item_ids)}")
        clusters = np.unique(np.asarray(item_ids), return_inverse=True)[1]
    there = rows.answered
    given = {name: rows.column(name, values) for name, values in properties.items() if values is not None}
    if not given:
        return {}
    found = pulls(rows.single[there], rows.stars[there], given, clusters[there], **options)
    fields = {"text_length": "verbosity_bias", "popularity": "popularity_bias"}
    return {fields[name]: pull for name, pull in found.items()}


def _pairwise(judged: Judgements, stars: np.ndarray, users: np.ndarray, options: dict[str, Any]) -> dict[str, Any]:
    assert judged.pairs is not None and judged.forward is not None and judged.backward is not None
    if judged.pairs.size and judged.pairs.max() >= len(stars):
        raise ValueError(f"pairs must lie in [0, {len(stars)}), got {judged.pairs.max()}")
    a, b = judged.pairs.T
    if (users[a] != users[b]).any():
        place = int(np.argmax(users[a] != users[b]))
        raise ValueError(f"pairs must be rows of one user, got rows {judged.pairs[place].tolist()} of two")
    shift, inconsistent = position_bias(judged.forward, judged.backward, users[a], **options)
    won = np.sign(judged.forward - 0.5) - np.sign(judged.backward - 0.5)  # of a, over both orders: −2 to 2
    better = np.sign(stars[a] - stars[b])
    right = np.where(better == 0, np.nan, (1 + better * won / 2) / 2)
    silent = np.isnan(judged.forward + judged.backward).astype(np.float64)
    return {
        "pairs": len(judged.pairs),
        "pairs_abstained": mean_over_users(silent, users[a], **options),
        "position_bias": shift,
        "inconsistency": inconsistent,
        "pairwise_accuracy": mean_over_users(right, users[a], **options),
    }


def _of(statistic: Callable[..., float], *columns: np.ndarray) -> Callable[[np.ndarray], float]:
    """The statistic of those of the drawn rows in which no column is NaN."""
    there = ~np.any([np.isnan(column).any(axis=tuple(range(1, column.ndim))) for column in columns], axis=0)

    def of(drawn: np.ndarray) -> float:
        kept = drawn[there[drawn]]
        return statistic(*(column[kept] for column in columns))

    return of


def _calibration_error(
    interval: Interval, probability: np.ndarray, outcome: np.ndarray, bins: int, seed: int
) -> CalibrationError:
    there = ~np.isnan(probability)
    p = probability[there]
    rng = np.random.default_rng(seed)
    chance = [expected_calibration_error(p, rng.random(len(p)) < p, bins).error for _ in range(_CHANCE_DRAWS)]
    reverse = replace(
        interval, low=max(2 * interval.mean - interval.high, 0.0), high=max(2 * interval.mean - interval.low, 0.0)
    )
    bars = expected_calibration_error(p, outcome[there], bins)
    return CalibrationError(reverse, float(np.quantile(chance, interval.level)), bars)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, np.ndarray):
        return [_plain(part) for part in value.tolist()]
    return None if isinstance(value, float) and not math.isfinite(value) else value
