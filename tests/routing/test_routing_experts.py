"""The mathematics of mixture_of_experts: forward, gradients, gates, shared expert, missing tokens and experts."""

from types import SimpleNamespace

import pytest
import torch
from routing_oracle import GATED, assert_within_rule, eager_experts, naive_experts, naive_ffn, normal
from routing_providers import use_reference

from mmrec_kernels import library, schemas
from mmrec_kernels.routing import SharedExpert, autograd, mixture_of_experts, reference_experts, route
from mmrec_kernels.routing.reference_experts import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("provider")

T, D, E, F, K = 9, 4, 5, 3, 2


def assignment(tokens=T, k=K, experts=E, seed=0, dtype=torch.float64):
    """Random ids with holes (−1 in any slot), a token without slots, an expert without tokens, a duplicate."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, experts - 1, (tokens, k), generator=generator)
    ids[1] = -1
    ids[2] = 1
    return SimpleNamespace(weights=normal(tokens, k, seed=seed + 10, dtype=dtype).requires_grad_(), experts=ids)


def parameters(activation="swiglu", f=F, seed=20, dtype=torch.float64):
    rows = 2 * f if activation in GATED else f
    shapes = {"w_in": (E, rows, D), "w_out": (E, D, f), "b_in": (E, rows), "b_out": (E, D)}
    return {n: normal(*s, seed=seed + i, dtype=dtype).requires_grad_() for i, (n, s) in enumerate(shapes.items())}


def shared_expert(activation="swiglu", f=F + 1, gate=True):
    rows = 2 * f if activation in GATED else f
    tensors = [normal(rows, D, seed=30), normal(D, f, seed=31), normal(D, seed=32) if gate else None]
    return SharedExpert(*(None if t is None else t.requires_grad_() for t in tensors))


def leaves(x, routing, params, shared=None):
    return [t for t in (x, routing.weights, *params.values(), *(shared or ())) if t is not None]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("save_hidden", [False, True])
def test_equals_the_naive_oracle(activation, biases, save_hidden, monkeypatch):
    """Forward and every gradient, with the pre-activations recomputed and saved."""
    monkeypatch.setattr(autograd, "SAVE_HIDDEN_WIDTH", 1 if save_hidden else 10**9)
    x, routing, params = normal(T, D).requires_grad_(), assignment(), parameters(activation)
    shared = shared_expert(activation, gate=biases)
    if not biases:
        params = {n: p for n, p in params.items() if n[0] == "w"}
    ours = mixture_of_experts(x, routing, **params, activation=activation, shared=shared)
    naive = naive_experts(x, routing.weights, routing.experts, **params, activation=activation, shared=shared)
    torch.testing.assert_close(ours, naive, rtol=1e-12, atol=1e-13)
    inputs, upstream = leaves(x, routing, params, shared), normal(T, D, seed=40)
    mine, oracle = (torch.autograd.grad(out, inputs, upstream) for out in (ours, naive))
    for one, two in zip(mine, oracle, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    x, gates, params = normal(T, D).requires_grad_(), [assignment(), assignment(k=3, seed=3)], parameters(activation)
    shared = shared_expert(activation)
    inputs = [x, *(g.weights for g in gates), *params.values(), *shared]

    def run(x, first, second, w_in, w_out, b_in, b_out, *shared):
        routings = [SimpleNamespace(weights=w, experts=g.experts) for w, g in zip((first, second), gates, strict=True)]
        biases = {"b_in": b_in, "b_out": b_out}
        outs = mixture_of_experts(
            x, routings, w_in, w_out, **biases, activation=activation, shared=SharedExpert(*shared)
        )
        return tuple(outs)

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


def test_gradcheck_through_the_router(provider):
    x, gate, params = normal(T, D).requires_grad_(), normal(E, D, seed=1).requires_grad_(), parameters()

    def run(x, gate, w_in, w_out):
        return mixture_of_experts(x, route(x, gate, 2), w_in, w_out)

    inputs = (x, gate, params["w_in"], params["w_out"])
    assert torch.autograd.gradcheck(run, inputs, fast_mode=provider == "triton")  # the interpreter takes minutes else


def test_only_the_needed_gradients():
    """Each input alone gets the bits that it gets among all."""
    x, routing, params, shared = normal(T, D).requires_grad_(), assignment(), parameters(), shared_expert()
    inputs = leaves(x, routing, params, shared)
    upstream = normal(T, D, seed=40)

    def run(x, weights, w_in, w_out, b_in, b_out, *shared):
        one = SimpleNamespace(weights=weights, experts=routing.experts)
        return mixture_of_experts(x, one, w_in, w_out, b_in=b_in, b_out=b_out, shared=SharedExpert(*shared))

    all_of_them = torch.autograd.grad(run(*inputs), inputs, upstream)
    for i, together in enumerate(all_of_them):
        alone = [t if i == j else t.detach() for j, t in enumerate(inputs)]
        (grad,) = torch.autograd.grad(run(*alone), inputs[i], upstream)
        assert torch.equal(grad, together)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["swiglu", "geglu", "relu2"])
def test_numerics_rule(dtype, activation, provider, monkeypatch):
    interpreted = provider == "triton"  # slowly, and its bfloat16 stores truncate, which is one unit in the last place
    tokens, width, inner, experts, k = (50, 24, 20, 3, 2) if interpreted else (200, 64, 96, 6, 2)
    truncated = torch.finfo(dtype).eps if interpreted and dtype == torch.bfloat16 else 0.0
    rows = 2 * inner if activation in GATED else inner
    raw = [
        normal(tokens, width), normal(tokens, k, seed=1).softmax(1), normal(experts, rows, width, seed=2) / 8,
        normal(experts, width, inner, seed=3) / 10,
    ]  # fmt: skip
    kinds = (dtype, torch.float32, dtype, dtype)
    cast = [t.to(kind).requires_grad_() for t, kind in zip(raw, kinds, strict=True)]
    exact = [t.detach().double().requires_grad_() for t in cast]
    ids = torch.randint(0, experts, (tokens, k), generator=torch.Generator().manual_seed(4))
    upstream = normal(tokens, width, seed=5).to(dtype)

    def ours(x, weights, w_in, w_out):
        one = SimpleNamespace(weights=weights, experts=ids)
        return mixture_of_experts(x, one, w_in, w_out, activation=activation)

    oracle = ours(*exact)
    truth = torch.autograd.grad(oracle, exact, upstream.double())
    eager = eager_experts(cast[0], cast[1], ids, *cast[2:], activation)
    theirs = torch.autograd.grad(eager, cast, upstream)
    for save in (False, True):
        monkeypatch.setattr(autograd, "SAVE_HIDDEN_WIDTH", 1 if save else 10**9)
        out = ours(*cast)
        assert out.dtype == dtype
        assert_within_rule("out", out, eager, oracle, dtype, truncated)
        mine = torch.autograd.grad(out, cast, upstream)
        for name, *triple in zip(("dx", "dweights", "dw_in", "dw_out"), mine, theirs, truth, strict=True):
            assert triple[0].dtype == triple[1].dtype
            assert_within_rule(name, *triple, dtype, truncated)


def test_one_expert_for_all_is_its_network():
    """One expert of weight 1 for all tokens is that network; identity activation is a product of matrices."""
    x, params = normal(T, D), parameters("identity")
    one = SimpleNamespace(weights=torch.ones(T, 1), experts=torch.full((T, 1), 3, dtype=torch.int32))
    out = mixture_of_experts(x, one, params["w_in"], params["w_out"], activation="identity")
    torch.testing.assert_close(out, x @ (params["w_out"][3] @ params["w_in"][3]).T)
    swiglu = parameters("swiglu")
    out = mixture_of_experts(x, one, swiglu["w_in"], swiglu["w_out"])
    rows = [naive_ffn(row, swiglu["w_in"][3], swiglu["w_out"][3], None, None, "swiglu") for row in x]
    torch.testing.assert_close(out, torch.stack(rows))


def test_dense_mode_is_the_recommender_mixture():
    """k = E with a softmax gate: Σ_e p_e FFN_e(x), for every token."""
    x, gate, params = normal(T, D), normal(E, D, seed=1), parameters("relu")
    out = mixture_of_experts(x, route(x, gate, E), **params, activation="relu")
    hidden = torch.relu(torch.einsum("td,efd->tef", x, params["w_in"]) + params["b_in"])
    y = torch.einsum("tef,edf->ted", hidden, params["w_out"]) + params["b_out"]
    torch.testing.assert_close(out, torch.einsum("te,ted->td", (x @ gate.T).softmax(1), y))


def test_a_list_of_routings_shares_one_pass(monkeypatch):
    """G gates with different k: what G calls give, but each (expert, token) pair is computed once."""
    x, params, shared = normal(T, D).requires_grad_(), parameters(), shared_expert()
    gates = [assignment(k=k, seed=k) for k in (1, 2, 4)]
    gates[2].experts = gates[2].experts.int()
    outs = mixture_of_experts(x, gates, **params, shared=shared)
    assert isinstance(outs, list) and [o.shape for o in outs] == [(T, D)] * 3
    alone = [mixture_of_experts(x, g, **params, shared=shared) for g in gates]
    upstream = [normal(T, D, seed=50 + i) for i in range(3)]
    inputs = [x, *(g.weights for g in gates), *params.values(), *shared]
    for one, two in zip(outs, alone, strict=True):
        torch.testing.assert_close(one, two)
    for one, two in zip(*(torch.autograd.grad(o, inputs, upstream) for o in (outs, alone)), strict=True):
        torch.testing.assert_close(one, two)
    (only,) = mixture_of_experts(x, (gates[0],), **params, shared=shared)
    torch.testing.assert_close(only, alone[0])

    use_reference(monkeypatch)
    rows = []
    linear = reference_experts.linear
    monkeypatch.setattr(reference_experts, "linear", lambda a, *w: (rows.append(len(a)), linear(a, *w))[1])
    mixture_of_experts(x.detach(), gates, params["w_in"], params["w_out"])
    pairs = {(t, e) for g in gates for t, row in enumerate(g.experts.tolist()) for e in row if e >= 0}
    assert sum(rows) == 2 * len(pairs)


def test_what_one_gate_does_not_use_stays_out_of_it():
    """An expert that overflows for a token spoils only the gate that sends the token there; same for the gradients."""
    x = normal(2, D)
    params = {n: p.detach().clone() for n, p in parameters().items() if n[0] == "w"}
    params["w_out"][0] = torch.inf
    x.requires_grad_()
    first = SimpleNamespace(weights=torch.ones(2, 1, dtype=torch.float64), experts=torch.tensor([[1], [2]]))
    second = SimpleNamespace(weights=torch.ones(2, 1, dtype=torch.float64), experts=torch.tensor([[0], [-1]]))
    one, two = mixture_of_experts(x, [first, second], **params)
    assert torch.isfinite(one).all() and not torch.isfinite(two[0]).all() and (two[1] == 0).all()
    (grad,) = torch.autograd.grad(two, x, torch.stack([torch.ones(D), torch.full((D,), torch.nan)]).double())
    assert (grad[1] == 0).all()


def test_missing_tokens_and_unused_experts_are_not_read():
    """NaN in tokens without slots, in experts without tokens, in weights and gradients of empty slots."""
    routing, shared = assignment(), shared_expert()
    x, params = normal(T, D), parameters()
    dead = (routing.experts < 0).all(1)
    unused = [e for e in range(E) if not (routing.experts == e).any()]
    assert dead.sum() == 1 and unused
    results = []
    for poison in (False, True):
        rows, weights = x.clone(), routing.weights.detach().clone()
        values = {n: p.detach().clone() for n, p in params.items()}
        upstream = normal(T, D, seed=40)
        if poison:
            rows[dead], upstream[dead] = torch.nan, torch.nan
            weights[routing.experts < 0] = torch.nan
            for value in values.values():
                value[unused] = torch.nan
        inputs = [t.requires_grad_() for t in (rows, weights, *values.values())]
        one = SimpleNamespace(weights=weights, experts=routing.experts)
        out = mixture_of_experts(rows, one, **values, shared=shared)
        results.append((out, *torch.autograd.grad(out, [*inputs, *shared], upstream)))
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)
    out, dx, dweights, dw_in, *_ = results[0]
    assert (out[dead] == 0).all() and (dx[dead] == 0).all() and (dw_in[unused] == 0).all()
    assert (dweights[routing.experts < 0] == 0).all() and (dweights[routing.experts >= 0] != 0).all()


def test_shared_expert():
    x, routing, params = normal(T, D), assignment(), parameters()
    plain = mixture_of_experts(x, routing, **params)
    alive = (routing.experts >= 0).any(1)
    for gate in (False, True):
        shared = shared_expert(gate=gate)
        y = torch.stack([naive_ffn(row, shared.w_in, shared.w_out, None, None, "swiglu") for row in x])
        y = y * torch.sigmoid(x @ shared.gate)[:, None] if gate else y
        out = mixture_of_experts(x, routing, **params, shared=shared)
        torch.testing.assert_close(out - plain, y * alive[:, None])
        if gate:
            linear = SharedExpert(shared.w_in, shared.w_out, shared.gate[None])
            assert torch.equal(out, mixture_of_experts(x, routing, **params, shared=linear))


def test_permuting_splitting_and_duplicating():
    x, routing, params = normal(T, D), assignment(), parameters()
    base = mixture_of_experts(x, routing, **params)
    weights, ids = routing.weights, routing.experts

    def run(x, weights, ids, **values):
        return mixture_of_experts(x, SimpleNamespace(weights=weights, experts=ids), **values)

    tokens = torch.randperm(T, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(run(x[tokens], weights[tokens], ids[tokens], **params), base[tokens])
    torch.testing.assert_close(run(x, weights.flip(1), ids.flip(1), **params), base)
    order = torch.tensor([2, 0, 4, 1, 3])
    renamed = torch.where(ids >= 0, order.argsort()[ids], -1)
    torch.testing.assert_close(run(x, weights, renamed, **{n: p[order] for n, p in params.items()}), base)
    halves = torch.cat([weights * 0.25, weights * 0.75], 1), torch.cat([ids, ids], 1)
    torch.testing.assert_close(run(x, *halves, **params), base)
    padded = torch.cat([weights, torch.full((T, 2), torch.nan)], 1), torch.cat([ids, torch.full((T, 2), -1)], 1)
    assert torch.equal(run(x, *padded, **params), base)
    twice = run(x.repeat(2, 1), weights.repeat(2, 1), ids.repeat(2, 1), **params)
    torch.testing.assert_close(twice, base.repeat(2, 1))
    torch.testing.assert_close(run(x, weights * 3, ids, **params), base * 3)


def test_saved_pre_activations():
    """One row per distinct (expert, token) in that order; the forward's bits do not depend on saving them."""
    x, routing = normal(3, D), SimpleNamespace()
    routing.weights = torch.ones(1, 3, 2, dtype=torch.float64)
    routing.experts = torch.tensor([[[4, 1], [-1, 1], [4, 4]]])
    params, shared = parameters(), shared_expert()
    common = (x, routing.weights, routing.experts, params["w_in"].detach(), params["w_out"].detach(), None, None)
    tail = (*(t.detach() for t in shared), "swiglu")
    out, hidden, shared_hidden = schemas.experts_forward(*common, *tail, True)
    rows = [params["w_in"][e] @ x[t] for e, t in ((1, 0), (1, 1), (4, 0), (4, 2))]
    torch.testing.assert_close(hidden[:4], torch.stack(rows))
    assert hidden.shape == (3 * 2, 2 * F) and shared_hidden.shape == (3, 2 * (F + 1))
    torch.testing.assert_close(shared_hidden, x @ shared.w_in.T)
    again = schemas.experts_forward(*common, *tail, False)
    assert torch.equal(again[0], out) and again[1].shape == again[2].shape == (0,)


def test_wide_tokens_save_and_narrow_ones_recompute(monkeypatch):
    seen, served = [], library.call

    def call(op, *args):
        seen.extend(args[-1:] if op is schemas.experts_forward else ())
        return served(op, *args)

    monkeypatch.setattr(library, "call", call)
    for width in (autograd.SAVE_HIDDEN_WIDTH - 1, autograd.SAVE_HIDDEN_WIDTH):
        x = normal(2, width).requires_grad_()
        one = SimpleNamespace(weights=torch.ones(2, 1), experts=torch.zeros(2, 1, dtype=torch.int64))
        out = mixture_of_experts(x, one, normal(1, 2, width, seed=1), normal(1, width, 1, seed=2))
        out.sum().backward()
        assert x.grad.abs().sum() > 0
    assert seen == [False, True]


def test_bits_do_not_depend_on_requires_grad_and_repeat():
    x, routing = normal(T, D, dtype=torch.float32).requires_grad_(), assignment(dtype=torch.float32)
    params = parameters(dtype=torch.float32)
    with_grad = mixture_of_experts(x, routing, **params)
    with torch.no_grad():
        assert torch.equal(mixture_of_experts(x, routing, **params), with_grad)
    inputs = leaves(x, routing, params)
    grads = [torch.autograd.grad(mixture_of_experts(x, routing, **params).sum(), inputs) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_empty():
    params = parameters()
    for tokens, k in ((0, 2), (3, 0)):
        x = normal(tokens, D).requires_grad_()
        one = SimpleNamespace(weights=normal(tokens, k), experts=torch.zeros(tokens, k, dtype=torch.int64))
        out = mixture_of_experts(x, one, **params, shared=shared_expert())
        assert out.shape == (tokens, D) and (out == 0).all()
        grads = torch.autograd.grad(out.sum(), [x, *params.values()])
        assert all((g == 0).all() for g in grads)
    x, none = normal(3, D), SimpleNamespace(weights=torch.ones(3, 2), experts=torch.full((3, 2), -1))
    assert (mixture_of_experts(x, none, **params, shared=shared_expert()) == 0).all()


def test_strided_inputs_and_gradients():
    routing, params = assignment(), parameters()
    x = normal(D, T).T
    wide = {n: torch.stack([p.detach(), p.detach()], -1)[..., 0] for n, p in params.items()}
    results = []
    for rows, values in ((x, wide), (x.contiguous(), params)):
        leaf = rows.detach().requires_grad_()
        values = {n: p.detach().requires_grad_() for n, p in values.items()}
        one = SimpleNamespace(weights=routing.weights, experts=routing.experts)
        out = mixture_of_experts(leaf, one, **values)
        assert out.is_contiguous()
        results.append((out, *torch.autograd.grad(out.sum(), [leaf, *values.values()])))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-13)
    same = normal(1, D).expand(T, D)
    expanded = mixture_of_experts(same, routing, **params)
    torch.testing.assert_close(expanded, mixture_of_experts(same.contiguous(), routing, **params))


def test_double_backward_raises():
    x, params = normal(T, D).requires_grad_(), parameters()
    out = mixture_of_experts(x, assignment(), **params)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_swaps_into_transformers_without_copies():
    """transformers' Mixtral experts take the same parameters as they are and give the same result and gradients."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(hidden_size=D, intermediate_size=F, num_local_experts=E, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    module = MixtralExperts(config).double()
    for i, parameter in enumerate(module.parameters()):
        parameter.data.copy_(normal(*parameter.shape, seed=i))
    x = normal(T, D).requires_grad_()
    routing = route(x.detach(), normal(E, D, seed=5), 2)
    theirs = module(x, routing.experts.long(), routing.weights)
    ours = mixture_of_experts(x, routing, module.gate_up_proj, module.down_proj)
    torch.testing.assert_close(ours, theirs)
    inputs, upstream = [x, *module.parameters()], normal(T, D, seed=40)
    for one, two in zip(*(torch.autograd.grad(o, inputs, upstream) for o in (ours, theirs)), strict=True):
        torch.testing.assert_close(one, two)
