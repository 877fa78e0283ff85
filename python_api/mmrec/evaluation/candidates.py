"""Protocol C: one item that a user chose among some that were drawn, as language models are often asked.

Its figures say how well a model tells the one from the others, and nothing about a whole catalogue: they stand in no
table with those of full rankings, and comparing them is refused (`Result.protocol` is "C").
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .metrics import Metric, per_user
from .protocols import Split, Stage
from .ragged import Ragged
from .results import Result, Row

__all__ = ["CandidateSets", "candidate_sets"]

METRICS: tuple[str, ...] = ("HR@1", "HR@3", "HR@5", "NDCG@3", "NDCG@5", "NDCG@10", "MRR@10")


@dataclass(frozen=True, eq=False)
class CandidateSets:
    """For n users, the item that comes next and items drawn uniformly from those the user never had.

    Attributes:
        split, stage: whose users and targets these are.
        users: int64 ``[n]``, user rows, ascending.
        items: int64 ``[n, C]``, each row ascending, so that a place says nothing.
        target: int64 ``[n]``, which item of the row was chosen.
        seed: of the draw.
    """

    split: Split
    stage: Stage
    users: np.ndarray
    items: np.ndarray
    target: np.ndarray
    seed: int

    @property
    def id(self) -> str:
        """Names split, users and candidates."""
        digest = hashlib.sha256(f"{self.split.id} {self.stage}".encode())
        for array in (self.users, self.items, self.target):
            digest.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
        return f"C-{digest.hexdigest()[:12]}"

    @property
    def histories(self) -> Ragged:
        """What a model may see of each user."""
        return self.split.history(self.stage).rows(self.users)

    def rank(self, scores: np.ndarray) -> np.ndarray:
        """int64 ``[n, C]``, each row's items by score, the highest first, ties to the lower item row.

        Raises:
            ValueError: another shape than that of ``items``, or NaN.
        """
        given = np.asarray(scores, dtype=np.float64)
        if given.shape != self.items.shape:
            raise ValueError(f"scores must be {list(self.items.shape)}, got {list(given.shape)}")
        if np.isnan(given).any():
            raise ValueError(f"scores of user row {int(self.users[np.isnan(given).any(1)][0])} hold NaN")
        return np.take_along_axis(self.items, np.argsort(-given, axis=1, kind="stable"), axis=1)

    def auc(self, scores: np.ndarray) -> np.ndarray:
        """float64 ``[n]``: the share of the other candidates that score below the target, ties counting half."""
        self.rank(scores)
        given = np.asarray(scores, dtype=np.float64)
        chosen = np.take_along_axis(given, np.argmax(self.items == self.target[:, None], axis=1)[:, None], axis=1)
        others = given.shape[1] - 1
        return ((given < chosen).sum(1) + ((given == chosen).sum(1) - 1) / 2) / others

    def evaluate(
        self, scores: np.ndarray, *, model: str, dataset: str, fingerprint: str, seed: int | None = None,
        metrics: Sequence[str] = METRICS,
    ) -> Result:  # fmt: skip
        """The result of a model that scored every candidate; arguments as in :func:`.evaluate`."""
        parsed = [Metric.parse(name) for name in metrics]
        deepest = max(metric.depth for metric in parsed)
        if deepest > self.items.shape[1]:
            raise ValueError(f"metrics must read at most the {self.items.shape[1]} candidates, got depth {deepest}")
        relevant = Ragged.from_lists([[item] for item in self.target.tolist()])
        row = Row(self.users, per_user(self.rank(scores), relevant, parsed))
        return Result(
            model=model, protocol="C", split=self.id, stage=self.stage, mask="none", dataset=dataset,
            fingerprint=fingerprint, seed=seed, rows={"all": row},
        )  # fmt: skip


def candidate_sets(
    split: Split, *, stage: Stage = "test", negatives: int = 20, most_users: int | None = None, seed: int = 0
) -> CandidateSets:
    """One target per user and ``negatives`` items that the user never had.

    Args:
        split: of whose users with a history and a target these are; where a user has several targets, the first one.
        negatives: drawn without replacement, for each user from a stream of its own: which users are asked changes no
            user's candidates.
        most_users: so many users at most, drawn by ``seed``.

    Raises:
        ValueError: fewer items than that which some user never had.
    """
    if negatives < 1:
        raise ValueError(f"negatives must be at least 1, got {negatives}")
    users = split.users(stage)
    if most_users is not None and most_users < len(users):
        users = np.sort(np.random.default_rng(seed).choice(users, most_users, replace=False))
    had = (split.train, split.valid, split.test)
    rows, targets = [], []
    for user in users.tolist():
        known = np.unique(np.concatenate([part.ids[part.offsets[user] : part.offsets[user + 1]] for part in had]))
        if split.num_items - len(known) < negatives:
            raise ValueError(
                f"negatives must be at most {split.num_items - len(known)}, what user row {user} never had, "
                f"got {negatives}"
            )
        target = int(split.target(stage).ids[split.target(stage).offsets[user]])
        others = np.setdiff1d(np.arange(split.num_items), known, assume_unique=True)
        drawn = np.random.default_rng([seed, user]).choice(others, negatives, replace=False)
        rows.append(np.sort(np.append(drawn, target)))
        targets.append(target)
    items = np.array(rows, dtype=np.int64).reshape(len(users), negatives + 1)
    return CandidateSets(split, stage, users, items, np.array(targets, dtype=np.int64), seed)
