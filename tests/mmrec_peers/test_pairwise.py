"""Pairwise peers against their formulas, and what they must learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from peers_helpers import ITEMS, TRAIN, USERS, communities, normalised, recall

from mmrec.evaluation import Ragged, Split, most_popular, per_user
from mmrec.peers import BPR, VBPR, Graph, LightGCN, PairwiseConfig, fit_pairwise
from mmrec.peers.training import Negatives, _PairwiseFit


def test_the_graph_is_normalised_by_both_degrees():
    graph, dense = Graph(TRAIN, ITEMS), normalised(TRAIN, ITEMS)
    nodes = torch.randn(USERS + ITEMS, 6, requires_grad=True)
    found = graph.propagate(nodes)
    torch.testing.assert_close(found, (dense @ nodes.double()).float(), rtol=1e-6, atol=1e-6)
    assert (found[2] == 0).all() and (found[USERS + 4] == 0).all()
    grad = torch.randn(6, USERS + ITEMS).T  # not contiguous
    (got,) = torch.autograd.grad(found, nodes, grad)
    torch.testing.assert_close(got, (dense.T @ grad.double()).float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layers", (0, 1, 3))
def test_lightgcn_averages_its_layers(layers):
    model = LightGCN(Graph(TRAIN, ITEMS), width=8, layers=layers)
    dense, nodes = normalised(TRAIN, ITEMS), torch.cat([model.user, model.item]).double()
    wanted = sum(torch.linalg.matrix_power(dense, n) @ nodes for n in range(layers + 1)) / (layers + 1)
    torch.testing.assert_close(torch.cat(model.vectors()), wanted.float(), rtol=1e-5, atol=1e-6)


def test_vbpr_adds_what_content_says():
    features = torch.randn(ITEMS, 7)
    model = VBPR(USERS, ITEMS, features, width=3)
    users, items = model.vectors()
    wanted = model.user @ model.item.T + model.taste @ (features @ model.project).T
    torch.testing.assert_close(users @ items.T, wanted)
    with pytest.raises(ValueError, match=r"features must be \[5, F\], got \[4, 7\]"):
        VBPR(USERS, ITEMS, features[:4])


def test_the_loss_and_its_decay(monkeypatch):
    """One step's loss by the formula, from the weights before it; all interactions are in it once."""
    config = PairwiseConfig(weight_decay=0.3, batch_size=100, learning_rate=0.01)
    parts = Split("G", USERS, ITEMS, TRAIN, Ragged.from_lists([[2], [], [], []]), Ragged.empty(USERS), origin="test")
    fit = _PairwiseFit(lambda: BPR(USERS, ITEMS, width=4), parts, config)
    model = fit.model
    user, item = (p.detach().clone() for p in model.parameters())
    drawn = []
    monkeypatch.setattr(fit.negatives, "draw", lambda users, random: drawn.append(users) or np.full(len(users), 2))
    loss = fit.epoch(1)
    total, decay = 0.0, 0.0
    for u, i in zip(TRAIN.row_of.tolist(), TRAIN.ids.tolist(), strict=True):
        gap = float(user[u] @ (item[i] - item[2]))
        total += math.log1p(math.exp(-gap))
        decay += float(user[u].square().sum() + item[i].square().sum() + item[2].square().sum())
    n = len(TRAIN.ids)
    assert loss == pytest.approx(total / n + 0.3 / 2 * decay / n, rel=1e-5)
    assert sorted(drawn[0].tolist()) == sorted(TRAIN.row_of.tolist())
    assert not torch.equal(model.user, user) and torch.equal(model.user[2], user[2])


def test_negatives_are_uniform_among_what_was_not_chosen():
    negatives, random = Negatives(TRAIN, ITEMS), np.random.default_rng(0)
    counts = {user: np.bincount(negatives.draw(np.full(3000, user), random), minlength=ITEMS) for user in (0, 1, 2, 3)}
    allowed = {0: [2, 3], 1: [0, 3], 2: [0, 1, 2, 3], 3: [2]}
    for user, items in allowed.items():
        assert counts[user][items].sum() == 3000  # never a chosen one, never the cold one
        assert (abs(counts[user][items] - 3000 / len(items)) < 5 * math.sqrt(3000 / len(items))).all()
    with pytest.raises(ValueError, match="user row 1 chose all 2 trained items"):
        Negatives(Ragged.from_lists([[0], [0, 1]]), 2)


@pytest.mark.parametrize("kind", ("bpr", "lightgcn", "vbpr"))
def test_communities_are_found(kind):
    parts = communities()
    sides = torch.eye(2)[torch.arange(parts.num_items) % 2]
    make = {
        "bpr": lambda: BPR(parts.num_users, parts.num_items, width=16),
        "lightgcn": lambda: LightGCN(Graph(parts.train, parts.num_items), width=16, layers=2),
        "vbpr": lambda: VBPR(parts.num_users, parts.num_items, sides, width=16),
    }[kind]
    config = PairwiseConfig(learning_rate=0.02, batch_size=512, epochs=40, patience=5)
    fitted = fit_pairwise(make, parts, config)
    assert recall(fitted, parts) > 1.5 * recall(most_popular, parts) and len(parts.users("test")) > 250
    # The best epoch's weights are what is kept.
    values = [row["valid"] for row in fitted.curves]
    assert values[fitted.best_epoch - 1] == max(values) and values.index(max(values)) == fitted.best_epoch - 1
    assert fitted.best_epoch == len(values) or len(values) in (fitted.best_epoch + 5, 40)
    valid = per_user(fitted(parts, "valid", 20), parts.relevant("valid"), ["Recall@20"])["Recall@20"].mean()
    assert float(valid) == pytest.approx(max(values))
    again = fit_pairwise(make, parts, config)
    assert torch.equal(again.users, fitted.users) and torch.equal(again.items, fitted.items)


def test_what_cannot_be_trained():
    parts = communities()
    make = lambda: BPR(parts.num_users, parts.num_items)  # noqa: E731
    for changes, message in (
        ({"learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"), ({"batch_size": 0}, "batch_size must be"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0, got -1.0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            PairwiseConfig(**changes)
    empty = Ragged.empty(parts.num_users)
    for part, message in (("train", "no training interactions"), ("valid", "no users to validate with")):
        bad = Split("G", parts.num_users, parts.num_items, **{
            name: empty if name == part else getattr(parts, name) for name in ("train", "valid", "test")
        }, origin="test")  # fmt: skip
        with pytest.raises(ValueError, match=message):
            fit_pairwise(make, bad)
    with pytest.raises(ValueError, match="the loss became nan in epoch 1"):
        fit_pairwise(make, parts, PairwiseConfig(learning_rate=1e30, batch_size=256))
