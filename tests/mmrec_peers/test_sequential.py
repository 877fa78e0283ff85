"""SASRec's losses by their formulas, and what it must learn from an order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mmrec.evaluation import Ragged, Split, per_user
from mmrec.evaluation.protocols import leave_last_out
from mmrec.peers import SASRec, SequenceConfig, fit_sequence

KNOWN = np.array([True, True, False, True, True, True])
INDEX, OFFSETS = torch.tensor([0, 1, 3, 4, 0]), torch.tensor([0, 3, 5])
TARGET = torch.tensor([1, 3, 4, 0, 5])


def small(**changes) -> SASRec:
    torch.manual_seed(0)
    return SASRec(KNOWN, **{"width": 8, "heads": 2, "max_length": 4, "dropout": 0.0, **changes})


def walks(users: int = 200, items: int = 30, length: int = 12) -> Split:
    """Everyone walks in steps of one from somewhere; item 0 follows the last one."""
    start = np.random.default_rng(0).integers(items, size=users)
    item = (start[:, None] + np.arange(length)) % items
    return leave_last_out(np.repeat(np.arange(users), length), item.ravel(), users, items)


def test_the_binary_loss(monkeypatch):
    model = small(loss="binary")
    other = torch.tensor([3, 4, 5, 1, 1])
    monkeypatch.setattr(model, "_outside", lambda *window: other)
    states = model.tower(model.item, INDEX, OFFSETS)
    right, wrong = (states * model.item[TARGET]).sum(1), (states * model.item[other]).sum(1)
    wanted = -(right.sigmoid().log() + (1 - wrong.sigmoid()).log()).mean()
    torch.testing.assert_close(model.loss(INDEX, OFFSETS, TARGET), wanted)


def test_the_sampled_loss_leaves_a_positions_own_item_out(monkeypatch):
    model = small(loss="sampled", negatives=3)
    others = torch.tensor([3, 0, 5])
    monkeypatch.setattr(model, "_drawn", lambda count: others[:count])
    states = model.tower(model.item, INDEX, OFFSETS)
    total = 0.0
    for state, target in zip(states, TARGET.tolist(), strict=True):
        rows = [target, *(other for other in others.tolist() if other != target)]
        total += F.cross_entropy((model.item[rows] @ state)[None], torch.tensor([0]))
    torch.testing.assert_close(model.loss(INDEX, OFFSETS, TARGET), total / 5)


def test_the_full_softmax_is_over_trained_items():
    model = small()
    known = torch.tensor([0, 1, 3, 4, 5])
    logits = model.tower(model.item, INDEX, OFFSETS) @ model.item[known].T
    wanted = F.cross_entropy(logits, torch.tensor([1, 2, 3, 0, 4]))
    torch.testing.assert_close(model.loss(INDEX, OFFSETS, TARGET), wanted, rtol=1e-5, atol=1e-6)


def test_negatives_are_trained_items():
    drawn = small()._drawn(4000)
    counts = torch.bincount(drawn, minlength=6)
    assert counts[2] == 0 and (counts[[0, 1, 3, 4, 5]] > 600).all()


def test_binary_negatives_are_outside_their_window():
    model = small(loss="binary")
    drawn = torch.stack([model._outside(INDEX, OFFSETS, TARGET) for _ in range(200)])
    assert set(drawn[:, :3].flatten().tolist()) == {5} and set(drawn[:, 3:].flatten().tolist()) == {1, 3}
    every = torch.tensor([0, 1, 3, 4, 5])
    with pytest.raises(ValueError, match="nearly all trained items"):
        model._outside(every, torch.tensor([0, 5]), every)


def test_a_target_that_is_not_trained():
    with pytest.raises(ValueError, match="item row 2, which is not a trained item"):
        small().loss(INDEX, OFFSETS, torch.tensor([1, 2, 4, 0, 5]))


def test_gates_scale_what_a_block_adds():
    plain, gated = small(layers=1), small(layers=1, gated=True)
    gated.load_state_dict(plain.state_dict(), strict=False)
    block = gated.tower.blocks[0]
    for gate in block.gates:
        torch.nn.init.zeros_(gate.weight)
        torch.nn.init.constant_(gate.bias, 100.0)
    states = plain.tower(plain.item, INDEX, OFFSETS)
    torch.testing.assert_close(gated.tower(gated.item, INDEX, OFFSETS), states)
    for gate in block.gates:
        torch.nn.init.constant_(gate.bias, -100.0)
    x = plain.tower.input_norm(plain.item[INDEX] + plain.tower.position[[0, 1, 2, 0, 1]])
    torch.testing.assert_close(gated.tower(gated.item, INDEX, OFFSETS), plain.tower.output_norm(x))


def test_states_are_of_the_last_items():
    model = small().eval()
    histories = Ragged.from_lists([[5, 0, 1, 3, 4], [1]])
    wanted = [
        model.tower(model.item, torch.tensor(row), torch.tensor([0, len(row)]))[-1] for row in ([0, 1, 3, 4], [1])
    ]
    torch.testing.assert_close(model.states(histories, batch_size=1), torch.stack(wanted))
    assert model.states(Ragged.empty(0)).shape == (0, 8)


@pytest.mark.parametrize("changes", ({"loss": "binary"}, {"loss": "sampled", "negatives": 8}, {"gated": True}), ids=str)
def test_an_order_is_learned(changes):
    parts = walks()
    make = lambda: SASRec(parts.popularity > 0, width=16, dropout=0.1, max_length=8, **changes)  # noqa: E731
    config = SequenceConfig(learning_rate=0.01, batch_size=32, epochs=25, patience=5)
    fitted = fit_sequence(make, parts, config)
    hits = per_user(fitted(parts, "test", 10), parts.relevant("test"), ["HR@1"])["HR@1"].mean()
    assert hits > 0.9
    values = [row["valid"] for row in fitted.curves]
    assert values[fitted.best_epoch - 1] == max(values) and not fitted.model.training
    valid = per_user(fitted(parts, "valid", 10), parts.relevant("valid"), ["NDCG@10"])["NDCG@10"].mean()
    assert float(valid) == pytest.approx(max(values))
    again = fit_sequence(make, parts, config)
    assert torch.equal(again.model.item, fitted.model.item)


def test_what_cannot_be_trained():
    for changes, message in (
        ({"loss": "bce"}, "loss must be 'binary', 'sampled' or 'softmax', got 'bce'"),
        ({"negatives": 0}, "negatives must be at least 1, got 0"),
        ({"heads": 3}, "width a multiple of heads, got 2, 3, 8"),
    ):
        with pytest.raises(ValueError, match=message):
            small(**changes)
    one = Ragged.from_lists([[0], [1]])
    parts = Split("S", 2, 6, one, one, Ragged.empty(2), origin="test")
    with pytest.raises(ValueError, match="no user has two interactions"):
        fit_sequence(small, parts)
