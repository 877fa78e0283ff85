"""What route and mixture_of_experts take and refuse, and how they behave inside torch: compile, opcheck, autocast."""

from types import SimpleNamespace

import pytest
import torch
from routing_oracle import normal
from torch._dynamo.testing import CompileCounterWithBackend

from mmrec_kernels import library, schemas
from mmrec_kernels.routing import Routing, SharedExpert, autograd, mixture_of_experts, route

T, D, E, F, K, M = 6, 4, 5, 3, 2, 2
MODALITY = torch.tensor([0, 1, -1, 1, 0, 0])
ALLOWED = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]], dtype=torch.bool)
F32 = torch.float32


def route_arguments(**changes):
    return {"x": normal(T, D, dtype=F32), "gate_weight": normal(E, D, seed=1, dtype=F32), "k": K, **changes}


def expert_arguments(**changes):
    arguments = {
        "x": normal(T, D, dtype=F32),
        "routing": SimpleNamespace(weights=torch.ones(T, K), experts=torch.zeros(T, K, dtype=torch.int32)),
        "w_in": normal(E, 2 * F, D, seed=1, dtype=F32),
        "w_out": normal(E, D, F, seed=2, dtype=F32),
    }
    return {**arguments, **changes}


def ids(*shape, value=0):
    return torch.full(shape, value, dtype=torch.int64)


BAD_ROUTES = [
    ({"x": [[1.0]]}, TypeError, "x must be a tensor, got list"),
    ({"x": normal(2, T, D, dtype=F32)}, ValueError, r"x must have shape \[T, d\], got \[2, 6, 4\]"),
    ({"x": ids(T, D)}, TypeError, "x must be float32 or bfloat16 or float64, got int64"),
    ({"x": normal(T, D).half()}, TypeError, "x must be .* got float16"),
    ({"gate_weight": normal(E, D + 1, dtype=F32)}, ValueError, r"gate_weight must have shape \[E, 4\], got \[5, 5\]"),
    ({"gate_weight": normal(E, D)}, TypeError, "gate_weight must be .* got float64"),
    ({"gate_weight": normal(0, D, dtype=F32)}, ValueError, "gate_weight must have at least one expert"),
    ({"k": 0}, ValueError, "k must be at least 1, got 0"),
    ({"k": 2.0}, TypeError, "k must be an int, got float"),
    ({"k": True}, TypeError, "k must be an int, got bool"),
    ({"score": "relu"}, ValueError, "score must be one of 'softmax', 'topk_softmax', 'sigmoid', got 'relu'"),
    ({"renormalize": 1}, TypeError, "renormalize must be True, False or None, got int"),
    ({"modality": ids(T)}, ValueError, "num_modalities must be given"),
    ({"modality": ids(T + 1), "num_modalities": M}, ValueError, r"modality must have shape \[6\], got \[7\]"),
    ({"modality": torch.zeros(T), "num_modalities": M}, TypeError, "modality must be int32 or int64, got float32"),
    ({"modality": ids(T, value=2), "num_modalities": M}, ValueError, r"modality must be in \[0, 2\) or -1 .* 2 to 2"),
    ({"modality": ids(T, value=-2), "num_modalities": M}, ValueError, r"modality must be in \[0, 2\) or -1"),
    ({"num_modalities": M}, ValueError, "modality must be given when there are 2 modalities, got None"),
    ({"allowed": ALLOWED}, ValueError, "modality must be given when there are 2 modalities"),
    ({"num_modalities": 0}, ValueError, "num_modalities must be at least 1, got 0"),
    ({"modality": MODALITY, "allowed": ALLOWED.int()}, TypeError, "allowed must be bool, got int32"),
    ({"modality": MODALITY, "allowed": ALLOWED[:, 1:]}, ValueError, r"allowed must have shape \[2, 5\], got \[2, 4\]"),
    ({"modality": MODALITY, "num_modalities": 3, "allowed": ALLOWED}, ValueError, r"allowed must have shape \[3, 5\]"),
    ({"modality": MODALITY, "num_modalities": 3, "bias": normal(2, E)}, ValueError, r"bias must have shape \[3, 5\]"),
    ({"bias": normal(E + 1)}, ValueError, r"bias must have shape \[5\], got \[6\]"),
    ({"bias": ids(E)}, TypeError, "bias must be .* got int64"),
    ({"bias": [0.0] * E}, TypeError, "bias must be a tensor, got list"),
    ({"valid": torch.ones(T)}, TypeError, "valid must be bool .* got float32"),
    ({"valid": torch.ones(T - 1, dtype=torch.bool)}, ValueError, r"valid must have shape \[6\], got \[5\]"),
]


@pytest.mark.parametrize("changes,error,message", BAD_ROUTES, ids=lambda v: None)
def test_route_refuses(changes, error, message):
    with pytest.raises(error, match=message):
        route(**route_arguments(**changes))


def routing(weights=(T, K), experts=(T, K), value=0, dtype=F32):
    return SimpleNamespace(weights=torch.ones(weights, dtype=dtype), experts=ids(*experts, value=value))


SHARED = SharedExpert(normal(2 * F, D, dtype=F32), normal(D, F, dtype=F32))
BAD_EXPERTS = [
    ({"x": normal(T, D, 1, dtype=F32)}, ValueError, r"x must have shape \[T, d\]"),
    ({"x": ids(T, D)}, TypeError, "x must be float32"),
    ({"routing": torch.ones(T, K)}, TypeError, "routing must have `weights` and `experts`.*got Tensor"),
    ({"routing": []}, ValueError, "routing must hold at least one routing, got an empty list"),
    ({"routing": [routing(), None]}, TypeError, r"routing\[1\] must have `weights` and `experts`.*got NoneType"),
    ({"routing": routing(weights=(T + 1, K))}, ValueError, r"routing.weights must have shape \[6, k\], got \[7, 2\]"),
    ({"routing": routing(experts=(T, K + 1))}, ValueError, r"routing.experts must have shape \[6, 2\], got \[6, 3\]"),
    ({"routing": routing(dtype=torch.int32)}, TypeError, "routing.weights must be .* got int32"),
    ({"routing": [routing(experts=(T,))]}, ValueError, r"routing\[0\].experts must have shape"),
    ({"routing": routing(value=E)}, ValueError, r"routing.experts must be in \[0, 5\) or -1 .* from 5 to 5"),
    ({"routing": routing(value=-2)}, ValueError, r"routing.experts must be in \[0, 5\) or -1"),
    ({"routing": [routing(), routing(value=2**32)]}, ValueError, r"routing.experts must be in \[0, 5\)"),
    ({"w_in": normal(E, D, 2 * F, dtype=F32)}, ValueError, r"w_in must have shape \[E, 2f, 4\].*transposed.*w_in.mT"),
    ({"w_out": normal(E, F, D, dtype=F32)}, ValueError, r"w_out must have shape \[5, 4, 3\].*transposed.*w_out.mT"),
    ({"w_in": normal(E, F, 2, D, dtype=F32)}, ValueError, "w_in must have shape .*neither a separate axis nor interl"),
    ({"w_in": [normal(2 * F, D, dtype=F32)]}, TypeError, "w_in must be a tensor, got list"),
    ({"w_in": normal(E, 2 * F, D)}, TypeError, "w_in must be float32, got float64"),
    ({"w_in": normal(E, 5, D, dtype=F32)}, ValueError, "w_in must have an even number of rows .* 'swiglu', got 5"),
    ({"w_in": normal(0, 2 * F, D, dtype=F32)}, ValueError, "w_in must have at least one expert"),
    ({"w_out": normal(E + 1, D, F, dtype=F32)}, ValueError, r"w_out must have shape \[5, 4, 3\], got \[6, 4, 3\]"),
    ({"activation": "gelu"}, ValueError, r"w_out must have shape \[5, 4, 6\], got \[5, 4, 3\]"),
    ({"activation": "tanh"}, ValueError, "activation must be one of 'swiglu', 'geglu', 'gelu', .*got 'tanh'"),
    ({"b_in": normal(E, F, dtype=F32)}, ValueError, r"b_in must have shape \[5, 6\], got \[5, 3\]"),
    ({"b_out": normal(D, dtype=F32)}, ValueError, r"b_out must have shape \[5, 4\], got \[4\]"),
    ({"b_out": normal(E, D)}, TypeError, "b_out must be float32, got float64"),
    ({"shared": tuple(SHARED)}, TypeError, "shared must be a SharedExpert or None, got tuple"),
    ({"shared": SHARED._replace(w_in=SHARED.w_in.T)}, ValueError, r"shared.w_in .* transposed layout"),
    ({"shared": SHARED._replace(w_out=SHARED.w_out[:, 1:])}, ValueError, r"shared.w_out must have shape \[4, 3\]"),
    ({"shared": SHARED._replace(w_in=SHARED.w_in[1:])}, ValueError, "shared.w_in must have an even number of rows"),
    (
        {"shared": SHARED._replace(gate=torch.ones(2, D))},
        ValueError,
        r"shared.gate must have shape \[4\], got \[2, 4\]",
    ),
]


@pytest.mark.parametrize("changes,error,message", BAD_EXPERTS, ids=lambda v: None)
def test_experts_refuse(changes, error, message):
    with pytest.raises(error, match=message):
        mixture_of_experts(**expert_arguments(**changes))


def test_content_errors_also_come_through_autograd():
    with pytest.raises(ValueError, match="modality must be in"):
        x = normal(T, D, dtype=F32).requires_grad_()
        route(**route_arguments(x=x, modality=ids(T, value=7), num_modalities=M))
    with pytest.raises(ValueError, match=r"routing.experts must be in"):
        mixture_of_experts(**expert_arguments(x=x, routing=routing(value=E)))


def test_integer_and_weight_dtypes():
    """experts int32 or int64, weights of any floating dtype, modality int32 or int64: the same result."""
    base = mixture_of_experts(**expert_arguments(routing=routing(value=1)))
    for kind in (torch.float64, torch.bfloat16):
        assert torch.equal(mixture_of_experts(**expert_arguments(routing=routing(value=1, dtype=kind))), base)
    small = SimpleNamespace(weights=torch.ones(T, K), experts=ids(T, K, value=1).int())
    assert torch.equal(mixture_of_experts(**expert_arguments(routing=small)), base)
    first, second = (
        route(**route_arguments(modality=MODALITY.to(kind), allowed=ALLOWED)) for kind in (torch.int32, torch.int64)
    )
    assert torch.equal(first.weights, second.weights) and torch.equal(first.experts, second.experts)


def leaf(*shape, seed=0, dtype=torch.float64):
    return normal(*shape, seed=seed, dtype=dtype).requires_grad_()


def pipeline(x, gate, w_in, w_out, modality, allowed, valid, bias, shared):
    """Every argument at once: routed, dense, and both gates through one pass with a shared expert."""
    masks = {"modality": modality, "allowed": allowed, "valid": valid}
    few = route(x, gate, 2, **masks, bias=bias, score="sigmoid")
    dense = route(x, gate, gate.shape[0], **masks)
    one, two = mixture_of_experts(x, [few, dense], w_in, w_out, shared=SharedExpert(*shared))
    losses = torch.stack([*few.losses, *dense.losses])
    return one, two, few.weights, few.experts, dense.stats, losses


def pipeline_inputs(tokens, seed=0, dtype=torch.float64):
    x, gate = leaf(tokens, D, seed=seed, dtype=dtype), leaf(E, D, seed=1, dtype=dtype)
    w_in, w_out = leaf(E, 2 * F, D, seed=2, dtype=dtype), leaf(E, D, F, seed=3, dtype=dtype)
    shared = leaf(2, D, seed=4, dtype=dtype), leaf(D, 1, seed=5, dtype=dtype), leaf(D, seed=6, dtype=dtype)
    modality = torch.arange(tokens) % 3 - 1
    valid = torch.arange(tokens) % 4 != 3
    return x, gate, w_in, w_out, modality, ALLOWED, valid, normal(M, E, seed=7, dtype=dtype), shared


def run(function, inputs):
    outs = function(*inputs)
    differentiable = [o for o in outs if o.requires_grad]
    leaves = [*inputs[:4], *inputs[-1]]
    total = sum(o.square().sum() for o in differentiable)
    return *outs, *torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)


def short_pipeline(x, gate, w_in, w_out, modality, allowed, *_):
    routing = route(x, gate, 2, modality=modality, allowed=allowed)
    return mixture_of_experts(x, routing, w_in, w_out), routing.losses.balance


@pytest.mark.parametrize(
    "function,backend,save_hidden",
    [(pipeline, "aot_eager", False), (short_pipeline, "aot_eager", True), (short_pipeline, "inductor", False)],
)
def test_compiles_in_one_dynamic_graph(function, backend, save_hidden, monkeypatch):
    monkeypatch.setattr(autograd, "SAVE_HIDDEN_WIDTH", 1 if save_hidden else 10**9)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    for tokens in (13, 27, 18):
        inputs = pipeline_inputs(tokens, seed=tokens)
        for one, two in zip(run(compiled, inputs), run(function, inputs), strict=True):
            torch.testing.assert_close(one, two)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_compiles_without_gradients_and_warning():
    """A float32 inference graph; the warning about k = 1 is left out of a traced graph, not an error in it."""
    torch._dynamo.reset()

    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def infer(x, gate, w_in, w_out):
        return mixture_of_experts(x, route(x, gate, 1, renormalize=True), w_in, w_out)

    with torch.no_grad():
        for tokens in (4, 7):
            x, gate, w_in, w_out = pipeline_inputs(tokens, dtype=F32)[:4]
            want = mixture_of_experts(x, route(x, gate, 1, score="topk_softmax"), w_in, w_out)
            torch.testing.assert_close(infer(x, gate, w_in, w_out), want)
    torch._dynamo.reset()


OPCHECK = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck_route(dtype, masked):
    x, gate = normal(D, T, dtype=dtype).T, normal(E, D, seed=1, dtype=dtype)
    bias = normal(M, E, dtype=schemas.statistics_dtype(dtype))
    masks = (MODALITY, ALLOWED, bias, MODALITY >= 0) if masked else (None,) * 4
    tail = (M if masked else 1, "sigmoid" if masked else "softmax")
    torch.library.opcheck(schemas.routing_forward, (x, gate, *masks, K, *tail, masked), test_utils=OPCHECK)
    weights, experts, stats, losses = schemas.routing_forward(x, gate, *masks, K, *tail, masked)
    for needs in ((True, True), (not masked, masked)):
        grads = (torch.ones_like(weights), torch.ones_like(losses) if all(needs) else None)
        saved = (x, gate, masks[0], masks[1], masks[3], weights, experts, stats, tail[1], masked)
        torch.library.opcheck(schemas.routing_backward, (*grads, *saved, *needs), test_utils=OPCHECK)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("full", [False, True])
def test_opcheck_experts(dtype, full):
    gates, wide = 2 if full else 1, schemas.statistics_dtype(dtype)
    weights = normal(gates, T, 3, seed=8, dtype=wide)
    experts = torch.randint(-1, E, (gates, T, 3), generator=torch.Generator().manual_seed(1)).int()
    parameters = [normal(E, 2 * F, D, seed=2, dtype=dtype), normal(E, D, F, seed=3, dtype=dtype), *[None] * 5]
    if full:
        shapes = (E, 2 * F), (E, D), (4, D), (D, 2), (D,)
        parameters[2:] = [normal(*s, seed=i, dtype=dtype) for i, s in enumerate(shapes)]
    common = (normal(T, D, dtype=dtype), weights, experts, *parameters)
    torch.library.opcheck(schemas.experts_forward, (*common, "swiglu", full), test_utils=OPCHECK)
    out, hidden, shared_hidden = schemas.experts_forward(*common, "swiglu", full)
    saved = (hidden, shared_hidden) if full else (None, None)
    for needs in (0b111111111, 0b001001010):
        arguments = (torch.ones_like(out), *common, *saved, "swiglu", needs)
        torch.library.opcheck(schemas.experts_backward, arguments, test_utils=OPCHECK)


def test_autocast():
    """route keeps its dtype and its bits; the experts run in the autocast dtype; float64 is left alone."""
    x, gate, w_in, w_out, *_, shared = pipeline_inputs(T, dtype=F32)
    plain = route(x, gate, K)
    upstream = normal(T, K, dtype=F32)
    (want,) = torch.autograd.grad(plain.weights, x, upstream, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = route(x, gate, K)
        out = mixture_of_experts(x, cast, w_in, w_out, shared=SharedExpert(*shared))
        (grad,) = torch.autograd.grad(cast.weights, x, upstream, retain_graph=True)
        exact = mixture_of_experts(x.double(), cast, w_in.double(), w_out.double())
        total = out.float().sum()
        total.backward()
    assert cast.weights.dtype == F32 and torch.equal(cast.weights, plain.weights) and torch.equal(grad, want)
    assert out.dtype == torch.bfloat16 and exact.dtype == torch.float64
    low = [t.detach().bfloat16() for t in (x, w_in, w_out, *shared)]
    assert torch.equal(out, mixture_of_experts(low[0], plain, low[1], low[2], shared=SharedExpert(*low[3:])))
    assert x.grad.dtype == w_in.grad.dtype == F32 and gate.grad is not None


def test_autocast_does_not_round_inside_the_ops():
    """float32 products stay float32 inside the raw ops, whatever autocast says around them, backward included."""
    x, gate, w_in, w_out = pipeline_inputs(T, dtype=F32)[:4]
    arguments = x.detach(), torch.ones(1, T, K), ids(1, T, K), w_in.detach(), w_out.detach(), *[None] * 5, "swiglu"
    grad = normal(1, T, D, dtype=F32)
    routed = (x.detach(), gate.detach(), None, None, None, None, K, 1, "softmax", True)
    plain = schemas.experts_forward(*arguments, False), schemas.routing_forward(*routed)
    back = schemas.experts_backward(grad, *arguments[:-1], None, None, "swiglu", 0b1111)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = schemas.experts_forward(*arguments, False), schemas.routing_forward(*routed)
        cast_back = schemas.experts_backward(grad, *arguments[:-1], None, None, "swiglu", 0b1111)
    for one, two in zip((*plain[0], *plain[1], *back), (*cast[0], *cast[1], *cast_back), strict=True):
        assert torch.equal(one, two)


def test_providers_are_announced():
    rows = {(p.op, p.device) for p in library.providers()}
    for op in ("_routing_forward", "_routing_backward", "_experts_forward", "_experts_backward"):
        assert {(op, "cpu"), (op, "cuda")} <= rows


def test_routing_feeds_the_experts_with_gradients_to_the_gate():
    x, gate, w_in, w_out = pipeline_inputs(T)[:4]
    result = route(x, gate, 1)
    assert isinstance(result, Routing)
    mixture_of_experts(x, result, w_in, w_out).square().sum().backward()
    assert (gate.grad != 0).any() and x.grad is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_out_of_range_acts_as_absent_on_gpu(monkeypatch):
    """On GPU a modality or expert id out of range is −1; MMREC_CHECK=1 makes it an error."""
    x, gate, w_in, w_out = (t.detach().cuda() for t in pipeline_inputs(T, dtype=F32)[:4])
    wild = MODALITY.where(MODALITY >= 0, torch.tensor(9)).cuda()
    masks = {"num_modalities": M}
    one, two = (route(x, gate, K, modality=m, **masks) for m in (MODALITY.cuda(), wild))
    assert torch.equal(one.experts, two.experts) and torch.equal(one.weights, two.weights)
    strange = SimpleNamespace(weights=one.weights, experts=torch.where(one.experts < 0, E + 3, one.experts))
    assert torch.equal(mixture_of_experts(x, one, w_in, w_out), mixture_of_experts(x, strange, w_in, w_out))
    monkeypatch.setenv("MMREC_CHECK", "1")
    with pytest.raises(ValueError, match="modality must be in"):
        route(x, gate, K, modality=wild, **masks)
    with pytest.raises(ValueError, match="routing.experts must be in"):
        mixture_of_experts(x, strange, w_in, w_out)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_gpu_equals_cpu():
    inputs = pipeline_inputs(40)
    moved = [
        t.detach().cuda().requires_grad_(t.requires_grad) if isinstance(t, torch.Tensor)
        else tuple(s.detach().cuda().requires_grad_() for s in t)
        for t in inputs
    ]  # fmt: skip
    for one, two in zip(run(pipeline, inputs), run(pipeline, moved), strict=True):
        torch.testing.assert_close(one, two.cpu())
