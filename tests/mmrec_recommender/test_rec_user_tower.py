from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmrec.recommender import UserTower

WIDTH, HEADS, LENGTH = 8, 2, 6
LENGTHS = [3, 0, 6, 1]


def tower(**changes: float) -> UserTower:
    settings: dict = {"layers": 2, "heads": HEADS, "max_length": LENGTH, "dropout": 0.0, **changes}
    model = UserTower(WIDTH, **settings).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def histories() -> tuple[Tensor, Tensor, Tensor]:
    index = torch.tensor([4, 1, 1, 0, 2, 3, 4, 4, 0, 2])
    return torch.randn(5, WIDTH, dtype=torch.float64), index, torch.tensor([0, *LENGTHS]).cumsum(0)


def dense(model: UserTower, vectors: Tensor, index: Tensor) -> Tensor:
    """One history through torch's own causal attention."""
    x = model.input_norm(vectors[index] + model.position[: len(index)])
    for block in model.blocks:
        query, key, value = block.qkv(block.attention_norm(x)).view(len(x), 3, HEADS, -1).permute(1, 2, 0, 3)
        heard = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + block.out(heard.transpose(0, 1).flatten(1))
        x = x + block.feed(block.feed_norm(x))
    return model.output_norm(x)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_equals_a_transformer_with_torchs_attention(layers: int) -> None:
    model = tower(layers=layers)
    vectors, index, offsets = histories()
    parts = [dense(model, vectors, part) for part in index.split(LENGTHS) if len(part)]
    torch.testing.assert_close(model(vectors, index, offsets), torch.cat(parts))


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_last_states_alone_are_those_of_all(layers: int) -> None:
    model = tower(layers=layers)
    vectors, index, _ = histories()
    vectors.requires_grad_()
    offsets = torch.tensor([0, 3, 9, 10])
    every, last = model(vectors, index, offsets), model(vectors, index, offsets, last=True)
    torch.testing.assert_close(last, every[offsets[1:] - 1])
    weight = torch.randn_like(last)
    leaves = [vectors, *model.parameters()]
    wanted = torch.autograd.grad((every[offsets[1:] - 1] * weight).sum(), leaves)
    for got, one in zip(torch.autograd.grad((last * weight).sum(), leaves), wanted, strict=True):
        torch.testing.assert_close(got, one)


def test_a_later_item_changes_no_earlier_state() -> None:
    model = tower()
    vectors, index, offsets = histories()
    before = model(vectors, index, offsets)
    for place in range(3, 9):
        changed = index.clone()
        changed[place] = (changed[place] + 1) % 5
        same = (model(vectors, changed, offsets) == before).all(1)
        assert same.tolist() == [not place <= row < 9 for row in range(10)]


def test_a_history_alone_equals_the_history_in_a_batch() -> None:
    model = tower().float()
    vectors, index, offsets = histories()
    together = model(vectors.float(), index, offsets).split(LENGTHS)
    for part, expected in zip(index.split(LENGTHS), together, strict=True):
        alone = model(vectors.float(), part, torch.tensor([0, len(part)]))
        torch.testing.assert_close(alone, expected, rtol=0, atol=1e-6)


def test_one_layer_knows_order_from_positions_alone() -> None:
    model = tower(layers=1)
    vectors, _, _ = histories()
    one, other = torch.tensor([0, 1, 2]), torch.tensor([1, 0, 2])
    offsets = torch.tensor([0, 3])
    assert not torch.allclose(model(vectors, one, offsets)[-1], model(vectors, other, offsets)[-1])
    with torch.no_grad():
        model.position.zero_()
    torch.testing.assert_close(model(vectors, one, offsets)[-1], model(vectors, other, offsets)[-1])


def test_gradients_reach_items_and_used_positions() -> None:
    model = tower()
    vectors, index, offsets = histories()
    vectors.requires_grad_()
    model(vectors, index[:4], torch.tensor([0, 3, 4])).square().sum().backward()
    assert vectors.grad is not None and model.position.grad is not None
    assert vectors.grad.any(1).tolist() == [True, True, False, False, True]
    assert model.position.grad.any(1).tolist() == [True] * 3 + [False] * 3
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_gradcheck() -> None:
    model = tower(layers=1)
    vectors, index, offsets = histories()
    names, values = zip(*model.named_parameters(), strict=True)

    def run(vectors: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (vectors, index, offsets))

    leaves = tuple(value.detach().requires_grad_() for value in (vectors, *values))
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def test_dropout_is_for_training() -> None:
    model = tower(dropout=0.5)
    given = histories()
    assert torch.equal(model(*given), model(*given))
    model.train()
    assert not torch.equal(model(*given), model(*given))


def test_dropout_sits_on_the_input_both_branches_and_inside_the_feed_forward() -> None:
    model = tower(dropout=0.5).train()
    places: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            assert module.p == 0.5
            module.register_forward_hook(lambda *_, name=name: places.append(name))
    model(*histories())
    blocks = [f"blocks.{i}.{place}" for i in range(2) for place in ("dropout", "feed.2", "dropout")]
    assert places == ["input_dropout", *blocks]


def test_no_histories_and_longest_history() -> None:
    model = tower()
    vectors, _, _ = histories()
    nothing = torch.zeros(0, dtype=torch.int64)
    assert model(vectors, nothing, torch.tensor([0])).shape == (0, WIDTH)
    assert model(vectors, nothing, torch.tensor([0, 0, 0])).shape == (0, WIDTH)
    assert model(vectors, torch.zeros(LENGTH, dtype=torch.int64), torch.tensor([0, LENGTH])).shape == (LENGTH, WIDTH)
    with pytest.raises(ValueError, match="at most max_length = 6 items, got 7"):
        model(vectors, torch.zeros(8, dtype=torch.int64), torch.tensor([0, 1, 8]))
