"""Every sentence of the contract, in float64, against the oracle, SDPA, or the op itself on an equivalent problem."""

import re
from pathlib import Path

import pytest
import torch
from attention_oracle import CASES, EVERYTHING, FLAGS, Case, both, gradients, normal, oracle, upstream
from torch.nn.functional import scaled_dot_product_attention

from mmrec_kernels.attention import AttentionOutput, Segment, cross_modal_attention

pytestmark = pytest.mark.usefixtures("provider")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("norm_eps", [1e-6, 0.3])
def test_equals_the_oracle(name, norm_eps):
    case = CASES[name]()
    scale = {} if norm_eps == 1e-6 else {"scale": -1.7}
    outputs, grads = both(case, norm_eps=norm_eps, **scale)
    leaves = case.to(torch.float64)
    expected = case.call(oracle, leaves, norm_eps=norm_eps, **scale)
    for x, y in zip(outputs, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)
    for leaf, grad in gradients(expected, leaves, upstream(expected)).items():
        torch.testing.assert_close(grads[leaf], grad, rtol=1e-10, atol=1e-12, msg=lambda m, leaf=leaf: f"{leaf}: {m}")


@pytest.mark.parametrize("shape", [(2, 4, 3), (2, 1, 3), (1, 4, 1), (2, 1, 1), (3,), (4, 3), (4, 1), ()])
@pytest.mark.parametrize("name", ["log_bias", "value_gate"])
def test_bias_and_gate_broadcast_and_their_gradients_are_reduced(name, shape):
    case = Case([[3, 0], [2, 4], [1, 1]], [2, 3])
    case.leaves[name] = normal(*shape, seed=1)
    outputs, grads = both(case)
    leaves = case.to(torch.float64)
    expected = case.call(oracle, leaves)
    torch.testing.assert_close(outputs.out, expected[0], rtol=1e-10, atol=1e-12)
    assert grads[name].shape == shape
    expected_grads = gradients(expected, leaves, upstream(expected))
    torch.testing.assert_close(grads[name], expected_grads[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_one_segment_equals_sdpa(causal, kv_heads):
    q, k, v = normal(3, 5, 4, 8), normal(3, 5, kv_heads, 8, seed=1), normal(3, 5, kv_heads, 6, seed=2)
    expected = scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal, enable_gqa=True
    ).transpose(1, 2)
    offsets = torch.arange(4) * 5
    out = cross_modal_attention(q.flatten(0, 1), [Segment.from_padded(k, v, causal=causal)], offsets)
    torch.testing.assert_close(out.view_as(expected), expected)


def test_latent_queries_equal_repeated_queries():
    case = Case([[3, 1, 0], [2, 2, 2]], latent=3, extras=EVERYTHING)
    repeated = Case([[3, 1, 0], [2, 2, 2]], [3, 3, 3], extras=EVERYTHING)
    repeated.leaves = case.leaves | {"query": case.leaves["query"].repeat(3, 1, 1)}
    (outputs, grads), (expected, repeated_grads) = both(case), both(repeated)
    assert outputs.out.shape == (9, 4, 5)
    for x, y in zip(outputs, expected, strict=True):
        torch.testing.assert_close(x, y)
    torch.testing.assert_close(grads["query"], repeated_grads["query"].view(3, 3, 4, 3).sum(0))
    torch.testing.assert_close(grads["key0"], repeated_grads["key0"])


def test_from_padded_never_reads_masked_rows():
    mask = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])
    key, value = normal(3, 3, 2, 3), normal(3, 3, 2, 5, seed=1)
    key[~mask], value[~mask] = torch.nan, torch.inf
    key.requires_grad_(), value.requires_grad_()
    query = normal(4, 2, 3, seed=2)
    padded = cross_modal_attention(query, [Segment.from_padded(key, value, mask)], torch.tensor([0, 1, 2, 4]))
    rows = Segment(key[mask], value[mask], torch.tensor([0, 2, 2, 5]))
    packed = cross_modal_attention(query, [rows], torch.tensor([0, 1, 2, 4]))
    torch.testing.assert_close(padded, packed)
    g = normal(4, 2, 5, seed=3)
    got = torch.autograd.grad(padded, (key, value), g)
    for x, y in zip(got, torch.autograd.grad(packed, (key, value), g), strict=True):
        torch.testing.assert_close(x, y)
        assert not x[~mask].any()


def test_from_padded_copies_nothing():
    key, value = normal(2, 3, 2, 3), normal(2, 3, 2, 5)
    segment = Segment.from_padded(key, value, torch.ones(2, 3, dtype=torch.bool))
    assert segment.key.data_ptr() == key.data_ptr() and segment.value.data_ptr() == value.data_ptr()
    assert segment.index is not None and not segment.causal
    assert Segment.from_padded(key, value).index is None


def test_flags_and_gradients_change_no_bit():
    case = CASES["everything"](dtype=torch.float32)
    leaves = case.to(torch.float32)
    plain = case.call(cross_modal_attention)
    assert type(plain) is torch.Tensor and plain.dtype == torch.float32
    for lse, mass in [(True, False), (False, True), (True, True)]:
        result = case.call(cross_modal_attention, return_lse=lse, return_mass=mass)
        assert type(result) is AttentionOutput and torch.equal(result.out, plain)
        assert (result.lse is not None, result.mass is not None) == (lse, mass)
    with_grad = case.call(cross_modal_attention, leaves, **FLAGS)
    assert with_grad.out.requires_grad and with_grad.mass.requires_grad and with_grad.lse.requires_grad
    for x, y in zip(with_grad, case.call(cross_modal_attention, **FLAGS), strict=True):
        assert torch.equal(x, y)
    with torch.no_grad():
        assert not case.call(cross_modal_attention, leaves).requires_grad


def test_mass_sums_to_one_or_leaves_the_share_of_the_sink():
    out = CASES["three segments"]().call(cross_modal_attention, **FLAGS)
    torch.testing.assert_close(out.mass.sum(-1), torch.ones_like(out.lse))
    case = Case([[3, 1], [0, 2]], [2, 1], extras=("sink", "log_bias"))
    out = case.call(cross_modal_attention, **FLAGS)
    torch.testing.assert_close(out.mass.sum(-1), 1 - (case.leaves["sink"] - out.lse).exp())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtypes_of_results(dtype):
    outputs, grads = both(CASES["everything"](dtype=dtype))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert [x.dtype for x in outputs] == [dtype, wide, wide]
    assert all(x.is_contiguous() for x in outputs)
    assert {g.dtype for g in grads.values()} == {dtype}


def test_small_arguments_may_be_float32_beside_bfloat16():
    case = CASES["everything"](dtype=torch.bfloat16)
    leaves = case.to(torch.bfloat16)
    for name in EVERYTHING:
        leaves[name] = leaves[name].detach().float().requires_grad_()
    outputs = case.call(cross_modal_attention, leaves, **FLAGS)
    grads = gradients(outputs, leaves, upstream(outputs))
    assert outputs.out.dtype == torch.bfloat16
    assert all(grads[name].dtype == (torch.float32 if name in EVERYTHING else torch.bfloat16) for name in grads)


@pytest.mark.parametrize(
    "case",
    [
        Case([[], []], []),
        Case([[], []], latent=2),
        Case([[2, 1]], [0, 0], extras=EVERYTHING[2:]),
        Case([[2, 1]], latent=0),
        Case([[0, 0]], [1, 1], around=2),
        Case([[2, 1]], [1, 2], value_width=0),
    ],
)
def test_empty_inputs(case):
    outputs, grads = both(case)
    expected = case.call(oracle)
    for x, y in zip(outputs, expected, strict=True):
        assert x.shape == y.shape
        torch.testing.assert_close(x, y)
    assert all(grads[name].shape == x.shape for name, x in case.leaves.items())
    assert not any(grads[name].any() for name in grads if name.startswith("value"))


def test_int32_offsets_and_index():
    case, narrow = CASES["everything"](), CASES["everything"]()
    narrow.plan = [(o.int(), None if i is None else i.int(), c) for o, i, c in case.plan]
    narrow.query_offsets = case.query_offsets.int()
    assert torch.equal(case.call(cross_modal_attention), narrow.call(cross_modal_attention))


@pytest.mark.parametrize("how", ["strided", "expanded"])
def test_strides_change_no_bit(how):
    case, other = CASES["everything"](), CASES["everything"]()
    if how == "strided":
        other.leaves = {n: torch.stack([x, x], -1)[..., 0] for n, x in case.leaves.items()}
        assert not any(x.is_contiguous() for x in other.leaves.values())
    else:
        other.leaves |= {n: x[:, :1].expand_as(x) for n, x in case.leaves.items() if x.ndim == 3}
        case.leaves = {n: x.contiguous() for n, x in other.leaves.items()}
    assert torch.equal(case.call(cross_modal_attention), other.call(cross_modal_attention))
    leaves = {n: x.detach().requires_grad_() for n, x in other.leaves.items()}
    outputs = other.call(cross_modal_attention, leaves, **FLAGS)
    _, expected = both(case)
    got = gradients(outputs, leaves, upstream(outputs))
    assert all(torch.equal(got[n], expected[n]) for n in got)


def test_many_short_sequences(provider):
    """More sequences than a CUDA grid dimension holds."""
    if provider == "triton":
        pytest.skip("the interpreter takes minutes; a GPU has the same test")
    batch = 70_000
    key, value, query = (normal(n, 1, 2, seed=n, dtype=torch.float32) for n in (batch * 2, batch * 2 + 1, 1))
    offsets = torch.arange(batch + 1) * 2
    out = cross_modal_attention(query, [Segment(key, value[1:], offsets)])
    weights = (key.view(batch, 2, 2) @ query.view(2) * 2**-0.5).softmax(-1)
    torch.testing.assert_close(out.view(batch, 2), (weights[..., None] * value[1:].view(batch, 2, 2)).sum(1))


def test_runs_repeat_bit_for_bit():
    case = Case([[40, 3, 17] * 10, [5, 0, 9] * 10], [7, 2, 1] * 10, indexed=(1,), causal=(0,), width=16,
                extras=EVERYTHING, dtype=torch.float32)  # fmt: skip
    first, first_grads = both(case)
    for _ in range(3):
        again, again_grads = both(case)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert all(torch.equal(first_grads[n], again_grads[n]) for n in first_grads)


def test_the_examples_of_the_page_run():
    """They hold assertions."""
    page = (Path(__file__).parents[2] / "docs" / "attention.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        exec(compile(example, "docs/attention.md", "exec"), {})
