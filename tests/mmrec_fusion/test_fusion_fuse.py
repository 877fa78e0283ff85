from __future__ import annotations

import pytest
import torch
from fusion_helpers import (
    HEADS,
    ITEMS,
    LENGTHS,
    NAMES,
    QUERIES,
    WIDTH,
    away_from_the_start,
    check_gradients,
    listen,
    nowhere,
    tokens,
)
from torch import Tensor

from mmrec.fusion import AttentionPooler, Tokens


def module(gated: bool = True) -> AttentionPooler:
    model = AttentionPooler(NAMES, WIDTH, num_queries=QUERIES, num_heads=HEADS, modality_gates=gated)
    return away_from_the_start(model)


def dense(model: AttentionPooler, given: dict[str, Tokens], item: int, absent: Tensor | None) -> tuple[Tensor, Tensor]:
    """One item, head by head, with all its tokens in one matrix."""
    head = WIDTH // HEADS
    parts = [(m, given[name]) for m, name in enumerate(NAMES) if name in given]
    parts = [(m, part) for m, part in parts if absent is None or not absent[item, m]]
    rows = [(m, part.values[part.offsets[item] : part.offsets[item + 1]]) for m, part in parts]
    x = torch.cat([values for _, values in rows] or [torch.zeros(0, WIDTH).double()])
    owner = torch.cat([torch.full((len(values),), m) for m, values in rows] or [torch.zeros(0, dtype=torch.int64)])
    mass, answers = torch.zeros(len(NAMES)).double(), []
    key, value = model.key(model.norm(x)).view(-1, HEADS, head), x.view(-1, HEADS, head)
    bias, gate = torch.zeros(HEADS, len(NAMES)).double(), torch.ones(HEADS, len(NAMES)).double()
    if model.log_bias is not None and model.value_gate is not None:
        bias, gate = model.log_bias[0], model.value_gate[0]
    for h in range(HEADS):
        norms = (model.query_norm, model.key_norm)
        both = listen(model.query[:, h], key[:, h], value[:, h], bias[h, owner], gate[h, owner], norms)
        mass = mass.index_add(0, owner, both[:, head:].mean(0) / HEADS)
        answers.append(both[:, :head].mean(0))
    return torch.cat(answers), mass


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
    without = {name: given[name] for name in ("text", "table")}
    absent = torch.tensor([[False, True, False]]).expand(ITEMS, -1)
    for other in (model({**given, "image": nowhere()}), model(given, absent=absent)):
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

    check_gradients(run, (given["text"].values, given["image"].values, *values))


def test_bad_input() -> None:
    model, given = module(), tokens()
    with pytest.raises(ValueError, match="at least one of the modalities"):
        model({"audio": given["text"]})
    with pytest.raises(ValueError, match="same number of items per modality, got 4 and 2 and 4"):
        model({**given, "image": given["image"].select(torch.tensor([0, 1]))})
    with pytest.raises(ValueError, match=r"absent must be bool \[4, 3\], got torch.bool \[4, 2\]"):
        model(given, absent=torch.zeros(4, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="width must be a multiple of num_heads = 3, got 8"):
        AttentionPooler(NAMES, 8, num_heads=3)
    with pytest.raises(ValueError, match="num_queries must be ≥ 1, got 0"):
        AttentionPooler(NAMES, 8, num_queries=0)
    for names in ((), ("text", "text")):
        with pytest.raises(ValueError, match="modalities must be distinct names"):
            AttentionPooler(names, 8)
