"""Naive oracles of the routing tests: the contract's sentences, one token, expert and slot at a time, in float64.

They are differentiable through plain autograd, so the gradients that they give are independent too.
"""

import math
from types import SimpleNamespace

import torch
from torch.nn import functional

FLOORS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 3e-5}
UNARY = {
    "silu": lambda h: h * torch.sigmoid(h),
    "gelu": lambda h: h * 0.5 * (1 + torch.erf(h / math.sqrt(2))),
    "relu": lambda h: torch.clamp(h, min=0),
    "relu2": lambda h: torch.clamp(h, min=0) ** 2,
    "identity": lambda h: h,
}
GATED = {"swiglu": "silu", "geglu": "gelu"}


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def naive_route(
    x,
    gate,
    k,
    *,
    modality=None,
    num_modalities=1,
    allowed=None,
    score="softmax",
    renormalize=None,
    bias=None,
    valid=None,
):
    """weights [T, k] and losses [4, M] (float64, differentiable), experts and stats as lists."""
    num_tokens, num_experts = x.shape[0], gate.shape[0]
    renormalize = k > 1 if renormalize is None else renormalize
    zero = x.new_zeros(())
    weights = [[zero] * k for _ in range(num_tokens)]
    experts = [[-1] * k for _ in range(num_tokens)]
    stats = torch.zeros(num_modalities, num_experts, 3, dtype=torch.float64)
    losses = []
    for m in range(num_modalities):
        choices = [e for e in range(num_experts) if allowed is None or bool(allowed[m, e])]
        tokens = [
            t for t in range(num_tokens)
            if (modality is None or int(modality[t]) == m) and (valid is None or bool(valid[t]))
        ]  # fmt: skip
        if not choices or not tokens:
            losses.append([zero] * 4)
            continue
        p_bars, lses = [], []
        for t in tokens:
            logits = {e: x[t] @ gate[e] for e in choices}
            lses.append(torch.log(sum(torch.exp(v) for v in logits.values())))
            soft = {e: torch.exp(v - lses[-1]) for e, v in logits.items()}
            sigmoid = {e: 1 / (1 + torch.exp(-v)) for e, v in logits.items()}
            p = {"softmax": soft, "topk_softmax": logits, "sigmoid": sigmoid}[score]
            shift = {e: 0.0 if bias is None else float(bias[m, e] if bias.ndim == 2 else bias[e]) for e in choices}
            chosen = sorted(choices, key=lambda e: (-(float(p[e].detach()) + shift[e]), e))[:k]
            value = soft if score == "topk_softmax" else p
            total = sum(value[e] for e in chosen) if renormalize or score == "topk_softmax" else 1.0
            p_bar = {e: sigmoid[e] / sum(sigmoid.values()) for e in choices} if score == "sigmoid" else soft
            p_bars.append(torch.stack([p_bar[e] for e in choices]))
            for s, e in enumerate(chosen):
                weights[t][s], experts[t][s] = value[e] / total, e
                stats[m, e, 0] += 1
                stats[m, e, 2] += float(weights[t][s].detach())
            for e in choices:
                stats[m, e, 1] += float(p_bar[e].detach())
        mean = torch.stack(p_bars).mean(0)
        count = stats[m, choices, 0]
        losses.append(
            [
                len(choices) * (count / count.sum() * mean).sum(),
                sum(v**2 for v in lses) / len(tokens),
                sum(-(p * p.log()).sum() for p in p_bars) / len(tokens),
                -(mean * mean.log()).sum(),
            ]
        )
    return SimpleNamespace(
        weights=torch.stack([torch.stack(row) for row in weights]) if num_tokens else x.new_zeros(0, k),
        experts=torch.tensor(experts, dtype=torch.int32).reshape(num_tokens, k),
        stats=stats,
        losses=torch.stack([torch.stack(row) for row in losses]).T,
    )


def naive_ffn(x, w_in, w_out, b_in, b_out, activation):
    h = w_in @ x + (0 if b_in is None else b_in)
    if activation in GATED:
        f = w_in.shape[0] // 2
        a = UNARY[GATED[activation]](h[:f]) * h[f:]
    else:
        a = UNARY[activation](h)
    return w_out @ a + (0 if b_out is None else b_out)


def naive_experts(x, weights, experts, w_in, w_out, b_in=None, b_out=None, activation="swiglu", shared=None):
    """[T, d], token by token and slot by slot."""
    rows = []
    for t in range(x.shape[0]):
        row = torch.zeros_like(x[t])
        for s in range(experts.shape[1]):
            e = int(experts[t, s])
            if e >= 0:
                biases = (None if b is None else b[e] for b in (b_in, b_out))
                row = row + weights[t, s] * naive_ffn(x[t], w_in[e], w_out[e], *biases, activation)
        if shared is not None and bool((experts[t] >= 0).any()):
            s_in, s_out, gate = shared
            y = naive_ffn(x[t], s_in, s_out, None, None, activation)
            row = row + y * (1 if gate is None else torch.sigmoid(gate.flatten() @ x[t]))
        rows.append(row)
    return torch.stack(rows)


def eager_route(x, gate, k, score, renormalize):
    """What a model writes in its own dtype: the peer of the numerics rule."""
    logits = x @ gate.T
    if score == "topk_softmax":
        return logits.topk(k, dim=-1).values.softmax(-1)
    p = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    weights = p.topk(k, dim=-1).values
    return weights / weights.sum(-1, keepdim=True) if renormalize else weights


def eager_experts(x, weights, experts, w_in, w_out, activation="swiglu"):
    """transformers' eager loop over experts, in the model's dtype."""
    out = torch.zeros_like(x)
    for e in range(w_in.shape[0]):
        tokens, slots = (experts == e).nonzero(as_tuple=True)
        h = functional.linear(x[tokens], w_in[e])
        if activation in GATED:
            gate, up = h.chunk(2, dim=-1)
            a = getattr(functional, GATED[activation])(gate) * up
        else:
            a = UNARY[activation](h)
        out = out.index_add(0, tokens, functional.linear(a, w_out[e]) * weights[tokens, slots, None].to(x.dtype))
    return out


def errors(actual, oracle):
    """Maximum and 2-norm of the error, scaled by those of the oracle."""
    difference = actual.detach().double() - oracle.detach()
    top, norm = oracle.detach().abs().max(), oracle.detach().norm()
    return torch.stack([difference.abs().max() / top, difference.norm() / norm])


def assert_within_rule(name, ours, eager, oracle, dtype, more=0.0):
    """The rule of numerics: at most twice the error of eager torch in the same dtype, plus a floor (and `more`)."""
    mine, theirs = errors(ours, oracle), errors(eager, oracle)
    assert bool((mine <= 2 * theirs + FLOORS[dtype] + more).all()), (
        f"{name}: {mine.tolist()} against eager {theirs.tolist()}"
    )
