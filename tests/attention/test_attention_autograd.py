"""Gradients through the public function, opcheck of the raw ops, torch.compile, autocast."""

import pytest
import torch
from attention_oracle import CASES, EVERYTHING, FLAGS, NAMES, Case, gradients
from torch._dynamo.testing import CompileCounterWithBackend

from mmrec_kernels import schemas
from mmrec_kernels.attention import Segment, cross_modal_attention


@pytest.mark.parametrize("output", ["out", "lse", "mass"])
@pytest.mark.parametrize("name", ["everything", "everything, latent", "causal and indexed"])
def test_gradcheck(name, output):
    case = CASES[name](heads=2, kv_heads=1, width=2, value_width=1)
    leaves = case.to(torch.float64)

    def function(*tensors):
        result = getattr(case.call(cross_modal_attention, dict(zip(leaves, tensors, strict=True)), **FLAGS), output)
        return torch.where(result.isinf(), 0, result)

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


@pytest.mark.parametrize("leaf", [*NAMES, "key0", "value0", "key1", "value2", "key0 value1 sink"])
def test_each_leaf_alone_gets_the_same_gradient(leaf):
    """Only what needs a gradient is computed, to the same bits."""
    case = CASES["everything"](dtype=torch.float32)
    leaves = case.to(torch.float32)
    case.call(cross_modal_attention, leaves).square().sum().backward()
    chosen = leaf.split()
    alone = {n: x.detach().clone().requires_grad_(n in chosen) for n, x in leaves.items()}
    case.call(cross_modal_attention, alone).square().sum().backward()
    for n, x in alone.items():
        assert torch.equal(x.grad, leaves[n].grad) if n in chosen else x.grad is None


def test_unused_outputs_and_stride_0_gradients():
    case = CASES["everything"]()
    ones = case.to(torch.float64)
    outputs = case.call(cross_modal_attention, ones, **FLAGS)
    expected = gradients(outputs[:1], ones, [torch.ones_like(outputs.out)])
    leaves = case.to(torch.float64)
    case.call(cross_modal_attention, leaves, **FLAGS).out.sum().backward()
    assert all(torch.equal(leaves[n].grad, expected[n]) for n in leaves)
    for name in ("lse", "mass"):
        leaves = case.to(torch.float64)
        result = getattr(case.call(cross_modal_attention, leaves, **FLAGS), name)
        torch.where(result.isfinite(), result, 0).sum().backward()
        assert not any(leaves[f"value{m}"].grad.any() for m in range(3))
        assert leaves["key0"].grad.any()


def test_one_tensor_as_key_and_value_of_two_segments():
    rows = torch.randn(5, 2, 4, dtype=torch.float64, requires_grad=True)
    query = torch.randn(2, 2, 4, dtype=torch.float64)
    offsets = torch.tensor([0, 2, 5])
    segments = [Segment(rows, rows, offsets), Segment(rows, rows, offsets)]
    assert torch.autograd.gradcheck(
        lambda x: cross_modal_attention(query, [Segment(x, x, offsets)] * 2, torch.tensor([0, 1, 2])), rows
    )
    one = cross_modal_attention(query, segments[:1], torch.tensor([0, 1, 2]))
    torch.testing.assert_close(cross_modal_attention(query, segments, torch.tensor([0, 1, 2])), one)


def test_a_second_backward_raises():
    leaves = CASES["everything"]().to(torch.float64)
    out = CASES["everything"]().call(cross_modal_attention, leaves)
    (grad,) = torch.autograd.grad(out.square().sum(), leaves["query"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def arguments(case, dtype=torch.float32):
    """The flat arguments of the raw ops, up to `causal`."""
    x = {n: leaf.to(dtype) for n, leaf in case.leaves.items()}
    count = len(case.plan)
    small = [x.get(n) for n in NAMES[1:]]
    return (
        x["query"], [x[f"key{m}"] for m in range(count)], [x[f"value{m}"] for m in range(count)],
        torch.stack([o for o, _, _ in case.plan]), [i for _, i, _ in case.plan if i is not None], case.query_offsets,
        *small, 0.5, 1e-6, sum(1 << m for m, p in enumerate(case.plan) if p[1] is not None),
        sum(1 << m for m, p in enumerate(case.plan) if p[2]),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("everything", torch.float32),
        ("everything", torch.bfloat16),
        ("everything, latent", torch.float32),
        ("one equal segment", torch.bfloat16),
        ("no keys at all", torch.float32),
    ],
)
def test_opcheck(name, dtype):
    case = CASES[name]()
    if case.leaves.get("log_bias") is not None:
        case.leaves["log_bias"] = case.leaves["log_bias"].expand(-1, 4, -1)
    flat = arguments(case, dtype)
    torch.library.opcheck(schemas.attention_forward, (*flat, name == "everything"))
    out, lse, mass = schemas.attention_forward(*flat, True)
    count = len(case.plan)
    everything = (1 << 6) - 1, (1 << count) - 1, (1 << count) - 1
    torch.library.opcheck(schemas.attention_backward, (out, lse, mass, out, lse, mass, *flat, *everything))
    if name == "one equal segment":
        torch.library.opcheck(schemas.attention_backward, (None, None, mass, out, lse, mass, *flat, 1, 0, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [(0, 0, 0), (1, 2, 5), (62, 0, 7), (63, 7, 7)])
def test_results_are_fresh_contiguous_and_as_the_fake_says(bits, dtype):
    case = CASES["everything"]()
    flat = arguments(case, dtype)
    strided = [torch.stack([x, x], -1)[..., 0] for x in flat[1]]
    flat = (flat[0], strided, *flat[2:])
    out, lse, mass = results = schemas.attention_forward(*flat, True)
    grads = schemas.attention_backward(out, lse, mass, out, lse, mass, *flat, *bits)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        fakes = [*schemas.attention_forward(*flat, True),
                 *schemas.attention_backward(out, lse, mass, out, lse, mass, *flat, *bits)]  # fmt: skip
    inputs = {x.untyped_storage().data_ptr() for x in (flat[0], *flat[1], *flat[2], *results)} - {0}
    for real, fake in zip([*results, *grads], fakes, strict=True):
        assert real.shape == fake.shape and real.dtype == fake.dtype and real.stride() == fake.stride()
        assert real.is_contiguous()
    assert not inputs & {x.untyped_storage().data_ptr() for x in grads}


SIZES = [([[3, 0, 2], [2, 4, 1]], [2, 3, 1]), ([[5, 1], [3, 3]], [4, 1]), ([[2, 2, 2, 7], [1, 0, 0, 1]], [1, 1, 2, 2])]


@pytest.fixture
def fresh_compiler():
    """No compiled code from other tests, and sizes that happen to be equal are not taken for the same size."""
    torch._dynamo.reset()
    with torch.fx.experimental._config.patch(use_duck_shape=False):
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("latent", [False, True])
def test_compile(latent, fresh_compiler):
    """Forward and backward without a graph break, and without a new graph for new sizes."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(cross_modal_attention, fullgraph=True, dynamic=True, backend=counter)
    graphs = 0
    for n, (lengths, query_lengths) in enumerate(SIZES):
        case = Case(lengths, None if latent else query_lengths, latent=n + 2, indexed=(1,), causal=(0,), width=8,
                    extras=EVERYTHING, around=1, dtype=torch.float32)  # fmt: skip
        results = []
        for function in (cross_modal_attention, compiled):
            leaves = case.to(torch.float32)
            outputs = case.call(function, leaves, **FLAGS)
            results.append((outputs, gradients(outputs, leaves, [torch.ones_like(x) for x in outputs])))
        (x, dx), (y, dy) = results
        assert all(torch.equal(a, b) for a, b in zip(x, y, strict=True))
        assert all(torch.equal(dx[name], dy[name]) for name in dx)
        graphs = graphs or counter.frame_count
    assert 0 < counter.frame_count == graphs
    with torch.no_grad():
        assert torch.equal(case.call(compiled), case.call(cross_modal_attention))


def test_compile_around_the_op_with_inductor(fresh_compiler):
    """from_padded, the op and arithmetic around it, with the default backend; one tensor is key and value."""

    def model(query, key, value, mask, bias):
        segments = [Segment.from_padded(key, value, mask), Segment.from_padded(key, key)]
        out, lse, mass = cross_modal_attention(query, segments, log_bias=bias.exp(), **FLAGS)
        return out.tanh().sum() + mass.square().sum() + lse.sum()

    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for batch, length in ((3, 4), (5, 7)):
        g = torch.Generator().manual_seed(batch)
        mask = torch.rand(batch, length, generator=g) < 0.7
        mask[:, 0] = True
        shapes = (2, 4, 8), (batch, length, 2, 8), (batch, length, 2, 8), (batch, 1, 1)
        leaves = [torch.randn(*shape, generator=g).requires_grad_() for shape in shapes]
        results = [f(*leaves[:3], mask, leaves[3]) for f in (model, compiled)]
        torch.testing.assert_close(*results)
        for a, b in zip(*(torch.autograd.grad(x, leaves) for x in results), strict=True):
            torch.testing.assert_close(a, b)


def test_autocast_casts_query_keys_and_values():
    case = CASES["everything"](dtype=torch.float32)
    leaves = case.to(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = case.call(cross_modal_attention, leaves, **FLAGS)
        grads = gradients(outputs, leaves, [torch.ones_like(x) for x in outputs])
    assert [x.dtype for x in outputs] == [torch.bfloat16, torch.float32, torch.float32]
    rounded = {n: x if n in EVERYTHING else x.to(torch.bfloat16) for n, x in case.leaves.items()}
    by_hand = {n: x.detach().requires_grad_() for n, x in rounded.items()}
    expected = case.call(cross_modal_attention, by_hand, **FLAGS)
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    expected_grads = gradients(expected, by_hand, [torch.ones_like(x) for x in expected])
    for n, grad in grads.items():
        assert grad.dtype == torch.float32 and torch.equal(grad, expected_grads[n].float())


def test_autocast_leaves_float64_alone():
    case = CASES["everything"]()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(case.call(cross_modal_attention), case.call(cross_modal_attention))
        assert case.call(cross_modal_attention).dtype == torch.float64
