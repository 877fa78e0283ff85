"""The mathematics of route: selection, weights, statistics, losses and gradients, sentence by sentence."""

import itertools
import math

import pytest
import torch
from routing_oracle import assert_within_rule, eager_route, naive_route, normal

from mmrec_kernels.routing import route
from mmrec_kernels.routing.router import SCORES

pytestmark = pytest.mark.usefixtures("provider")

T, D, E, M = 13, 5, 6, 3
MODALITY = torch.tensor([0, 1, 2, -1, 1, 0, 0, 1, 2, 1, -1, 0, 1])
ALLOWED = torch.tensor([[1, 1, 0, 1, 0, 1], [0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 0]], dtype=torch.bool)
VALID = torch.tensor([1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1], dtype=torch.bool)
BIAS, BIASES = normal(E, seed=7) * 0.3, normal(M, E, seed=8) * 0.3
BY_MODALITY = {"modality": MODALITY, "num_modalities": M}
CASES = {
    "plain": {},
    "plain, biased": {"bias": BIAS},
    "modality, biased": {**BY_MODALITY, "bias": BIASES},
    "masked": {**BY_MODALITY, "allowed": ALLOWED, "valid": VALID},
    "masked, biased": {**BY_MODALITY, "allowed": ALLOWED, "valid": VALID, "bias": BIASES},
}


def inputs(dtype=torch.float64, tokens=T):
    return normal(tokens, D, dtype=dtype).requires_grad_(), normal(E, D, seed=1, dtype=dtype).requires_grad_()


def stacked(routing):
    return torch.stack(list(routing.losses))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_naive_oracle(score, renormalize, case):
    """Forward and both gradients, of every output at once, for k from 1 to beyond E."""
    kwargs = {**CASES[case], "score": score, "renormalize": renormalize}
    for k in (2, E + 2) if renormalize else (1, 3):
        x, gate = inputs()
        ours, naive = route(x, gate, k, **kwargs), naive_route(x, gate, k, **kwargs)
        assert torch.equal(ours.experts, naive.experts)
        torch.testing.assert_close(ours.weights, naive.weights, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(ours.stats, naive.stats, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(stacked(ours), naive.losses, rtol=1e-12, atol=1e-13)
        upstream = normal(T, k, seed=2), normal(4, naive.losses.shape[1], seed=3)
        grads = [
            torch.autograd.grad([r.weights, losses], (x, gate), upstream)
            for r, losses in ((ours, stacked(ours)), (naive, naive.losses))
        ]
        for mine, oracle in zip(*grads, strict=True):
            torch.testing.assert_close(mine, oracle, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("score,k", list(itertools.product(SCORES, [1, 3, E])))
def test_gradcheck(score, k, provider):
    x, gate = inputs()

    def run(x, gate, renormalize):
        masks = {"modality": MODALITY, "allowed": ALLOWED, "valid": VALID}
        routing = route(x, gate, k, **masks, score=score, renormalize=renormalize)
        return routing.weights, *routing.losses

    fast = provider == "triton" or k != 3  # the interpreter takes minutes for the whole Jacobian
    for renormalize in (False, k > 1):
        assert torch.autograd.gradcheck(lambda x, gate, r=renormalize: run(x, gate, r), (x, gate), fast_mode=fast)


def test_only_the_needed_gradient_and_either_output():
    x, gate = inputs()
    for first, second in ((x, gate.detach()), (x.detach(), gate)):
        for pick in (lambda r: r.weights[:, 0].sum(), lambda r: r.losses.z.sum()):
            leaf = first if first.requires_grad else second
            (alone,) = torch.autograd.grad(pick(route(first, second, 2)), leaf)
            both = torch.autograd.grad(pick(route(x, gate, 2)), (x, gate))
            assert torch.equal(alone, both[0] if leaf is x else both[1])


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numerics_rule(score, dtype):
    """Error at most twice that of eager torch in the same dtype, for weights and both gradients."""
    tokens, width, experts, k = 300, 64, 8, 2
    x, gate = normal(tokens, width).to(dtype), (normal(experts, width, seed=1) / 8).to(dtype)
    upstream = normal(tokens, k, seed=2, dtype=torch.float32)
    logits = x.double() @ gate.double().T
    top = (logits.float().to(dtype) if dtype == torch.bfloat16 else logits).topk(k + 1).values
    clear = (top[:, :-1] - top[:, 1:]).min(1).values > 1e-2 * top.abs().max()  # eager too must select the same
    x, upstream = x[clear].requires_grad_(), upstream[clear]
    gate.requires_grad_()
    assert len(x) > 100
    ours = route(x, gate, k, score=score)
    exact = x.detach().double().requires_grad_(), gate.detach().double().requires_grad_()
    oracle = route(*exact, k, score=score)
    eager = eager_route(x, gate, k, score, renormalize=True)
    assert torch.equal(ours.experts, oracle.experts)
    assert_within_rule("weights", ours.weights, eager, oracle.weights, dtype)
    mine = torch.autograd.grad(ours.weights, (x, gate), upstream)
    theirs = torch.autograd.grad(eager, (x, gate), upstream.to(dtype))
    truth = torch.autograd.grad(oracle.weights, exact, upstream.double())
    for name, *triple in zip(("dx", "dgate"), mine, theirs, truth, strict=True):
        assert_within_rule(name, *triple, dtype)


def test_dtypes():
    for dtype, wide in (
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
    ):
        x, gate = inputs(dtype)
        routing = route(x, gate, 2)
        assert routing.weights.dtype == routing.stats.dtype == routing.losses.balance.dtype == wide
        assert routing.experts.dtype == torch.int32
        routing.weights[:, 0].sum().backward()
        assert x.grad.dtype == gate.grad.dtype == dtype
    x, gate = inputs(torch.bfloat16)[0], inputs(torch.float32)[1]
    routing = route(x, gate, 2, renormalize=False)
    torch.testing.assert_close(routing.weights, route(x.float(), gate, 2, renormalize=False).weights, rtol=0, atol=0)
    routing.weights.sum().backward()
    assert x.grad.dtype == torch.bfloat16 and gate.grad.dtype == torch.float32


@pytest.mark.parametrize("score", SCORES)
def test_ties_go_to_the_lower_id(score):
    """Small integers: equal logits are equal in every dtype."""
    gate = torch.tensor([[1.0], [2.0], [2.0], [1.0], [2.0]])
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        experts = route(torch.ones(2, 1, dtype=dtype), gate.to(dtype), 5, score=score).experts
        assert experts.tolist() == [[1, 2, 4, 0, 3]] * 2
    many = route(torch.ones(3, 1), torch.ones(100, 1), 60, score=score)
    assert many.experts.tolist() == [list(range(60))] * 3
    tied = route(torch.ones(1, 1), gate, 3, score=score, bias=torch.tensor([0.0, 0.0, 0.0, 50.0, 0.0]))
    assert tied.experts.tolist() == [[3, 1, 2]]


@pytest.mark.parametrize("score", SCORES)
def test_order_survives_scores_that_underflow_or_saturate(score):
    gate = torch.tensor([[-500.0], [-400.0], [900.0], [800.0]])
    routing = route(torch.ones(1, 1), gate, 4, score=score)
    assert routing.experts.tolist() == [[2, 3, 1, 0]]
    assert torch.isfinite(routing.weights).all()
    low = route(-torch.ones(1, 1), gate.abs(), 2, score="sigmoid", renormalize=True)
    torch.testing.assert_close(low.weights, torch.tensor([[1.0, 0.0]]))
    assert low.experts.tolist() == [[1, 0]]


def test_bias_selects_and_does_nothing_else():
    x, gate = inputs()
    bias = torch.tensor([0.0, 99.0, 0.0, 99.0, 0.0, 0.0], dtype=torch.float64, requires_grad=True)
    for score in SCORES:
        routing = route(x, gate, 2, score=score, renormalize=False, bias=bias)
        assert {tuple(sorted(row)) for row in routing.experts.tolist()} == {(1, 3)}
        logits = x @ gate.T
        p = {"softmax": logits.softmax(1), "topk_softmax": None, "sigmoid": logits.sigmoid()}[score]
        want = logits[:, [1, 3]].softmax(1) if p is None else p[:, [1, 3]]
        torch.testing.assert_close(routing.weights.sort(1).values, want.sort(1).values)
        for mine, other in zip(routing.losses[1:], route(x, gate, 2, score=score).losses[1:], strict=True):
            torch.testing.assert_close(mine, other)
        (unused,) = torch.autograd.grad(routing.weights.sum() + routing.losses.z.sum(), bias, allow_unused=True)
        assert unused is None
    zero = torch.zeros(E, dtype=torch.float64)
    assert torch.equal(route(x, gate, 2, bias=zero).experts, route(x, gate, 2).experts)
    one = route(x, gate, 1, bias=torch.full((E,), -torch.inf).index_fill(0, torch.tensor([4]), 0))
    assert set(one.experts.flatten().tolist()) == {4}


def test_slots_beyond_the_allowed_experts():
    x, gate = inputs()
    routing = route(x, gate, 4, modality=MODALITY, allowed=ALLOWED)
    for t, m in enumerate(MODALITY.tolist()):
        few = 0 if m < 0 else min(4, int(ALLOWED[m].sum()))
        assert (routing.experts[t, :few] >= 0).all() and (routing.experts[t, few:] == -1).all()
        assert (routing.weights[t, few:] == 0).all()
        assert all(bool(ALLOWED[m, e]) for e in routing.experts[t, :few].tolist())


def test_tokens_that_are_not_routed(provider):
    """Modality −1, valid 0 and no allowed expert: −1 everywhere, no gradient, out of every sum."""
    x, gate = inputs()
    allowed = ALLOWED.clone()
    allowed[2] = False
    routing = route(x, gate, 2, modality=MODALITY, allowed=allowed, valid=VALID)
    dead = (MODALITY == -1) | ~VALID | (MODALITY == 2)
    assert (routing.experts[dead] == -1).all() and (routing.weights[dead] == 0).all()
    assert (routing.experts[~dead, 0] >= 0).all()
    assert (routing.stats[2] == 0).all() and (stacked(routing)[:, 2] == 0).all()
    dx, dgate = torch.autograd.grad(routing.weights[:, 0].sum() + stacked(routing).sum(), (x, gate))
    assert (dx[dead] == 0).all() and (dx[~dead] != 0).any(1).all()
    live = (~dead).nonzero()[:, 0]
    alone = route(x[live], gate, 2, modality=MODALITY[live], allowed=allowed)
    assert torch.equal(alone.weights, routing.weights[live])
    if provider == "triton":  # sums go tile by tile, and which tokens share one has changed
        torch.testing.assert_close(alone.stats, routing.stats, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(stacked(alone), stacked(routing), rtol=1e-14, atol=1e-14)
    else:
        assert torch.equal(alone.stats, routing.stats) and torch.equal(stacked(alone), stacked(routing))
    for valid in (VALID.int(), VALID.long() * 3, VALID.to(torch.uint8)):
        assert torch.equal(route(x, gate, 2, valid=valid).experts, route(x, gate, 2, valid=VALID).experts)
    nobody = route(x, gate, 2, valid=torch.zeros(T, dtype=torch.bool))
    grads = torch.autograd.grad(nobody.weights.sum() + stacked(nobody).sum(), (x, gate))
    assert all((g == 0).all() for g in grads) and (nobody.experts == -1).all()


def test_unreferenced_memory_is_not_read():
    """NaN in rows of absent tokens and of experts that a modality may not use changes nothing, gradients included."""
    clean = inputs()
    dead = (MODALITY == -1) | ~VALID
    allowed = ALLOWED.clone()
    allowed[:, 2] = False
    x, gate = (leaf.detach().clone() for leaf in clean)
    x[dead], gate[2] = torch.nan, torch.nan
    results = []
    for pair in (clean, (x.requires_grad_(), gate.requires_grad_())):
        routing = route(*pair, 3, modality=MODALITY, allowed=allowed, valid=VALID, bias=normal(E, seed=5))
        upstream = normal(T, 3, seed=2).masked_fill(routing.experts < 0, torch.nan)
        grads = torch.autograd.grad([routing.weights, stacked(routing)], pair, [upstream, normal(4, M, seed=3)])
        results.append((routing.weights, routing.experts, routing.stats, stacked(routing), *grads))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_expert_row_poisoned_for_other_modalities():
    """Expert 0 is NaN and allowed for modality 0 only: the others keep every bit, gradients of x included."""
    x, gate = inputs()
    bad = gate.detach().clone()
    bad[0] = torch.nan
    others = (MODALITY == 1) | (MODALITY == 2)
    clean = route(x, gate, 2, modality=MODALITY, allowed=ALLOWED)
    poisoned = route(x, bad, 2, modality=MODALITY, allowed=ALLOWED)
    assert torch.equal(clean.weights[others], poisoned.weights[others])
    assert torch.equal(stacked(clean)[:, 1:], stacked(poisoned)[:, 1:])
    assert torch.equal(clean.stats[1:], poisoned.stats[1:])
    (one,) = torch.autograd.grad(clean.weights[:, 0].sum(), x)
    (two,) = torch.autograd.grad(poisoned.weights[:, 0].sum(), x)
    assert torch.equal(one[others], two[others])


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("renormalize", [False, True])
def test_a_nan_logit_spoils_one_token(score, renormalize):
    x, gate = inputs()
    bad = x.detach().clone()
    bad[4, 2] = torch.nan
    bad.requires_grad_()
    ours, clean = (route(v, gate, 3, score=score, renormalize=renormalize) for v in (bad, x))
    assert ours.weights[4].isnan().all()
    others = torch.arange(T) != 4
    assert torch.equal(ours.weights[others], clean.weights[others])
    assert torch.equal(ours.experts[others], clean.experts[others])
    assert len(set(ours.experts[4].tolist())) == 3 and bool((ours.experts[4] >= 0).all())
    (grad,) = torch.autograd.grad(ours.weights[:, 0].sum(), bad)
    assert grad[4].isnan().all() and torch.isfinite(grad[others]).all()
    column = torch.tensor([[1.0], [torch.nan], [2.0]])
    assert route(torch.ones(1, 1), column, 2, score=score, renormalize=renormalize).weights.isnan().all()


def test_renormalize_default_and_warning():
    x, gate = inputs()
    for score in ("softmax", "sigmoid"):
        default = route(x, gate, 1, score=score)
        assert torch.equal(default.weights, route(x, gate, 1, score=score, renormalize=False).weights)
        assert (default.weights < 1).all()
        two = route(x, gate, 2, score=score).weights
        assert torch.equal(two, route(x, gate, 2, score=score, renormalize=True).weights)
        torch.testing.assert_close(two.sum(1), torch.ones(T, dtype=torch.float64))
        with pytest.warns(UserWarning, match="renormalize=True with k=1"):
            routing = route(x, gate, 1, score=score, renormalize=True)
        assert (routing.weights == 1).all()
    both = (route(x, gate, 3, score="topk_softmax", renormalize=r).weights for r in (True, False))
    assert torch.equal(*both)


def test_number_of_modalities():
    """num_modalities, else the rows of allowed, else of a 2-d bias, else 1 without modality."""
    x, gate = inputs()
    assert route(x, gate, 2).stats.shape == (1, E, 3)
    assert route(x, gate, 2, num_modalities=5, modality=MODALITY).stats.shape == (5, E, 3)
    assert route(x, gate, 2, modality=MODALITY, allowed=ALLOWED).stats.shape == (M, E, 3)
    assert route(x, gate, 2, modality=MODALITY, bias=normal(4, E)).stats.shape == (4, E, 3)
    assert route(x, gate, 2, allowed=ALLOWED[:1], bias=normal(E)).stats.shape == (1, E, 3)
    with pytest.raises(ValueError, match="num_modalities must be given"):
        route(x, gate, 2, modality=MODALITY, bias=normal(E))


def test_statistics_are_detached_sums():
    x, gate = inputs()
    routing = route(x, gate, 2, modality=MODALITY, allowed=ALLOWED)
    assert not routing.stats.requires_grad and not routing.experts.requires_grad and routing.weights.requires_grad
    routed = (MODALITY >= 0).sum()
    assert routing.stats[:, :, 0].sum() == sum(2 if m < 2 else 1 for m in MODALITY.tolist() if m >= 0)
    torch.testing.assert_close(routing.stats[:, :, 1].sum(), routed.double())
    torch.testing.assert_close(routing.stats[:, :, 2].sum(), routing.weights.detach().sum())


def test_losses_of_known_routers():
    """Uniform: balance 1, z log²E, both entropies log E. One expert for all: balance → E, global entropy → 0."""
    x = torch.ones(7, 1, dtype=torch.float64)
    uniform = route(x, torch.zeros(E, 1, dtype=torch.float64), 2).losses
    torch.testing.assert_close(stacked_one(uniform), [1.0, math.log(E) ** 2, math.log(E), math.log(E)])
    gate = torch.tensor([[60.0]] + [[0.0]] * (E - 1), dtype=torch.float64)
    torch.testing.assert_close(stacked_one(route(x, gate, 1).losses), [float(E), 3600.0, 0.0, 0.0])
    spread = route(torch.eye(E, dtype=torch.float64) * 60, torch.eye(E, dtype=torch.float64), 1).losses
    torch.testing.assert_close(stacked_one(spread), [1.0, 3600.0, 0.0, math.log(E)])


def stacked_one(losses):
    return [float(v) for v in losses]


def test_entropy_gradient_is_finite_where_a_mean_underflows():
    x = torch.ones(3, 1, requires_grad=True)
    gate = torch.tensor([[0.0], [-300.0]], requires_grad=True)
    losses = route(x, gate, 1).losses
    grads = torch.autograd.grad(sum(losses).sum(), (x, gate))
    assert all(torch.isfinite(g).all() for g in grads)


def test_switch_balance_loss():
    """k = 1, one modality: the Switch formula over a full softmax, which is taken once."""
    x, gate = inputs()
    p = (x @ gate.T).softmax(1)
    fraction = torch.nn.functional.one_hot(p.argmax(1), E).double().mean(0)
    torch.testing.assert_close(route(x, gate, 1).losses.balance, (E * (fraction * p.mean(0)).sum())[None])


def test_permuting_tokens_and_experts():
    x, gate = inputs()
    kwargs = {"modality": MODALITY, "allowed": ALLOWED, "bias": BIASES}
    base = route(x, gate, 3, **kwargs)
    tokens, order = torch.randperm(T, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 0, 5, 1, 4, 2])
    moved = route(x[tokens], gate, 3, **{**kwargs, "modality": MODALITY[tokens]})
    assert torch.equal(moved.experts, base.experts[tokens])
    torch.testing.assert_close(moved.weights, base.weights[tokens])
    torch.testing.assert_close(stacked(moved), stacked(base))
    renamed = route(x, gate[order], 3, modality=MODALITY, allowed=ALLOWED[:, order], bias=BIASES[:, order])
    back = torch.where(renamed.experts >= 0, order[renamed.experts.long()], -1)
    assert torch.equal(back.int(), base.experts)
    torch.testing.assert_close(renamed.stats, base.stats[:, order])
    torch.testing.assert_close(stacked(renamed), stacked(base))


def test_padding_duplicating_splitting_and_shifting():
    x, gate = inputs()
    base = route(x, gate, 2, modality=MODALITY, allowed=ALLOWED)
    padded = route(
        torch.cat([x, torch.full((4, D), torch.nan, dtype=torch.float64)]), gate, 2,
        modality=torch.cat([MODALITY, torch.tensor([0, 1, 2, -1])]), allowed=ALLOWED,
        valid=torch.cat([torch.ones(T), torch.zeros(4)]).bool(),
    )  # fmt: skip
    assert torch.equal(padded.weights[:T], base.weights) and torch.equal(stacked(padded), stacked(base))
    twice = route(torch.cat([x, x]), gate, 2, modality=MODALITY.repeat(2), allowed=ALLOWED)
    torch.testing.assert_close(twice.stats, base.stats * 2)
    torch.testing.assert_close(stacked(twice), stacked(base))
    for m in range(M):
        rows = MODALITY == m
        alone = route(x[rows], gate[ALLOWED[m]], 2)
        k = alone.experts.shape[1]
        used = alone.experts >= 0
        assert torch.equal(
            ALLOWED[m].nonzero()[:, 0][alone.experts[used].long()].int(), base.experts[rows][:, :k][used]
        )
        torch.testing.assert_close(alone.weights, base.weights[rows])
        torch.testing.assert_close(stacked(alone)[:, 0], stacked(base)[:, m])
    ones = torch.ones(T, 1, dtype=torch.float64)
    shift = torch.full((E, 1), 3.7, dtype=torch.float64)
    shifted = route(torch.cat([x, ones], 1), torch.cat([gate, shift], 1), 2, modality=MODALITY, allowed=ALLOWED)
    torch.testing.assert_close(shifted.weights, base.weights)
    torch.testing.assert_close(stacked(shifted)[2:], stacked(base)[2:])


def test_empty_and_tiny():
    x, gate = inputs(tokens=0)
    routing = route(x, gate, 2)
    assert routing.weights.shape == routing.experts.shape == (0, 2)
    assert (routing.stats == 0).all() and (stacked(routing) == 0).all()
    grads = torch.autograd.grad(routing.weights.sum() + stacked(routing).sum(), (x, gate))
    assert grads[0].shape == (0, D) and (grads[1] == 0).all()
    x, gate = inputs(tokens=1)
    one = route(x, gate[:1], 3)
    assert one.weights.tolist() == [[1, 0, 0]] and one.experts.tolist() == [[0, -1, -1]]
    flat = route(torch.zeros(2, 0), torch.zeros(3, 0), 2)
    assert flat.experts.tolist() == [[0, 1]] * 2


def test_strided_inputs_and_gradients():
    """Non-contiguous and expanded inputs, and the stride-0 gradient of sum(), give what contiguous ones give."""
    x, gate = inputs()
    wide, tall = normal(D, T).T, normal(E, 2 * D, seed=1)[:, ::2]
    for one, two in ((wide, tall), (x[:1].detach().expand(T, D), gate.detach())):
        results = []
        for a, b in ((one, two), (one.contiguous(), two.contiguous())):
            a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
            routing = route(a, b, 2, renormalize=False, modality=MODALITY, allowed=ALLOWED)
            (routing.weights.sum() + routing.losses.z.sum()).backward()
            results.append((routing.weights, a.grad, b.grad))
            assert routing.weights.is_contiguous() and routing.experts.is_contiguous()
        for p, q in zip(*results, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


def test_bits_do_not_depend_on_requires_grad_and_repeat():
    x, gate = inputs(torch.float32)
    with_grad = route(x, gate, 2, modality=MODALITY, allowed=ALLOWED)
    with torch.no_grad():
        without = route(x, gate, 2, modality=MODALITY, allowed=ALLOWED)
    assert not without.weights.requires_grad and not without.losses.z.requires_grad
    assert torch.equal(with_grad.weights, without.weights) and torch.equal(stacked(with_grad), stacked(without))
    grads = [torch.autograd.grad(route(x, gate, 2).losses.z.sum(), (x, gate)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_double_backward_raises():
    x, gate = inputs()
    (grad,) = torch.autograd.grad(route(x, gate, 2).losses.z.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
