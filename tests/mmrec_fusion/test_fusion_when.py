"""`ModalityFusion`: what early, intermediate and late fusion have in common, and what tells them apart."""

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
    nowhere,
    ragged,
    tokens,
)
from torch import Tensor

from mmrec.fusion import AttentionPooler, LatentPooler, ModalityFusion, Tokens

KINDS = [(when, layers) for when in ("early", "intermediate", "late") for layers in (0, 2)]


def fusion(when: str, layers: int = 0, names: tuple[str, ...] = NAMES) -> ModalityFusion:
    model = ModalityFusion(
        names, WIDTH, when=when, num_queries=QUERIES, num_heads=HEADS, num_layers=layers
    )  # fmt: skip
    return away_from_the_start(model)


@pytest.mark.parametrize(("when", "layers"), KINDS)
def test_masses_and_what_is_missing(when: str, layers: int) -> None:
    model, given = fusion(when, layers), tokens()
    found = model(given)
    assert found.values.shape == (ITEMS, WIDTH)
    torch.testing.assert_close(found.mass.sum(1), torch.tensor([1.0, 1.0, 1.0, 0.0]).double())
    for m, name in enumerate(NAMES):
        assert torch.equal(found.mass[:, m] > 0, torch.tensor(LENGTHS[name]) > 0)
    assert found.values[:3].any(1).all() and not found.values[3].any()

    without = model({name: given[name] for name in ("text", "table")})
    absent = torch.tensor([[False, True, False]]).expand(ITEMS, -1)
    for other in (model({**given, "image": nowhere()}), model(given, absent=absent)):
        torch.testing.assert_close(other.values, without.values)
        torch.testing.assert_close(other.mass, without.mass)


@pytest.mark.parametrize(("when", "layers"), KINDS)
def test_hidden_tokens_change_nothing_and_get_no_gradient(when: str, layers: int) -> None:
    model, given = fusion(when, layers), tokens()
    image = given["image"].values.requires_grad_()
    absent = torch.zeros(ITEMS, 3, dtype=torch.bool)
    absent[0, 1] = True
    model(given, absent=absent).values.square().sum().backward()
    assert image.grad is not None and not image.grad[:3].any() and image.grad[3:].any(1).all()


@pytest.mark.parametrize(("when", "layers"), KINDS)
def test_items_do_not_see_each_other(when: str, layers: int) -> None:
    model, given, order = fusion(when, layers), tokens(), torch.tensor([2, 0, 3, 1, 0])
    whole, part = model(given), model({name: tokens_.select(order) for name, tokens_ in given.items()})
    torch.testing.assert_close(part.values, whole.values[order])
    torch.testing.assert_close(part.mass, whole.mass[order])


@pytest.mark.parametrize(("when", "layers"), KINDS)
def test_gradcheck_and_every_parameter_is_used(when: str, layers: int) -> None:
    model, given = fusion(when, layers), tokens()
    names, parameters = zip(*model.named_parameters(), strict=True)

    def run(text: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        now = {**given, "text": given["text"]._replace(values=text)}
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (now,))

    check_gradients(run, (given["text"].values, *parameters))
    model(given).values.square().sum().backward()
    unused = [
        name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert not unused


def test_intermediate_starts_as_early() -> None:
    given = tokens()
    early, between = (
        ModalityFusion(NAMES, WIDTH, when=when, num_queries=QUERIES, num_heads=HEADS).double()
        for when in ("early", "intermediate")
    )
    missing, unexpected = between.load_state_dict(early.state_dict(), strict=False)
    assert not unexpected and all(name.startswith("listen.") for name in missing)
    assert torch.equal(between(given).values, early(given).values)


def test_intermediate_lets_a_modality_hear_the_others_before_it_is_pooled() -> None:
    """Text alone is pooled, and yet an image token changes what comes out."""
    model, given = fusion("intermediate"), tokens()
    assert isinstance(model.pool, AttentionPooler) and model.pool.value_gate is not None
    with torch.no_grad():
        model.pool.value_gate[:, :, 1:] = 0
    changed = {**given, "image": given["image"]._replace(values=given["image"].values + 1)}
    early = fusion("early")
    assert (
        isinstance(early.pool, AttentionPooler)
        and early.pool.value_gate is not None
        and early.pool.log_bias is not None
    )
    with torch.no_grad():
        early.pool.value_gate[:, :, 1:] = 0
        early.pool.log_bias[:, :, 1:] = -torch.inf
        model.pool.log_bias.copy_(early.pool.log_bias)
    assert torch.equal(early(given).values, early(changed).values)
    moved = (model(given).values != model(changed).values).any(1)
    assert moved.tolist() == [True, False, False, False]


def test_late_weighs_vectors_not_tokens() -> None:
    """Doubling a modality's tokens moves its mass under one softmax over tokens, and not under one over vectors."""
    given = tokens()
    image = given["image"]
    rows = torch.arange(len(image.values)).repeat_interleave(2)
    doubled = {**given, "image": Tokens(image.values[rows], image.offsets * 2, image.kind[rows])}
    late, early = fusion("late"), fusion("early")
    torch.testing.assert_close(late(doubled).mass, late(given).mass)
    assert (early(doubled).mass[0] != early(given).mass[0]).all()


@pytest.mark.parametrize(("when", "layers"), KINDS)
def test_coarse_is_fine_on_the_mean_of_each_modality(when: str, layers: int) -> None:
    model, given = fusion(when, layers), tokens()
    means = {}
    for name, part in given.items():
        rows = [part.values[a:b].mean(0) for a, b in zip(part.offsets, part.offsets[1:], strict=False) if a < b]
        means[name] = ragged([min(length, 1) for length in LENGTHS[name]])._replace(values=torch.stack(rows))
    expected = model(means)
    model.level = "coarse"
    found = model(given)
    torch.testing.assert_close(found.values, expected.values)
    torch.testing.assert_close(found.mass, expected.mass)
    assert ModalityFusion(NAMES, WIDTH, level="coarse").level == "coarse" and fusion("early").level == "fine"
    with pytest.raises(ValueError, match=r"level must be one of \('fine', 'coarse'\), got 'medium'"):
        ModalityFusion(NAMES, WIDTH, level="medium")


def test_what_pools() -> None:
    assert isinstance(fusion("early").pool, AttentionPooler) and isinstance(fusion("early", 2).pool, LatentPooler)
    late = fusion("late", 2)
    assert isinstance(late.pool, AttentionPooler) and all(isinstance(each, LatentPooler) for each in late.each)
    assert not fusion("intermediate", names=("text",)).listen


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"when must be one of \('early', 'intermediate', 'late'\), got 'middle'"):
        ModalityFusion(NAMES, WIDTH, when="middle")
    with pytest.raises(ValueError, match="num_layers must be ≥ 0, got -1"):
        ModalityFusion(NAMES, WIDTH, num_layers=-1)
    for when in ("early", "intermediate", "late"):
        with pytest.raises(ValueError, match=r"absent must be bool \[4, 3\], got torch.bool \[4, 2\]"):
            fusion(when)(tokens(), absent=torch.zeros(4, 2, dtype=torch.bool))
        with pytest.raises(ValueError, match="same number of items per modality"):
            fusion(when)({**tokens(), "image": ragged([1, 2])})
        with pytest.raises(ValueError, match="at least one of the modalities"):
            fusion(when)({})
