"""FREEDOM and BM3 against their formulas, and the graphs they walk on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peers_helpers import ITEMS, TRAIN, USERS, communities, normalised, recall
from torch import Tensor
from torch.nn import functional as F

from mmrec.evaluation import Ragged, Split, most_popular
from mmrec.peers import BM3, FREEDOM, Graph, PairwiseConfig, fit_pairwise, neighbour_graph

FEATURES = [
    torch.linspace(-1, 1, ITEMS * 7).sin().view(ITEMS, 7),
    torch.linspace(-2, 3, ITEMS * 3).cos().view(ITEMS, 3),
]
FEATURES[1][3] = 0  # item 3 has nothing of it


def dense(adjacency) -> Tensor:
    return adjacency.matrix.to_dense().double()


def test_a_pruned_graph_has_so_many_edges_and_their_degrees():
    graph = Graph(TRAIN, ITEMS)
    pruned = dense(graph.pruned(0.6, np.random.default_rng(0)))
    edges = pruned[:USERS, USERS:] > 0
    assert int(edges.sum()) == 4  # of 7 that are not repeats
    assert not (edges & (normalised(TRAIN, ITEMS)[:USERS, USERS:] == 0)).any()
    kept = Ragged.from_lists([row.nonzero()[:, 0].tolist() for row in edges])
    torch.testing.assert_close(pruned, normalised(kept, ITEMS), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(dense(graph.pruned(1.0, np.random.default_rng(0))), normalised(TRAIN, ITEMS))


def test_edges_of_popular_nodes_are_pruned_first():
    """An item of all users, and one item for each: both ends decide, by 1 / sqrt(degree · degree)."""
    users = 40
    graph = Graph(Ragged.from_lists([[0, user + 1] for user in range(users)]), users + 1)
    random = np.random.default_rng(0)
    popular = sum(int((dense(graph.pruned(0.5, random))[:users, users] > 0).sum()) for _ in range(50)) / 50
    # Drawn with replacement it would be 40 · p1 / (p1 + p2) = 5.5 of 40 edges; without it the others run out.
    assert 5.5 < popular < 10


def test_neighbours_by_cosine():
    features = [torch.randn(30, 8), torch.randn(30, 5)]
    features[0][3] = 0  # without content: nobody's neighbour there
    found = dense(neighbour_graph(features, [0.3, 0.7], 4))
    wanted = torch.zeros(30, 30, dtype=torch.float64)
    for values, share in zip(features, (0.3, 0.7), strict=True):
        normed = F.normalize(values.double(), dim=1)
        alike = normed @ normed.T
        for item in range(30):
            if values[item].any():
                others = alike[item].masked_fill(~values.any(1), -2)
                wanted[item, others.topk(4).indices] += share / 4
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
    nodes = torch.randn(30, 6, requires_grad=True)
    graph = neighbour_graph(features, [0.3, 0.7], 4)
    grad = torch.randn(30, 6)
    (got,) = torch.autograd.grad(graph.propagate(nodes), nodes, grad)
    torch.testing.assert_close(got.double(), wanted.T @ grad.double(), rtol=1e-5, atol=1e-6)


def test_freedom():
    graph = Graph(TRAIN, ITEMS)
    model = FREEDOM(graph, FEATURES, shares=(0.1, 0.9), width=4, layers=2, neighbours=2, kept=0.5, content_weight=0.3)
    similar = dense(neighbour_graph(FEATURES, (0.1, 0.9), 2))

    def vectors(adjacency: Tensor) -> tuple[Tensor, Tensor]:
        nodes = torch.cat([model.user, model.item]).double()
        mean = sum(torch.linalg.matrix_power(adjacency, n) @ nodes for n in range(3)) / 3
        return mean[:USERS], mean[USERS:] + similar @ model.item.double()

    for found, wanted in zip(model.vectors(), vectors(normalised(TRAIN, ITEMS)), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    model.begin_epoch(np.random.default_rng(3))
    users, chosen, others = torch.tensor([0, 3]), torch.tensor([1, 3]), torch.tensor([2, 4])
    of_users, of_items = vectors(dense(graph.pruned(0.5, np.random.default_rng(3))))
    wanted = F.softplus(-(of_users[users] * (of_items[chosen] - of_items[others])).sum(1)).mean()
    for linear, values in zip(model.project, FEATURES, strict=True):
        content, there = linear(values).double(), values.any(1)
        losses = F.softplus(-(of_users[users] * (content[chosen] - content[others])).sum(1))
        wanted = wanted + 0.3 * (losses * (there[chosen] & there[others])).mean()
    size = model.user[users].square().sum() + model.item[torch.cat([chosen, others])].square().sum()
    torch.testing.assert_close(model.loss(users, chosen, others, 0.2).double(), wanted + 0.2 / 4 * size.double())
    for wrong, message in (
        ({"kept": 0.0}, r"kept must be in \(0, 1\], got 0.0"),
        ({"shares": (0.1, 0.2)}, r"shares must be 2 numbers ≥ 0 that sum to 1, got \[0.1, 0.2\]"),
        ({"layers": -1}, "layers must be at least 0, got -1"),
        ({"width": 0}, "width must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            FREEDOM(graph, FEATURES, **wrong)


def test_bm3():
    model = BM3(Graph(TRAIN, ITEMS), FEATURES, width=4, layers=1, dropout=0.0, content_weight=0.7)
    nodes = torch.cat([model.user, model.item]).double()
    mean = (nodes + normalised(TRAIN, ITEMS) @ nodes) / 2
    of_users, of_items = mean[:USERS].float(), mean[USERS:].float() + model.item
    users, chosen = torch.tensor([0, 3, 3]), torch.tensor([1, 3, 0])
    torch.testing.assert_close(model.vectors(), (model.predict(of_users), model.predict(of_items)))

    def apart(a: Tensor, b: Tensor, counts: Tensor | float = 1.0) -> Tensor:
        return ((1 - (F.normalize(a, dim=1) * F.normalize(b.detach(), dim=1)).sum(1)) * counts).mean()

    user, item = of_users[users], of_items[chosen]
    wanted = apart(model.predict(user), item) + apart(model.predict(item), user)
    for linear, values in zip(model.project, FEATURES, strict=True):
        content, there = linear(values[chosen]), values[chosen].any(1)
        said = model.predict(content)
        wanted = wanted + 0.7 * (apart(said, item, there) + apart(said, content, there))
    wanted = wanted + 0.2 / 6 * (user.square().sum() + item.square().sum())
    found = model.loss(users, chosen, torch.zeros(3, dtype=torch.long), 0.2)
    torch.testing.assert_close(found, wanted)
    parameters = list(model.parameters())
    grads = zip(torch.autograd.grad(found, parameters), torch.autograd.grad(wanted, parameters), strict=True)
    for got, want in grads:
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"features must be \[5, F\], got \[4, 3\]"):
        BM3(Graph(TRAIN, ITEMS), [FEATURES[0], torch.randn(4, 3)])
    with pytest.raises(ValueError, match="features must have at least one modality"):
        BM3(Graph(TRAIN, ITEMS), [])


def test_graphs_without_edges():
    graph = Graph(TRAIN, ITEMS)
    assert not dense(graph.pruned(0.01, np.random.default_rng(0))).any()
    assert not dense(neighbour_graph([torch.zeros(4, 3)], [1.0], 2)).any()
    few = dense(neighbour_graph([torch.tensor([[1e-25, 0], [0, 1e25], [0, 0]])], [1.0], 10))
    torch.testing.assert_close(few, torch.tensor([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 0]], dtype=torch.float64))
    with pytest.raises(ValueError, match="features must be finite"):
        BM3(graph, [torch.full((ITEMS, 2), torch.nan)])


def test_bm3_needs_no_negatives_and_draws_nothing_of_others():
    """A user who chose everything, whom pairwise models refuse; and whatever `progress` draws."""
    parts = Split(
        "G", 2, 2, Ragged.from_lists([[0], [0, 1]]), Ragged.from_lists([[1], []]), Ragged.empty(2), origin="t"
    )
    make = lambda: BM3(Graph(parts.train, 2), [torch.eye(2)], width=4, dropout=0.5)  # noqa: E731
    config = PairwiseConfig(epochs=3)
    fitted = fit_pairwise(make, parts, config)
    again = fit_pairwise(make, parts, config, progress=lambda row: torch.rand(3))
    assert torch.equal(fitted.users, again.users) and len(fitted.curves) == 3


def test_bm3_drops_some_of_what_it_draws_to():
    model = BM3(Graph(TRAIN, ITEMS), FEATURES, dropout=0.5)
    target = model._target(torch.ones(100, 64, requires_grad=True))
    assert not target.requires_grad and set(target.unique().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("kind", ("freedom", "bm3"))
def test_communities_are_found(kind):
    parts = communities()
    sides = torch.eye(2)[torch.arange(parts.num_items) % 2] + 0.3 * torch.randn(parts.num_items, 2)
    graph = Graph(parts.train, parts.num_items)
    make = {
        "freedom": lambda: FREEDOM(graph, [sides], width=16, kept=0.5),
        "bm3": lambda: BM3(graph, [sides], width=16),
    }[kind]
    config = PairwiseConfig(learning_rate=0.02, batch_size=512, epochs=40, patience=5)
    fitted = fit_pairwise(make, parts, config)
    assert recall(fitted, parts) > 1.5 * recall(most_popular, parts)
    again = fit_pairwise(make, parts, config)
    assert torch.equal(again.users, fitted.users) and torch.equal(again.items, fitted.items)
