"""`CrossModalAttention` and `LatentPooler` against item by item, head by head computations."""

from __future__ import annotations

import pytest
import torch
from fusion_helpers import (
    HEADS,
    ITEMS,
    NAMES,
    WIDTH,
    away_from_the_start,
    check_gradients,
    listen,
    nowhere,
    ragged,
    tokens,
)
from torch import Tensor
from torch.nn import functional as F

from mmrec.fusion import CrossModalAttention, LatentPooler, Tokens

HEAD = WIDTH // HEADS
OWN = [2, 1, 3, 2]
WIDTHS = {"text": 6, "image": 10, "table": WIDTH}
EMPTY = torch.zeros(0, WIDTH, dtype=torch.float64)


def block(**options: object) -> CrossModalAttention:
    return away_from_the_start(CrossModalAttention(NAMES, WIDTH, num_heads=HEADS, **options))  # type: ignore


def rows(part: Tokens, item: int) -> Tensor:
    return part.values[part.offsets[item] : part.offsets[item + 1]]


def dense(
    model: CrossModalAttention, x: Tensor, context: dict[str, Tokens], item: int, absent: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One item: its rows `x [L, d]` after the block, and their masses `[L, M]`."""
    normed = model.norm(x)
    kv, owner = [], []
    for m, name in enumerate(NAMES):
        if name in context and (absent is None or not absent[item, m]):
            at = min(m, len(model.key_value) - 1)
            kv.append(model.key_value[at](model.context_norm[at](rows(context[name], item))))
            owner += [m] * len(kv[-1])
    if model.own_key_value is not None:
        kv.append(model.own_key_value(normed))
        owner += [len(NAMES)] * len(x)
    answers, mass = torch.zeros_like(x), torch.zeros(len(x), len(NAMES) + 1).double()
    if owner:
        at = torch.tensor(owner)
        keys, values = torch.cat(kv).view(len(at), 2, model.kv_heads, HEAD).unbind(1)
        bias, gate = torch.zeros(HEADS, len(NAMES) + 1).double(), torch.ones(HEADS, len(NAMES) + 1).double()
        if model.log_bias is not None and model.value_gate is not None:
            bias[:, :-1], gate[:, :-1] = model.log_bias[0], model.value_gate[0]
        query = model.query(normed).view(len(x), HEADS, HEAD)
        heads = []
        for h in range(HEADS):
            of = h * model.kv_heads // HEADS
            norms = (model.query_norm, model.key_norm)
            both = listen(query[:, h], keys[:, of], values[:, of], bias[h, at], gate[h, at], norms)
            heads.append(both[:, :HEAD])
            mass = mass.index_add(1, at, both[:, HEAD:] / HEADS)
        answers = torch.cat(heads, 1) @ model.out.weight.T
    y = x + answers * (1.0 if model.attention_gate is None else model.attention_gate.tanh())
    if model.feed is not None:
        norm, first, _, _, second = model.feed
        inner = F.gelu(F.linear(F.layer_norm(y, (WIDTH,), norm.weight, norm.bias), first.weight, first.bias))
        more = F.linear(inner, second.weight, second.bias)
        y = y + more * (1.0 if model.feed_gate is None else model.feed_gate.tanh())
    return y, mass[:, :-1]


OPTIONS = (
    {},
    {"residual_gate": False, "listens_to_itself": True},
    {"num_kv_heads": 1, "feed_forward": 0, "modality_gates": False},
)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("hide", [False, True])
def test_equals_a_dense_computation(options: dict[str, object], hide: bool) -> None:
    model, context, own = block(**options), tokens(), ragged(OWN)
    absent = torch.tensor([[0, 1, 0], [0, 0, 1], [1, 0, 0], [0, 1, 0]]).bool() if hide else None
    found = model(own.values, own.offsets, context, absent=absent)
    assert found.values.shape == own.values.shape and found.mass.shape == (sum(OWN), len(NAMES))
    for item in range(ITEMS):
        values, mass = dense(model, rows(own, item), context, item, absent)
        torch.testing.assert_close(rows(own._replace(values=found.values), item), values)
        torch.testing.assert_close(rows(own._replace(values=found.mass), item), mass)


@pytest.mark.parametrize("itself", [False, True])
def test_latents_are_as_if_repeated_for_every_item(itself: bool) -> None:
    model, context = block(listens_to_itself=itself), tokens()
    latents = torch.randn(5, WIDTH, dtype=torch.float64)
    shared = model(latents, None, context)
    repeated = model(latents.repeat(ITEMS, 1), torch.arange(ITEMS + 1) * 5, context)
    torch.testing.assert_close(shared, repeated)


def test_modalities_of_other_widths_have_projections_of_their_own() -> None:
    model = away_from_the_start(CrossModalAttention(WIDTHS, WIDTH, num_heads=HEADS))
    context = {name: ragged([1, 0, 2, 3], width) for name, width in WIDTHS.items()}
    own = ragged(OWN)
    found = model(own.values, own.offsets, context).values
    for item in range(ITEMS):
        expected, _ = dense(model, rows(own, item), context, item)
        torch.testing.assert_close(rows(own._replace(values=found), item), expected)


def test_training_starts_with_the_block_as_the_identity() -> None:
    model, own = CrossModalAttention(NAMES, WIDTH, num_heads=HEADS).double(), ragged(OWN)
    values = model(own.values, own.offsets, tokens()).values
    assert torch.equal(values, own.values)
    values.square().sum().backward()
    assert model.attention_gate is not None and model.attention_gate.grad != 0


def test_missing_absent_and_not_given_are_the_same() -> None:
    model, context, own = block(listens_to_itself=True), tokens(), ragged(OWN)
    without = model(own.values, own.offsets, {name: context[name] for name in ("text", "table")})
    absent = torch.tensor([[False, True, False]]).expand(ITEMS, -1)
    for other in (
        model(own.values, own.offsets, {**context, "image": nowhere()}),
        model(own.values, own.offsets, context, absent=absent),
    ):
        assert torch.equal(other.values, without.values) and torch.equal(other.mass, without.mass)


def test_an_item_without_context_keeps_its_tokens() -> None:
    model, own = block(feed_forward=0), ragged(OWN)
    found = model(own.values, own.offsets, tokens())
    assert torch.equal(found.values[-2:], own.values[-2:]) and not found.mass[-2:].any()


@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck(options: dict[str, object]) -> None:
    model, context, own = block(**options), tokens(), ragged(OWN)
    names, parameters = zip(*model.named_parameters(), strict=True)

    def run(x: Tensor, text: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        now = {**context, "text": context["text"]._replace(values=text)}
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x, own.offsets, now))

    check_gradients(run, (own.values, context["text"].values, *parameters))


def test_dropout_is_on_both_branches_in_training_only() -> None:
    own, context = ragged(OWN), tokens()
    for options in ({"feed_forward": 0}, {}):
        model = block(dropout=0.5, **options)
        model.eval()
        assert torch.equal(
            model(own.values, own.offsets, context).values, model(own.values, own.offsets, context).values
        )
        model.train()
        moved = model(own.values, own.offsets, context).values != model(own.values, own.offsets, context).values
        assert moved[:5].any()


@pytest.mark.parametrize("num_layers", [1, 3])
def test_the_latent_pooler_is_layer_upon_layer(num_layers: int) -> None:
    pooler = LatentPooler(NAMES, WIDTH, num_latents=5, num_layers=num_layers, num_heads=HEADS)
    away_from_the_start(pooler)
    given = tokens()
    found = pooler(given)
    assert found.values.shape == (ITEMS, 5, WIDTH) and found.mass.shape == (ITEMS, 5, len(NAMES))
    for item in range(ITEMS):
        x = pooler.latents
        for layer in pooler.layers:
            assert isinstance(layer, CrossModalAttention)
            x, mass = dense(layer, x, given, item)
        torch.testing.assert_close(found.values[item], pooler.norm(x))
        torch.testing.assert_close(found.mass[item], mass)
    assert ((found.mass.sum(2) > 0) & (found.mass.sum(2) < 1))[:3].all() and not found.mass[3].any()


def test_no_items_and_no_tokens() -> None:
    none = {name: Tokens(EMPTY, torch.zeros(1, dtype=torch.int64), torch.zeros(0).long()) for name in NAMES}
    pooled = LatentPooler(NAMES, WIDTH, num_latents=5, num_layers=2, num_heads=HEADS).double()(none)
    assert pooled.values.shape == (0, 5, WIDTH) and pooled.mass.shape == (0, 5, 3)
    found = block()(EMPTY, none["text"].offsets, none)
    assert found.values.shape == (0, WIDTH) and found.mass.shape == (0, 3)


def test_bad_input() -> None:
    own, context = ragged(OWN), tokens()
    with pytest.raises(ValueError, match=r"x must have shape \[T, 8\], got \[8, 4\]"):
        block()(own.values[:, :4], own.offsets, context)
    with pytest.raises(ValueError, match=r"offsets must be \[5\] as the context's, got \[4\]"):
        block()(own.values, own.offsets[:-1], context)
    with pytest.raises(ValueError, match="at least one of the modalities"):
        block()(own.values, own.offsets, {"audio": own})
    with pytest.raises(ValueError, match=r"absent must be bool \[4, 3\]"):
        block()(own.values, own.offsets, context, absent=torch.zeros(4, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="num_heads must be a multiple of num_kv_heads = 3, got 2"):
        block(num_kv_heads=3)
    with pytest.raises(ValueError, match="feed_forward must be ≥ 0, got -1"):
        block(feed_forward=-1)
    with pytest.raises(ValueError, match="num_latents must be ≥ 1, got 0"):
        LatentPooler(NAMES, WIDTH, num_latents=0, num_heads=HEADS)
