"""What nf4_linear takes and refuses, and how it behaves inside torch: compile, opcheck, autocast, graph."""

import copy
import math

import pytest
import torch
from nf4_providers import use_reference

from mmrec_kernels import library, schemas
from mmrec_kernels.nf4 import LoRA, NF4Weight, nf4_linear, reference

N, K, R, A = 24, 80, 4, 3
BFLOAT16 = torch.bfloat16


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_weight(n=N, k=K, nested=True):
    return NF4Weight.quantize(normal(n, k, seed=1), nested=nested)


def stack(dtype=torch.float32):
    return LoRA(
        normal(A, R, K, seed=2, dtype=dtype), normal(A, N, R, seed=3, dtype=dtype), torch.tensor([0.5, 2.0, -1.0])
    )


def single(dtype=torch.float32):
    return LoRA(normal(R, K, seed=2, dtype=dtype), normal(N, R, seed=3, dtype=dtype), 0.5)


IDS = torch.tensor([0, 2, -1, 1, 1])


def raw_forward_arguments(dtype, nested=True, lora=True, save=True):
    weight = make_weight(nested=nested)
    a, b, scalings = stack() if lora else (None, None, None)
    ids = IDS if lora else None
    bias = normal(N, seed=4, dtype=dtype)
    return normal(5, K, dtype=dtype), *weight.tensors(), N, 64, bias, a, b, 1.0, scalings, ids, save


@pytest.mark.parametrize(
    ("dtype", "nested", "lora"),
    [(torch.float32, False, False), (torch.float64, True, True), (torch.float32, True, True), (BFLOAT16, False, True)],
)
def test_opcheck_forward_and_backward(dtype, nested, lora):
    torch.library.opcheck(schemas.nf4_forward, raw_forward_arguments(dtype, nested, lora, lora))
    x, *weight, _, blocksize, _, a, b, scaling, scalings, ids, _ = raw_forward_arguments(dtype, nested, lora)
    lora_x = normal(5, R, dtype=schemas.statistics_dtype(dtype)) if lora else None
    for needs in [(True, lora, lora, True), (False, lora, False, False)]:
        torch.library.opcheck(
            schemas.nf4_backward,
            (normal(5, N, dtype=dtype), x, *weight, K, blocksize, a, b, scaling, scalings, ids, lora_x, *needs),
        )


@pytest.mark.parametrize("nested", [False, True])
def test_opcheck_dequantize(nested):
    weight = make_weight(nested=nested)
    torch.library.opcheck(schemas.nf4_dequantize, (*weight.tensors(), N, K, 64, "bfloat16" if nested else "float32"))


def test_results_alias_no_input():
    arguments = raw_forward_arguments(torch.float32)
    y, lora_x = schemas.nf4_forward(*arguments)
    inputs = {t.untyped_storage().data_ptr() for t in arguments if isinstance(t, torch.Tensor)}
    dx, da, db, dbias = schemas.nf4_backward(
        y, *arguments[:6], K, 64, *arguments[9:13], arguments[13], lora_x, True, True, True, True
    )
    w = schemas.nf4_dequantize(*arguments[1:6], N, K, 64, "float32")
    results = [t.untyped_storage().data_ptr() for t in (y, lora_x, dx, da, db, dbias, w)]
    assert len({*results}) == len(results) and not inputs & {*results}


def test_compile():
    """One graph, several sizes, forward and backward equal to eager bit for bit; a further size compiles nothing."""
    weight = make_weight()

    def layer(x, bias, a, b, scaling, ids):
        return nf4_linear(x.sin(), weight, bias, lora=LoRA(a, b, scaling), adapter_ids=ids) * 2

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, columns in ((5, 3), (7, 4), (11, 2)):
        ids = torch.randint(-1, A, (rows, 1), generator=torch.Generator().manual_seed(rows))
        tensors = [normal(rows, columns, K), normal(N, seed=4), stack().a, stack().b]
        dy = normal(rows, columns, N, seed=5)
        runs = []
        for function in (layer, compiled):
            leaves = [t.clone().requires_grad_() for t in tensors]
            y = function(*leaves, stack().scaling, ids)
            runs.append([y.detach(), *torch.autograd.grad(y, leaves, dy)])
        assert all(torch.equal(e, c) for e, c in zip(*runs, strict=True))
    with torch._dynamo.config.patch(error_on_recompile=True):
        x = normal(13, 5, K).requires_grad_()
        compiled(x, *(t.requires_grad_() for t in tensors[1:]), stack().scaling, torch.zeros(13, 1, dtype=torch.int64))


def test_compile_with_weight_and_lora_as_arguments():
    torch._dynamo.reset()
    compiled = torch.compile(nf4_linear, fullgraph=True, dynamic=True, backend="aot_eager")
    weight = make_weight()
    for rows in (1, 5, 9):
        x = normal(rows, K, dtype=BFLOAT16)
        assert torch.equal(compiled(x, weight), nf4_linear(x, weight))
        assert torch.equal(compiled(x, weight, lora=single()), nf4_linear(x, weight, lora=single()))


def test_compile_with_inductor():
    torch._dynamo.reset()
    weight = make_weight()
    a, b, scaling = single()

    def loss(x, a, b):
        return nf4_linear(x, weight, lora=LoRA(a, b, scaling)).square().mean()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for rows in (5, 8):
        x = normal(rows, K)
        runs = []
        for function in (loss, compiled):
            leaves = [t.clone().requires_grad_() for t in (x, a, b)]
            value = function(*leaves)
            runs.append([value.detach(), *torch.autograd.grad(value, leaves)])
        assert all(torch.allclose(e, c, rtol=1e-5, atol=1e-6) for e, c in zip(*runs, strict=True))


@pytest.mark.parametrize("parameters", [torch.float32, BFLOAT16])
def test_autocast(parameters):
    """The dtype of autocast; products still in float32; float32 adapters and bias are not rounded."""
    weight, (a, b, scaling), bias = make_weight(), single(parameters), normal(N, seed=4, dtype=parameters)
    x = normal(5, K).requires_grad_()
    dy = normal(5, N, seed=5, dtype=BFLOAT16)
    expected = nf4_linear(x.bfloat16(), weight, bias, lora=LoRA(a, b, scaling))
    (expected_dx,) = torch.autograd.grad(expected, x, dy)
    with torch.autocast("cpu", BFLOAT16):
        y = nf4_linear(x, weight, bias, lora=LoRA(a, b, scaling))
        without_grad = nf4_linear(x.detach(), weight, bias, lora=LoRA(a, b, scaling))
        (dx_inside,) = torch.autograd.grad(y, x, dy, retain_graph=True)
        wide = nf4_linear(x.detach().double(), weight)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert y.dtype == BFLOAT16 and dx.dtype == torch.float32 and wide.dtype == torch.float64
    assert torch.equal(y, expected) and torch.equal(without_grad, expected)
    assert torch.equal(dx, expected_dx) and torch.equal(dx_inside, expected_dx)


@pytest.mark.parametrize("lead", [(), (0,), (1,), (2, 0, 3), (2, 3)])
@pytest.mark.parametrize("lora", [False, True])
def test_leading_shapes(lead, lora):
    weight = make_weight()
    x = normal(*lead, K).requires_grad_()
    leaves = [t.requires_grad_() for t in single()[:2]] if lora else []
    y = nf4_linear(x, weight, lora=LoRA(*leaves, 0.5) if lora else None)
    assert y.shape == (*lead, N)
    grads = torch.autograd.grad(y.sum(), [x, *leaves])
    assert [g.shape for g in grads] == [t.shape for t in (x, *leaves)]
    if math.prod(lead) == 0:
        assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize(("n", "k", "r", "count"), [(0, K, R, A), (N, 0, R, A), (N, K, 0, A), (N, K, R, 0)])
def test_empty_sizes(n, k, r, count):
    weight = make_weight(n, k)
    x, bias = normal(5, k).requires_grad_(), normal(n, seed=4).requires_grad_()
    a, b = normal(count, r, k).requires_grad_(), normal(count, n, r).requires_grad_()
    ids = IDS if count else torch.full((5,), -1)
    y = nf4_linear(x, weight, bias, lora=LoRA(a, b, 1.0), adapter_ids=ids)
    grads = torch.autograd.grad(y.sum(), (x, bias, a, b))
    assert y.shape == (5, n) and [g.shape for g in grads] == [t.shape for t in (x, bias, a, b)]
    if not (k and r and count):
        assert torch.equal(y, nf4_linear(x, weight, bias))


def test_strides():
    """Transposed, sliced and expanded inputs, and the expanded gradient of a sum: the bits of contiguous ones."""
    weight, (a, b, scaling) = make_weight(), single()
    x = normal(5, K)
    tensors = {
        "x": [normal(K, 5).T, normal(5, 2 * K)[:, ::2], normal(1, K).expand(5, K), normal(5, K).flip(0)],
        "a": [normal(K, R).T, normal(1, K).expand(R, K), normal(2 * R, K)[::2]],
        "b": [normal(R, N).T, normal(N, 1).expand(N, R)],
        "bias": [normal(1).expand(N), normal(2 * N)[::2]],
    }
    for name, values in tensors.items():
        for value in values:
            runs = []
            for v in (value, value.contiguous()):
                given = {"x": x, "a": a, "b": b, "bias": None} | {name: v}
                leaves = {k: None if t is None else t.detach().requires_grad_() for k, t in given.items()}
                y = nf4_linear(leaves["x"], weight, leaves["bias"], lora=LoRA(leaves["a"], leaves["b"], scaling))
                y.sum().backward()
                runs.append([y.detach(), *(leaf.grad for leaf in leaves.values() if leaf is not None)])
            assert all(torch.equal(p, q) for p, q in zip(*runs, strict=True))


def test_double_backward_raises():
    x = normal(5, K).requires_grad_()
    (dx,) = torch.autograd.grad(nf4_linear(x, make_weight()).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_the_unused_output_of_a_shared_graph():
    """A None gradient: the layer's output is not part of the loss."""

    class Two(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y, z):
            ctx.set_materialize_grads(False)
            return y.clone(), z.clone()

        @staticmethod
        def backward(ctx, dy, dz):
            return dy, dz

    x, z = normal(5, K).requires_grad_(), normal(5).requires_grad_()
    _, out = Two.apply(nf4_linear(x, make_weight()), z)
    out.sum().backward()
    assert x.grad is None and torch.equal(z.grad, torch.ones(5))


def test_modules_in_train_and_eval_give_the_same_bits():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = make_weight()
            self.a, self.b = (torch.nn.Parameter(t) for t in single()[:2])

        def forward(self, x):
            return nf4_linear(x, self.weight, lora=LoRA(self.a, self.b, 0.5))

    layer, x = Layer(), normal(5, K)
    packed = layer.weight.packed.clone()
    trained = layer.train()(x)
    with torch.no_grad():
        evaluated = layer.eval()(x)
    assert torch.equal(trained, evaluated) and torch.equal(copy.deepcopy(layer)(x), trained)
    trained.sum().backward()
    assert layer.a.grad is not None and torch.equal(layer.weight.packed, packed)


@pytest.mark.parametrize("bad", [-2, A, 100])
def test_adapter_ids_outside_the_stack(bad):
    ids = IDS.clone()
    ids[3] = bad
    for grad in (False, True):
        with pytest.raises(ValueError, match=rf"adapter_ids must be inside \[-1, {A}\)"):
            nf4_linear(normal(5, K).requires_grad_(grad), make_weight(), lora=stack(), adapter_ids=ids)
    with pytest.raises(ValueError, match=r"adapter_ids must be inside \[-1, 1\)"):
        nf4_linear(normal(5, K), make_weight(), lora=single(), adapter_ids=IDS)


def test_ids_that_may_not_be_read(monkeypatch):
    """The reference as on a GPU: nothing is read, an id outside the stack acts as −1, all other bits are the same."""
    use_reference(monkeypatch)
    x = normal(5, K).requires_grad_()
    weight, (a, b, scalings) = make_weight(), stack()
    a, b = a.requires_grad_(), b.requires_grad_()

    def run(ids):
        y = nf4_linear(x, weight, lora=LoRA(a, b, scalings), adapter_ids=ids)
        return [y.detach(), *torch.autograd.grad(y, (x, a, b), torch.ones_like(y))]

    expected = run(IDS)
    monkeypatch.setattr(reference, "_may_read", lambda ids: False)
    for outside in (-1, -2, A, 2**40):
        assert all(torch.equal(p, q) for p, q in zip(run(IDS.where(IDS >= 0, outside)), expected, strict=True))


def test_the_check_that_may_be_asked_for(monkeypatch):
    ids = torch.zeros(2, dtype=torch.int64, device="meta")
    monkeypatch.setenv("MMREC_CHECK", "0")
    assert not reference._may_read(ids)
    monkeypatch.setenv("MMREC_CHECK", "1")
    assert reference._may_read(ids)


def test_providers_are_announced():
    announced = {(p.op, p.device): p.name for p in library.providers() if p.op.startswith("_nf4")}
    assert {op for op, _ in announced} == {"_nf4_forward", "_nf4_backward", "_nf4_dequantize"}
    assert {device for _, device in announced} == {"cpu", "cuda"}


def call(x=None, weight=None, bias=None, lora=None, adapter_ids=None):
    x = normal(5, K) if x is None else x
    return nf4_linear(x, make_weight() if weight is None else weight, bias, lora=lora, adapter_ids=adapter_ids)


def meta(t):
    return t.to("meta")


ERRORS = [
    ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    ({"x": normal(5, K + 1)}, ValueError, rf"x must have shape \[\*, {K}\], got \[5, {K + 1}\]"),
    ({"x": torch.tensor(1.0)}, ValueError, rf"x must have shape \[{K}\], got \[\]"),
    ({"x": torch.zeros(5, K, dtype=torch.int64)}, TypeError, "x must be float32 or bfloat16 or float64, got int64"),
    ({"x": torch.zeros(5, K, dtype=torch.float16)}, TypeError, "x must be float32 or bfloat16 or float64, got float16"),
    ({"weight": normal(N, K)}, TypeError, "weight must be an NF4Weight, got Tensor"),
    ({"weight": make_weight().to("meta")}, ValueError, "weight must be on cpu, got meta"),
    ({"bias": 1.0}, TypeError, "bias must be a tensor, got float"),
    ({"bias": normal(N + 1)}, ValueError, rf"bias must have shape \[{N}\]"),
    ({"bias": normal(N).double()}, TypeError, "bias must be float32, got float64"),
    ({"bias": meta(normal(N))}, ValueError, "bias must be on cpu, got meta"),
    ({"lora": tuple(single())}, TypeError, "lora must be a LoRA, got tuple"),
    ({"lora": LoRA(None, normal(N, R))}, TypeError, "lora.a must be a tensor, got NoneType"),
    ({"lora": LoRA(normal(R, K + 1), normal(N, R))}, ValueError, rf"lora.a must have shape \[r, {K}\]"),
    ({"lora": LoRA(normal(R, K).double(), normal(N, R))}, TypeError, "lora.a must be float32, got float64"),
    ({"lora": LoRA(normal(R, K, dtype=BFLOAT16), normal(N, R))}, TypeError, "lora.a must be float32, got bfloat16"),
    ({"lora": LoRA(meta(normal(R, K)), normal(N, R))}, ValueError, "lora.a must be on cpu, got meta"),
    ({"lora": LoRA(normal(R, K), normal(N, R + 1))}, ValueError, rf"lora.b must have shape \[{N}, {R}\]"),
    ({"lora": LoRA(normal(R, K), normal(N, R).bfloat16())}, TypeError, "lora.b must be float32, got bfloat16"),
    ({"lora": LoRA(normal(R, K), normal(1, N, R))}, ValueError, rf"lora.b must have shape \[{N}, {R}\]"),
    ({"lora": LoRA(normal(R, K), normal(N, R), True)}, TypeError, "lora.scaling must be a float or a tensor"),
    ({"lora": LoRA(normal(R, K), normal(N, R), "1")}, TypeError, "lora.scaling must be a float or a tensor"),
    ({"lora": LoRA(normal(R, K), normal(N, R), torch.ones(2))}, ValueError, r"lora.scaling must have shape \[1\]"),
    ({"lora": stack()}, ValueError, "adapter_ids must be given for stacked adapters"),
    (
        {"lora": stack()._replace(b=normal(A + 1, N, R)), "adapter_ids": IDS},
        ValueError,
        rf"lora.b must have shape \[{A}, ",
    ),
    (
        {"lora": stack()._replace(scaling=torch.ones(A + 1)), "adapter_ids": IDS},
        ValueError,
        "lora.scaling must have shape",
    ),
    (
        {"lora": stack()._replace(scaling=torch.ones(A).int()), "adapter_ids": IDS},
        TypeError,
        "lora.scaling must be float32",
    ),
    (
        {"lora": stack()._replace(scaling=torch.ones(A, requires_grad=True)), "adapter_ids": IDS},
        ValueError,
        "lora.scaling must not require a gradient",
    ),
    ({"adapter_ids": IDS}, ValueError, "adapter_ids must be None unless lora is given"),
    ({"lora": stack(), "adapter_ids": [0] * 5}, TypeError, "adapter_ids must be a tensor, got list"),
    ({"lora": stack(), "adapter_ids": IDS.float()}, TypeError, "adapter_ids must be int32 or int64, got float32"),
    ({"lora": stack(), "adapter_ids": IDS[:4]}, ValueError, r"adapter_ids must broadcast to \[5\], got \[4\]"),
    ({"lora": stack(), "adapter_ids": IDS[:, None]}, ValueError, r"adapter_ids must broadcast to \[5\], got \[5, 1\]"),
    ({"lora": stack(), "adapter_ids": meta(IDS)}, ValueError, "adapter_ids must be on cpu, got meta"),
]


@pytest.mark.parametrize(("changes", "error", "message"), ERRORS)
def test_errors_name_the_argument(changes, error, message):
    with pytest.raises(error, match=message):
        call(**changes)
