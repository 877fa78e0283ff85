"""Judges: whatever says how much a user would like an item, and what a judge said about the rows it was asked about.

A judge gives a score to a user's history and an item (a language model's expected rating, its logit of "Yes"), or says
which of two items it prefers. :func:`.judge_report` measures how far it can be trusted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from .ragged import Ragged

__all__ = ["Judge", "Judgements", "PairwiseJudge", "ask_judge", "pairs_within_users"]


@runtime_checkable
class Judge(Protocol):
    """Scores items one by one. Histories and items are whatever the judge reads: ids, titles, lists of titles."""

    def score(self, histories: Sequence[Any], items: Sequence[Any]) -> np.ndarray:
        """float ``[n]``: for each history and item a number, the higher the better, on any scale; NaN: no answer."""
        ...


@runtime_checkable
class PairwiseJudge(Protocol):
    """Compares two items for a history."""

    def prefer(self, histories: Sequence[Any], first: Sequence[Any], second: Sequence[Any]) -> np.ndarray:
        """float ``[n]``: probability, or verdict 0 or 1, that the first is chosen; ½: neither; NaN: no answer."""
        ...


@dataclass(frozen=True, eq=False)
class Judgements:
    """What a judge said about ``n`` rows, each a history and an item, and about ``p`` pairs of them.

    Args:
        scores: float64 ``[n]``, or ``[n, R]`` for R answers to the same question, of which the first is judged and all
            are compared with each other; None for a judge of pairs only. NaN: no answer.
        pairs: int64 ``[p, 2]``: rows whose items stood against each other.
        forward, backward: float64 ``[p]`` in [0, 1]: whether the item that stood first was chosen, with ``pairs[:, 0]``
            first and with ``pairs[:, 1]`` first; NaN: no answer.
    """

    scores: np.ndarray | None = None
    pairs: np.ndarray | None = None
    forward: np.ndarray | None = None
    backward: np.ndarray | None = None

    def __post_init__(self) -> None:
        given = [part is not None for part in (self.pairs, self.forward, self.backward)]
        if any(given) and not all(given) or not any(given) and self.scores is None:
            raise ValueError("judgements need scores, or pairs with forward and backward, or both")
        if self.scores is not None:
            scores = np.asarray(self.scores, dtype=np.float64)
            if scores.ndim not in (1, 2) or scores.ndim == 2 and scores.shape[1] < 1:
                raise ValueError(f"scores must be [n] or [n, R] with R >= 1, got shape {scores.shape}")
            if np.isinf(scores).any():
                raise ValueError(f"scores must be finite, or NaN for no answer, got {np.isinf(scores).sum()} infinite")
            object.__setattr__(self, "scores", scores)
        if self.pairs is not None:
            object.__setattr__(self, "pairs", _checked_pairs(self.pairs))
            for name in ("forward", "backward"):
                value = np.asarray(getattr(self, name), dtype=np.float64)
                if value.shape != (len(self.pairs),) or (value < 0).any() or (value > 1).any():
                    raise ValueError(f"{name} must lie in [0, 1] and be {(len(self.pairs),)}, got shape {value.shape}")
                object.__setattr__(self, name, value)


def ask_judge(
    judge: Judge | PairwiseJudge,
    histories: Sequence[Any],
    items: Sequence[Any],
    *,
    pairs: np.ndarray | None = None,
    repeats: int = 1,
) -> Judgements:
    """Asks about every row, ``repeats`` times, and about every pair in both orders.

    Args:
        judge: with ``score``, ``prefer`` or both; without ``score`` it is asked about pairs only.
        histories, items: ``n`` each, of one row each.
        pairs: int ``[p, 2]``, rows of one user, such as :func:`pairs_within_users` draws; None to ask about none. A
            pair is asked with the history of its first row: leave out of it whatever the judge must not know.
        repeats: how often each row's score is asked for; at least 2 tell how far the judge repeats itself.

    Raises:
        TypeError: the judge cannot do what is asked.
        ValueError: histories and items do not pair, or an answer has another shape than the question.
    """
    if len(histories) != len(items):
        raise ValueError(f"histories and items must have one length, got {len(histories)} and {len(items)}")
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    if not isinstance(judge, Judge) and (not isinstance(judge, PairwiseJudge) or pairs is None):
        raise TypeError(f"judge must have a method score, or prefer and pairs to compare, got {type(judge).__name__}")
    if pairs is not None and not isinstance(judge, PairwiseJudge):
        raise TypeError(f"judge must have a method prefer to be asked about pairs, got {type(judge).__name__}")
    scores = None
    if isinstance(judge, Judge):
        answers = [_answer("score", judge.score(histories, items), len(items)) for _ in range(repeats)]
        scores = answers[0] if repeats == 1 else np.stack(answers, axis=1)
    if pairs is None or not isinstance(judge, PairwiseJudge):
        return Judgements(scores)
    chosen = _checked_pairs(pairs, len(items))
    known = [histories[row] for row in chosen[:, 0]]
    a, b = ([items[row] for row in column] for column in chosen.T)
    forward, backward = (_answer("prefer", judge.prefer(known, *order), len(known)) for order in ((a, b), (b, a)))
    return Judgements(scores, chosen, forward, backward)


def pairs_within_users(stars: np.ndarray, users: np.ndarray, *, most: int = 10, seed: int = 0) -> np.ndarray:
    """int64 ``[p, 2]``: pairs of one user's rows with different stars, in a random order, up to ``most`` per user.

    Args:
        stars: float ``[n]``.
        users: ``[n]``, any labels.
        most: drawn without replacement from all such pairs of the user.
    """
    stars, users = np.asarray(stars, dtype=np.float64), np.asarray(users)
    if stars.ndim != 1 or stars.shape != users.shape:
        raise ValueError(f"stars and users must both be [n], got shapes {stars.shape} and {users.shape}")
    if most < 1:
        raise ValueError(f"most must be at least 1, got {most}")
    rng = np.random.default_rng(seed)
    labels, code = np.unique(users, return_inverse=True)
    found = [np.empty((0, 2), np.int64)]
    for rows in Ragged.from_pairs(code, np.arange(len(code)), len(labels)).to_lists():
        own = np.array(rows)
        pairs = own[np.argwhere(stars[own][:, None] < stars[own])]
        drawn = rng.permutation(len(pairs))[:most]
        found.append(rng.permuted(pairs[drawn], axis=1))
    return np.concatenate(found)


def _answer(method: str, answer: Any, count: int) -> np.ndarray:
    value = np.asarray(answer, dtype=np.float64)
    if value.shape != (count,):
        raise ValueError(f"judge.{method} must return {(count,)}, got shape {value.shape}")
    return value


def _checked_pairs(pairs: Any, rows: int | None = None) -> np.ndarray:
    value = np.asarray(pairs)
    if value.ndim != 2 or value.shape[1] != 2 or not (np.issubdtype(value.dtype, np.integer) or not value.size):
        raise ValueError(f"pairs must be integers [p, 2], got {value.dtype} {value.shape}")
    if value.size and (value.min() < 0 or rows is not None and value.max() >= rows):
        raise ValueError(f"pairs must lie in [0, {'n' if rows is None else rows}), got {value.min()} to {value.max()}")
    return value.astype(np.int64)
