from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmrec.fusion import CrossModalAttention, Tokens

WIDTH, HEADS, QUERIES, ITEMS = 8, 2, 3, 4
NAMES = ("text", "image", "table")
LENGTHS = {"text": [2, 0, 1, 0], "image": [3, 2, 0, 0], "table": [1, 4, 0, 0]}


def tokens() -> dict[str, Tokens]:
    found = {}
    for name, lengths in LENGTHS.items():
        values = torch.randn(sum(lengths), WIDTH, dtype=torch.float64)
        found[name] = Tokens(values, torch.tensor([0, *lengths]).cumsum(0), torch.zeros(len(values), dtype=torch.int64))
    return found


def module(gated: bool = True) -> CrossModalAttention:
    model = CrossModalAttention(NAMES, WIDTH, num_queries=QUERIES, num_heads=HEADS, gated=gated).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Away from the ones and zeros that they start with, so that each of them must be read rightly.
            if name in ("query_norm", "key_norm", "log_bias", "value_gate", "norm.weight", "norm.bias"):
                parameter += 0.5 * torch.randn_like(parameter)
    return model


def dense(
    model: CrossModalAttention, given: dict[str, Tokens], item: int, absent: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One item, head by head, with all its tokens in one matrix and torch's softmax."""
    head = WIDTH // HEADS
    parts = [(m, given[name]) for m, name in enumerate(NAMES) if name in given]
    parts = [(m, part) for m, part in parts if absent is None or not absent[item, m]]
    rows = [(m, part.values[part.offsets[item] : part.offsets[item + 1]]) for m, part in parts]
    x = torch.cat([values for _, values in rows] or [torch.zeros(0, WIDTH).double()])
    owner = torch.cat([torch.full((len(values),), m) for m, values in rows] or [torch.zeros(0, dtype=torch.int64)])
    mass, answers = torch.zeros(len(NAMES)).double(), []
    key = model.key(model.norm(x)).view(-1, HEADS, head)
    value = x.view(-1, HEADS, head)
    for row in range(QUERIES):
        for h in range(HEADS):
            query = F.rms_norm(model.query[row, h], (head,), model.query_norm, 1e-6)
            score = F.rms_norm(key[:, h], (head,), model.key_norm, 1e-6) @ query / head**0.5
            if model.log_bias is not None:
                score = score + model.log_bias[0, h, owner]
            share = score.softmax(0)
            mass = mass.index_add(0, owner, share / (QUERIES * HEADS))
            gate = 1.0 if model.value_gate is None else model.value_gate[0, h, owner].unsqueeze(1)
            answers.append((share.unsqueeze(1) * gate * value[:, h]).sum(0))
    return torch.cat(answers).view(QUERIES, WIDTH).mean(0), mass


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("hide", [False, True])
def test_equals_a_dense_computation(gated: bool, hide: bool) -> None:
    model, given = module(gated), tokens()
    absent = torch.tensor([[0, 1, 0], [0, 0, 1], [1, 0, 0], [0, 1, 0]]).bool() if hide else None
    fused = model(given, absent=absent)
    for item in range(ITEMS):
        values, mass = dense(model, given, item, absent)
        torch.testing.assert_close(fused.values[item], values)
        torch.testing.assert_close(fused.mass[item], mass)


def test_mass_sums_to_one_or_to_zero_without_any_modality() -> None:
    mass = module()(tokens()).mass
    torch.testing.assert_close(mass.sum(1), torch.tensor([1.0, 1.0, 1.0, 0.0]).double())
    for m, name in enumerate(NAMES):
        assert ((mass[:, m] > 0) == (torch.tensor(LENGTHS[name]) > 0)).all()


def test_an_item_without_anything_is_zero() -> None:
    assert not module()(tokens()).values[3].any()


def test_missing_absent_and_not_given_are_the_same() -> None:
    model, given = module(), tokens()
    nowhere = Tokens(torch.zeros(0, WIDTH).double(), torch.zeros(ITEMS + 1, dtype=torch.int64), torch.zeros(0).long())
    without = {name: given[name] for name in ("text", "table")}
    absent = torch.tensor([[False, True, False]]).expand(ITEMS, -1)
    for other in (model({**given, "image": nowhere}), model(given, absent=absent)):
        assert torch.equal(other.values, model(without).values) and torch.equal(other.mass, model(without).mass)


def test_hidden_tokens_get_no_gradient() -> None:
    model, given = module(), tokens()
    leaves = {name: part._replace(values=part.values.requires_grad_()) for name, part in given.items()}
    absent = torch.zeros(ITEMS, 3, dtype=torch.bool)
    absent[0, 1] = True
    model(leaves, absent=absent).values.square().sum().backward()
    grad = leaves["image"].values.grad
    assert grad is not None and not grad[:3].any() and grad[3:].any(1).all()


def test_items_do_not_see_each_other() -> None:
    model, given = module(), tokens()
    order = torch.tensor([2, 0, 3, 1, 0])
    fused, moved = model(given), model({name: part.select(order) for name, part in given.items()})
    torch.testing.assert_close(moved.values, fused.values[order])
    torch.testing.assert_close(moved.mass, fused.mass[order])


def test_the_order_of_an_items_tokens_means_nothing() -> None:
    model, given = module(), tokens()
    order = torch.tensor([2, 0, 1, 4, 3])
    shuffled = given["image"]._replace(values=given["image"].values[order])
    torch.testing.assert_close(model({**given, "image": shuffled}).values, model(given).values)


@pytest.mark.parametrize("gated", [True, False])
def test_gradcheck(gated: bool) -> None:
    model, given = module(gated), tokens()
    names, values = zip(*model.named_parameters(), strict=True)
    absent = torch.zeros(ITEMS, 3, dtype=torch.bool)
    absent[0, 0] = True

    def run(text: Tensor, image: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        now = {**given, "text": given["text"]._replace(values=text), "image": given["image"]._replace(values=image)}
        return torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (now,), {"absent": absent})

    leaves = [v.detach().clone().requires_grad_() for v in (given["text"].values, given["image"].values, *values)]
    assert torch.autograd.gradcheck(lambda *x: tuple(run(*x)), tuple(leaves), fast_mode=True)


def test_bad_input() -> None:
    model, given = module(), tokens()
    with pytest.raises(ValueError, match="at least one of the modalities"):
        model({"audio": given["text"]})
    with pytest.raises(ValueError, match="same number of items per modality, got 2 and 4"):
        model({**given, "image": given["image"].select(torch.tensor([0, 1]))})
    with pytest.raises(ValueError, match=r"absent must be bool \[4, 3\], got torch.bool \[4, 2\]"):
        model(given, absent=torch.zeros(4, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="width must be a multiple of num_heads = 3, got 8"):
        CrossModalAttention(NAMES, 8, num_heads=3)
    with pytest.raises(ValueError, match="num_queries and num_heads must be ≥ 1, got 0 and 2"):
        CrossModalAttention(NAMES, 8, num_queries=0)
    for names in ((), ("text", "text")):
        with pytest.raises(ValueError, match="modalities must be distinct names"):
            CrossModalAttention(names, 8)
