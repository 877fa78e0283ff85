"""`route` alone beside plain torch: the gate, masked scores, top-k, statistics and all four losses of three modalities.

In `full` the objective weighs the routing weights and all losses. The gate's product alone is a yardstick.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear, one_hot

from .. import schemas
from ..routing import route
from .case import Call, Case, Inputs, Provider, Work, against, by_candidate, generator, leaf, our_name, torch_dtype

MODALITIES = 3
_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


def case(shape: dict[str, int], dtype: str, device: str, mode: str, candidates: bool = False) -> Case:
    """The case of `shape`: tokens read once, weights and ids written; the gradient of the tokens written once. With
    `candidates` also by the CUDA C++ kernel that does not serve yet."""
    tokens, width, experts, k = shape.values()
    rows, results, product = tokens * width * _SIZES[dtype], 8 * tokens * k, 2 * tokens * width * experts
    work = {
        "forward": Work(product, rows, results),
        "backward": Work(3 * product, rows, rows),
        "full": Work(4 * product, rows, rows + results),
    }[mode]
    small = Provider("mmrec (CUDA C++, one launch)", ours_in_one_launch, ours=True)
    return Case(
        "routing",
        shape,
        dtype,
        device,
        mode,
        work,
        (
            Provider(our_name("_routing_forward", device), _ours, ours=True),
            *((small,) if candidates and mode == "forward" and tokens <= 4096 and experts <= 64 else ()),
            Provider("torch", _torch),
            Provider("torch.compile", _compiled),
            Provider("torch, the gate's product alone", _gate, yardstick=True),
        ),
        inputs=lambda: inputs(shape, dtype, device),
        judge=lambda given: against(_oracle(given, mode)),
        compute_dtype=torch_dtype(dtype),
    )


def inputs(shape: dict[str, int], dtype: str, device: str) -> Inputs:
    """Normal tokens; modality m may not use expert m, where there are more experts than modalities."""
    random = generator(device)
    tokens, width, experts, k = shape.values()
    allowed = torch.ones(MODALITIES, experts, dtype=torch.bool, device=device)
    if experts > MODALITIES:
        allowed[range(MODALITIES), range(MODALITIES)] = False
    return {
        "x": torch.randn(tokens, width, generator=random, device=device).to(torch_dtype(dtype)),
        "gate": (width**-0.5 * torch.randn(experts, width, generator=random, device=device)).to(torch_dtype(dtype)),
        "modality": torch.randint(MODALITIES, (tokens,), generator=random, device=device),
        "allowed": allowed,
        "k": k,
        "grad": torch.randn(tokens, k, generator=random, device=device) / tokens,
    }


Route = Callable[[Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]


def _kernel(x: Tensor, gate: Tensor, modality: Tensor, allowed: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    routing = route(x, gate, k, modality=modality, allowed=allowed)
    return routing.weights, routing.stats, torch.stack(tuple(routing.losses))


def _plain(x: Tensor, gate: Tensor, modality: Tensor, allowed: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    usable = allowed[modality]
    logits = linear(x.float(), gate.float()).masked_fill(~usable, -torch.inf)
    p = logits.softmax(1)
    weights, experts = p.topk(k)
    weights = weights / weights.sum(1, keepdim=True)
    of = one_hot(modality, len(allowed)).to(p.dtype)  # [T, M]
    tokens = of.sum(0)
    count = of.T @ torch.zeros_like(p).scatter_(1, experts, 1.0)
    mean = of.T @ p / tokens[:, None]
    share = of.T @ torch.zeros_like(p).scatter(1, experts, weights.detach())
    balance = allowed.sum(1) * (count / count.sum(1, keepdim=True) * mean).sum(1)
    z = of.T @ logits.logsumexp(1).square() / tokens
    local = of.T @ -(p * p.clamp_min(1e-30).log()).sum(1) / tokens  # entr has no gradient where a mask makes p 0
    stats = torch.stack([count, (mean * tokens[:, None]).detach(), share], 2)
    return weights, stats, torch.stack([balance, z, local, -(mean * mean.clamp_min(1e-30).log()).sum(1)])


def _call(function: Route, given: Inputs, mode: str, dtype: torch.dtype | None = None) -> Call:
    x, gate = leaves = [leaf(given[name], dtype) for name in ("x", "gate")]
    rest = given["modality"], given["allowed"], given["k"]
    grad = given["grad"] if dtype is None else given["grad"].to(dtype)

    def objective() -> Tensor:
        weights, _, losses = function(x, gate, *rest)
        return (weights * grad).sum() + 0.01 * losses.sum()

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return function(x, gate, *rest)

    if mode == "forward":
        return forward
    if mode == "full":
        return lambda: torch.autograd.grad(objective(), leaves)
    kept = objective()
    return lambda: torch.autograd.grad(kept, leaves, retain_graph=True)


def _ours(given: Inputs, mode: str) -> Call:
    return _call(_kernel, given, mode)


def ours_in_one_launch(given: Inputs, mode: str) -> Call:
    """By the CUDA C++ kernel for few tokens, which also makes the experts' plan."""
    return by_candidate(lambda *args: schemas.routing_forward_small(*args)[:4], _call(_kernel, given, mode))


def _torch(given: Inputs, mode: str) -> Call:
    return _call(_plain, given, mode)


def _compiled(given: Inputs, mode: str) -> Call:
    torch._dynamo.reset()  # or shapes become dynamic from the second one on
    return _call(torch.compile(_plain, fullgraph=True), given, mode)


def _gate(given: Inputs, mode: str) -> Call:
    """x Wᵀ, and in the other modes dl W and dlᵀ x for some dl."""
    x, gate = given["x"], given["gate"]
    logits = torch.mm(x, gate.T)
    products = {
        "forward": lambda: torch.mm(x, gate.T),
        "backward": lambda: (torch.mm(logits, gate), torch.mm(logits.T, x)),
        "full": lambda: (torch.mm(x, gate.T), torch.mm(logits, gate), torch.mm(logits.T, x)),
    }
    return products[mode]


def _oracle(given: Inputs, mode: str) -> Sequence[Tensor]:
    wide = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in given.items()}
    return _call(_kernel, wide, mode, torch.float64)()
