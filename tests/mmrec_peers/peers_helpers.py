"""Small interactions for peers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mmrec.evaluation import Ragged, Ranker, Split, per_user
from mmrec.evaluation.protocols import general

TRAIN = Ragged.from_lists([[0, 1, 1], [1, 2], [], [0, 1, 3]])
USERS, ITEMS = 4, 5  # item 4 is cold, user 2 has nothing


def normalised(train: Ragged, num_items: int) -> Tensor:
    """D^−½ A D^−½, dense, in float64."""
    users = len(train)
    matrix = torch.zeros(users + num_items, users + num_items, dtype=torch.float64)
    for user in range(users):
        for item in train[user].tolist():
            matrix[user, users + item] = matrix[users + item, user] = 1
    degree = matrix.sum(1)
    scale = torch.where(degree > 0, degree, 1).rsqrt()
    return scale[:, None] * matrix * scale


def communities(seed: int = 0, users: int = 300, items: int = 120) -> Split:
    """Users of one half choose, almost always, items of one half; every item is about as popular."""
    random = np.random.default_rng(seed)
    side = random.integers(2, size=users)
    rows = []
    for user in range(users):
        own = np.arange(items)[np.arange(items) % 2 == (side[user] if random.random() < 0.95 else 1 - side[user])]
        rows.append(random.choice(own, 20, replace=False))
    user, item = np.repeat(np.arange(users), 20), np.concatenate(rows)
    return general(user, item, users, items, seed=seed)


def recall(ranker: Ranker, parts: Split) -> float:
    """Recall@20 on the test part."""
    ranked = ranker(parts, "test", 20)
    return float(per_user(ranked, parts.relevant("test"), ["Recall@20"])["Recall@20"].mean())
