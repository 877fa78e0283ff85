"""The mathematics of nf4_linear: forward, gradients, adapters, rounding."""

import itertools

import numpy as np
import pytest
import torch
from nf4_providers import use_reference
from torch import Tensor
from torch.nn.functional import linear

from mmrec_kernels import library, schemas
from mmrec_kernels.nf4 import LoRA, NF4Weight, nf4_linear, reference

pytestmark = pytest.mark.usefixtures("provider")

M, N, K, R, A = 6, 10, 44, 3, 3
FLOORS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 3e-5}


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_weight(n=N, k=K, **kwargs):
    return NF4Weight.quantize(normal(n, k, seed=1), **kwargs)


def make_adapters(dtype=torch.float32, n=N, k=K, r=R, count=A):
    return normal(count, r, k, seed=2, dtype=dtype), normal(count, n, r, seed=3, dtype=dtype)


def naive(x, weight, bias=None, a=None, b=None, scalings=None, ids=None):
    """float64, row by row, output by output, on the weights as x's dtype sees them."""
    w = weight.dequantize(x.dtype).double().numpy()
    x, bias, a, b = (None if t is None else t.detach().double().numpy() for t in (x, bias, a, b))
    y = np.zeros((x.shape[0], w.shape[0]))
    for i, n in itertools.product(range(x.shape[0]), range(w.shape[0])):
        y[i, n] = sum(x[i, k] * w[n, k] for k in range(w.shape[1]))
        e = -1 if ids is None else int(ids[i])
        if e >= 0:
            for j in range(a.shape[1]):
                y[i, n] += float(scalings[e]) * b[e, n, j] * sum(x[i, k] * a[e, j, k] for k in range(w.shape[1]))
        if bias is not None:
            y[i, n] += bias[n]
    return torch.from_numpy(y)


def error(actual: Tensor, oracle: Tensor) -> tuple[float, float]:
    difference = actual.double() - oracle
    scale_max, scale_norm = oracle.abs().max().clamp(min=1e-300), oracle.norm().clamp(min=1e-300)
    return float(difference.abs().max() / scale_max), float(difference.norm() / scale_norm)


def assert_no_worse(actual, eager, oracle, dtype):
    for ours, theirs in zip(error(actual, oracle), error(eager, oracle), strict=True):
        assert ours <= 2 * theirs + FLOORS[dtype], (ours, theirs)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_forward_equals_naive_oracle(dtype, nested):
    weight = make_weight(nested=nested)
    x, bias = normal(M, K, dtype=dtype), normal(N, seed=4, dtype=dtype)
    a, b = make_adapters(dtype)
    scalings = torch.tensor([0.5, 2.0, -1.0])
    ids = torch.tensor([0, 2, -1, 1, 1, -1])
    cases = [
        ({}, {}),
        ({"bias": bias}, {"bias": bias}),
        ({"lora": LoRA(a[1], b[1], 0.25)}, {"a": a[1:2], "b": b[1:2], "scalings": [0.25], "ids": [0] * M}),
        (
            {"bias": bias, "lora": LoRA(a, b, scalings), "adapter_ids": ids},
            {"bias": bias, "a": a, "b": b, "scalings": scalings, "ids": ids},
        ),
    ]
    for ours, oracle in cases:
        y, expected = nf4_linear(x, weight, **ours), naive(x, weight, **oracle)
        assert y.dtype == dtype and y.is_contiguous()
        if dtype == torch.bfloat16:
            assert ((y.double() - expected).abs() <= 2**-8 * expected.abs() + 1e-5).all()
        else:
            assert max(error(y, expected)) <= FLOORS[dtype]


def test_w_is_rounded_to_the_dtype_of_x():
    """The identity as x, or as the gradient of y, reads W out; 1 + 2⁻⁷ times it tells a wider W apart."""
    weight = make_weight()
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        decoded = weight.dequantize(dtype)
        assert torch.equal(nf4_linear(torch.eye(K, dtype=dtype), weight), decoded.T)
        x = torch.zeros(N, K, dtype=dtype, requires_grad=True)
        (dx,) = torch.autograd.grad(nf4_linear(x, weight), x, torch.eye(N, dtype=dtype))
        assert torch.equal(dx, decoded)
    factor = torch.tensor(1 + 2**-7, dtype=torch.bfloat16)
    x = torch.zeros(N, K, dtype=torch.bfloat16, requires_grad=True)
    (dx,) = torch.autograd.grad(nf4_linear(x, weight), x, factor * torch.eye(N, dtype=torch.bfloat16))
    assert torch.equal(dx, (decoded.float() * factor).bfloat16())
    assert not torch.equal(dx, (weight.dequantize(torch.float32) * factor).bfloat16())


def test_lora_activations_stay_in_float32():
    """S = [1 + 2⁻⁹, 1] and b = [1, −1]: y is 2⁻⁹, but 0 if S is rounded to bfloat16."""
    weight = NF4Weight.quantize(torch.zeros(1, 2), nested=False)
    x = torch.tensor([[1, 2**-9]], dtype=torch.bfloat16)
    lora = LoRA(torch.tensor([[1, 1], [1, 0]]).bfloat16(), torch.tensor([[1, -1]]).bfloat16())
    assert nf4_linear(x, weight, lora=lora).item() == 2**-9


def test_one_rounding_at_the_end():
    """1 + 2⁻⁸ + 2⁻⁸ is a bfloat16; rounded after each sum it would be 1."""
    weight = NF4Weight.quantize(torch.ones(1, 1), nested=False)
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    small = torch.full((1,), 2**-8, dtype=torch.bfloat16)
    assert nf4_linear(one, weight, small, lora=LoRA(one, one, 2**-8)).item() == 1 + 2**-7


def test_float32_compute_means_float32():
    weight = make_weight(64, 512)
    x = normal(9, 512)
    y, oracle = nf4_linear(x, weight), linear(x.double(), weight.dequantize(torch.float64))
    assert max(error(y, oracle)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parameters", [torch.float32, None])
def test_no_worse_than_eager(dtype, parameters):
    """Forward and every gradient, by the numerics rule; adapters in float32 and in the dtype of x."""
    weight = make_weight(96, 200)
    parameters = parameters or dtype
    x, dy = normal(33, 200, dtype=dtype), normal(33, 96, seed=5, dtype=dtype)
    bias, a, b = normal(96, seed=4, dtype=parameters), normal(8, 200, seed=2), normal(96, 8, seed=3)
    inputs = [x, bias, a.to(parameters), b.to(parameters)]

    def eager(x, bias, a, b):
        base = linear(x, weight.dequantize(dtype).to(x.dtype))
        return base + (0.5 * linear(linear(x.to(a.dtype), a), b) + bias).to(x.dtype)

    def ours(x, bias, a, b):
        return nf4_linear(x, weight, bias, lora=LoRA(a, b, 0.5))

    def run(function, tensors, dy):
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        y = function(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    oracle = run(eager, [t.double() for t in inputs], dy.double())
    for actual, theirs, truth, like in zip(
        run(ours, inputs, dy), run(eager, inputs, dy), oracle, [dy, *inputs], strict=True
    ):
        assert actual.dtype == like.dtype and actual.shape == like.shape and actual.is_contiguous()
        assert_no_worse(actual, theirs, truth, dtype)


@pytest.mark.parametrize("case", ["plain", "single", "masked", "stacked"])
def test_gradcheck(case):
    weight = make_weight(5, 7, blocksize=32)
    x = normal(4, 7, dtype=torch.float64).requires_grad_()
    bias = normal(5, seed=4, dtype=torch.float64).requires_grad_()
    a, b = (t.requires_grad_() for t in make_adapters(torch.float64, 5, 7, 2))
    if case == "plain":
        assert torch.autograd.gradcheck(lambda x, bias: nf4_linear(x, weight, bias), (x, bias))
        return
    if case == "stacked":
        scaling, ids = torch.tensor([0.5, 2.0, -1.0]), torch.tensor([2, -1, 0, 2])
    else:
        a, b = (t[0].detach().requires_grad_() for t in (a, b))
        scaling, ids = 0.5, torch.tensor([0, -1, -1, 0]) if case == "masked" else None

    def function(x, bias, a, b):
        return nf4_linear(x, weight, bias, lora=LoRA(a, b, scaling), adapter_ids=ids)

    assert torch.autograd.gradcheck(function, (x, bias, a, b))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_backward_over_row_blocks(monkeypatch, dtype):
    """The reference: the same up to rounding when W is decoded in many blocks; and never more of it at once than the
    bound."""
    use_reference(monkeypatch)
    weight = make_weight(50, K)
    a, b = make_adapters(torch.float32, n=50)
    x = normal(M, K, dtype=dtype).requires_grad_()
    dy = normal(M, 50, seed=5, dtype=dtype)

    def run():
        y = nf4_linear(x, weight, lora=LoRA(a[0], b[0]))
        return y.detach(), torch.autograd.grad(y, x, dy)[0]

    whole = run()
    decode, decoded = reference._Rows.decode, []
    monkeypatch.setattr(reference, "_DECODED_ELEMENTS", 8 * K)
    monkeypatch.setattr(
        reference._Rows, "decode", lambda self, i, j, t: decoded.append((j - i) * self.columns) or decode(self, i, j, t)
    )
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
    for blocked, expected in zip(run(), whole, strict=True):
        assert max(error(blocked, expected.double())) <= tolerance
    assert len(decoded) == 14 and max(decoded) == 8 * K


def mixed_setup(dtype, m=37):
    weight = make_weight(96, 200)
    a, b = make_adapters(torch.float32, 96, 200, 8)
    ids = torch.randint(-1, A, (m,), generator=torch.Generator().manual_seed(0))
    return weight, a, b, torch.tensor([0.5, 2.0, -1.0]), ids, normal(m, 200, dtype=dtype), normal(96, seed=4)


@pytest.mark.parametrize("m", [1, 5, 37])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_mixed_adapters_equal_single_runs_bit_for_bit(dtype, m):
    weight, a, b, scalings, ids, x, bias = mixed_setup(dtype, m)
    mixed = nf4_linear(x, weight, bias, lora=LoRA(a, b, scalings), adapter_ids=ids)
    for e in range(A):
        single = nf4_linear(x, weight, bias, lora=LoRA(a[e], b[e], scalings[e].item()))
        assert torch.equal(mixed[ids == e], single[ids == e])
    assert torch.equal(mixed[ids == -1], nf4_linear(x, weight, bias)[ids == -1])


def test_mixed_gradients_are_those_of_the_rows_of_each_adapter():
    weight, a, b, scalings, ids, x, bias = mixed_setup(torch.float64)
    a, b = a.double().requires_grad_(), b.double().requires_grad_()
    x = x.requires_grad_()
    dy = normal(37, 96, seed=5, dtype=torch.float64)
    dx, da, db = torch.autograd.grad(nf4_linear(x, weight, lora=LoRA(a, b, scalings), adapter_ids=ids), (x, a, b), dy)
    for e in range(A):
        rows = ids == e
        y = nf4_linear(x[rows], weight, lora=LoRA(a[e], b[e], scalings[e].item()))
        for mixed, single in zip((dx[rows], da[e], db[e]), torch.autograd.grad(y, (x, a, b), dy[rows]), strict=True):
            single = single[rows] if single.shape == x.shape else single[e]
            assert torch.allclose(mixed, single, rtol=1e-12, atol=1e-12)


def test_adapter_ids_broadcast_per_sequence():
    weight, a, b, scalings, _, _, _ = mixed_setup(torch.float32)
    x = normal(4, 5, 200)
    lora = LoRA(a, b, scalings)
    per_sequence = torch.tensor([[2], [-1], [0], [2]])
    expected = nf4_linear(x, weight, lora=lora, adapter_ids=per_sequence.expand(4, 5).contiguous())
    assert expected.shape == (4, 5, 96)
    assert torch.equal(nf4_linear(x, weight, lora=lora, adapter_ids=per_sequence), expected)
    assert torch.equal(nf4_linear(x, weight, lora=lora, adapter_ids=per_sequence.int()), expected)
    flat = nf4_linear(x.view(20, 200), weight, lora=lora, adapter_ids=per_sequence.repeat(1, 5).view(-1))
    assert torch.equal(flat.view(4, 5, 96), expected)
    one = nf4_linear(x, weight, lora=lora, adapter_ids=torch.tensor(1))
    assert torch.equal(one, nf4_linear(x, weight, lora=LoRA(a[1], b[1], 2.0)))


def test_a_single_adapter_with_a_row_mask():
    """ids 0 and −1 with one adapter: it applies after an invocation token only (aLoRA)."""
    weight, a, b, _, _, x, bias = mixed_setup(torch.bfloat16)
    ids = torch.where(torch.arange(37) < 20, -1, 0)
    y = nf4_linear(x, weight, bias, lora=LoRA(a[0], b[0], 0.5), adapter_ids=ids)
    assert torch.equal(y[:20], nf4_linear(x, weight, bias)[:20])
    assert torch.equal(y[20:], nf4_linear(x, weight, bias, lora=LoRA(a[0], b[0], 0.5))[20:])


def test_bits_do_not_depend_on_which_gradients_are_needed():
    weight, a, b, scalings, ids, x, bias = mixed_setup(torch.bfloat16)
    dy = normal(37, 96, seed=5, dtype=torch.bfloat16)
    tensors = [x, bias, a, b]

    def run(needs):
        leaves = [t.detach().clone().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]
        y = nf4_linear(leaves[0], weight, leaves[1], lora=LoRA(leaves[2], leaves[3], scalings), adapter_ids=ids)
        assert y.requires_grad == any(needs)
        if y.requires_grad:
            y.backward(dy)
        return y.detach(), [leaf.grad for leaf in leaves]

    y_all, grads_all = run([True] * 4)
    for needs in itertools.product([False, True], repeat=4):
        y, grads = run(needs)
        assert torch.equal(y, y_all)
        for grad, expected, need in zip(grads, grads_all, needs, strict=True):
            assert (grad is not None) == need
            assert grad is None or torch.equal(grad, expected)
    with torch.no_grad():
        assert torch.equal(
            nf4_linear(x.requires_grad_(), weight, bias, lora=LoRA(a, b, scalings), adapter_ids=ids), y_all
        )
    with torch.inference_mode():
        assert torch.equal(nf4_linear(x, weight, bias, lora=LoRA(a, b, scalings), adapter_ids=ids), y_all)


@pytest.mark.parametrize("saved", [False, True])
def test_what_is_saved_for_backward(saved):
    """S = x aᵀ in float32 where asked, zero in rows without an adapter; else nothing."""
    weight, a, b, scalings, ids, x, _ = mixed_setup(torch.bfloat16)
    _, lora_x = library.call(schemas.nf4_forward, x, *weight.tensors(), 96, 64, None, a, b, 1.0, scalings, ids, saved)
    assert lora_x.dtype == torch.float32
    if not saved:
        assert lora_x.shape == (0,)
        return
    expected = torch.stack([x[i].float() @ a[e].T if e >= 0 else torch.zeros(8) for i, e in enumerate(ids)])
    assert torch.allclose(lora_x, expected, rtol=1e-5, atol=1e-4) and (lora_x[ids == -1] == 0).all()


def test_graph_keeps_no_more_than_it_needs():
    """x only for da, S only for db; never a decoded weight."""
    weight, a, b, _, _, x, bias = mixed_setup(torch.float32)

    def saved(x, bias, a, b):
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
            nf4_linear(x, weight, bias, lora=LoRA(a, b))
        return shapes

    a, b = a[0], b[0]
    weight_shapes = [tuple(t.shape) for t in weight.tensors()]
    for need_x, need_a, need_b in itertools.product([False, True], repeat=3):
        if not (need_x or need_a or need_b):
            continue
        shapes = saved(
            x.detach().requires_grad_(need_x),
            bias,
            a.detach().requires_grad_(need_a),
            b.detach().requires_grad_(need_b),
        )
        expected = [x.shape] * need_a + weight_shapes + [(1, *a.shape), (1, *b.shape)] + [(37, 8)] * need_b
        assert shapes == [tuple(s) for s in expected]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_poison(dtype):
    """NaN in an adapter that no row takes, in rows of another adapter and in rows without one reaches nothing else."""
    weight, a, b, scalings, _, x, bias = mixed_setup(dtype, 6)
    ids = torch.tensor([0, -1, 1, 0, 1, -1])
    dy = normal(6, 96, seed=5, dtype=dtype)

    def run(x, a, b, dy):
        leaves = [t.detach().clone().requires_grad_() for t in (x, bias, a, b)]
        y = nf4_linear(leaves[0], weight, leaves[1], lora=LoRA(leaves[2], leaves[3], scalings), adapter_ids=ids)
        return y.detach(), *torch.autograd.grad(y, leaves, dy)

    y, dx, dbias, da, db = run(x, a, b, dy)
    assert (da[2] == 0).all() and (db[2] == 0).all()
    poisoned_a, poisoned_b = a.clone(), b.clone()
    poisoned_a[2], poisoned_b[2] = torch.nan, torch.inf
    for actual, expected in zip(run(x, poisoned_a, poisoned_b, dy), (y, dx, dbias, da, db), strict=True):
        assert torch.equal(actual, expected)
    poisoned_a, poisoned_b = a.clone(), b.clone()
    poisoned_a[1], poisoned_b[1] = torch.nan, torch.inf
    others = ids != 1
    y1, dx1, dbias1, da1, db1 = run(x, poisoned_a, poisoned_b, dy)
    assert torch.equal(y1[others], y[others]) and torch.equal(dx1[others], dx[others]) and torch.equal(dbias1, dbias)
    assert torch.equal(da1[[0, 2]], da[[0, 2]]) and torch.equal(db1[[0, 2]], db[[0, 2]])
    assert y1[~others].isnan().all()
    poisoned_x, poisoned_dy = x.clone(), dy.clone()
    poisoned_x[1], poisoned_dy[5] = torch.nan, torch.inf
    y2, dx2, dbias2, da2, db2 = run(poisoned_x, a, b, poisoned_dy)
    kept = torch.tensor([0, 2, 3, 4])
    assert torch.equal(y2[kept], y[kept]) and torch.equal(dx2[kept], dx[kept])
    assert torch.equal(da2, da) and torch.equal(db2, db)


def test_metamorphic():
    """Permuting rows or adapters, duplicating rows, splitting and padding the rank, shifting by the bias."""
    weight, a, b, scalings, ids, x, bias = mixed_setup(torch.float64)
    y = nf4_linear(x, weight, bias, lora=LoRA(a, b, scalings), adapter_ids=ids)

    def close(actual, expected):
        assert torch.allclose(actual, expected, rtol=1e-12, atol=1e-12)

    rows = torch.randperm(37, generator=torch.Generator().manual_seed(1))
    close(nf4_linear(x[rows], weight, bias, lora=LoRA(a, b, scalings), adapter_ids=ids[rows]), y[rows])
    order = torch.tensor([2, 0, 1])
    renamed = torch.where(ids < 0, -1, order.argsort()[ids.clamp(min=0)])
    permuted = nf4_linear(x, weight, bias, lora=LoRA(a[order], b[order], scalings[order]), adapter_ids=renamed)
    assert torch.equal(permuted, y)
    twice = nf4_linear(x.repeat(2, 1), weight, bias, lora=LoRA(a, b, scalings), adapter_ids=ids.repeat(2))
    close(twice, y.repeat(2, 1))
    close(nf4_linear(x, weight, lora=LoRA(a, b, scalings), adapter_ids=ids) + bias, y)
    close(nf4_linear(x, weight, bias, lora=LoRA(a, b * scalings[:, None, None]), adapter_ids=ids), y)
    first, second = (nf4_linear(x, weight, lora=LoRA(a[0][part], b[0][:, part])) for part in (slice(3), slice(3, None)))
    base = nf4_linear(x, weight)
    close(first + second - base, nf4_linear(x, weight, lora=LoRA(a[0], b[0])))
    padded_a = torch.nn.functional.pad(a[0], (0, 0, 0, 5), value=7.0)
    padded_b = torch.nn.functional.pad(b[0], (0, 5))
    close(nf4_linear(x, weight, lora=LoRA(padded_a, padded_b)), nf4_linear(x, weight, lora=LoRA(a[0], b[0])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_the_contents_of_others(dtype):
    weight, a, b, scalings, ids, x, bias = mixed_setup(dtype)
    y = nf4_linear(x, weight, bias, lora=LoRA(a, b, scalings), adapter_ids=ids)
    other = normal(37, 200, seed=9, dtype=dtype)
    other[:3], other_ids = x[:3], ids.roll(1)
    other_ids[:3] = ids[:3]
    again = nf4_linear(other, weight, bias, lora=LoRA(a, b, scalings), adapter_ids=other_ids)
    assert torch.equal(again[:3], y[:3]) and not torch.equal(again[3:], y[3:])
    for _ in range(3):
        assert torch.equal(nf4_linear(x, weight, bias, lora=LoRA(a, b, scalings), adapter_ids=ids), y)
