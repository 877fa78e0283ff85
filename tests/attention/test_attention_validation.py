"""Bad input: the type of the error, and that its message names the argument."""

import pytest
import torch
from attention_providers import use_reference

from mmrec_kernels import library
from mmrec_kernels.attention import Segment, cross_modal_attention, layout

QUERY = torch.zeros(4, 4, 3)
OFFSETS = torch.tensor([0, 2, 4])
KEY, VALUE = torch.zeros(6, 2, 3), torch.zeros(6, 2, 5)
GOOD = Segment(KEY, VALUE, torch.tensor([0, 3, 6]))


def raises(error, message, *args, **kwargs):
    with pytest.raises(error, match=message):
        cross_modal_attention(*args, **kwargs)


def test_the_good_problem_is_good():
    assert cross_modal_attention(QUERY, [GOOD, GOOD], OFFSETS).shape == (4, 4, 5)


@pytest.mark.parametrize(
    ("query", "error", "message"),
    [
        (QUERY[0], ValueError, r"^query must have shape \[Tq, H, D\], got \[4, 3\]"),
        (QUERY.half(), TypeError, "^query must be float32 or bfloat16 or float64, got float16"),
        (QUERY.long(), TypeError, "^query must be"),
        ([1.0], TypeError, "^query must be a tensor, got list"),
        (QUERY[..., :0], ValueError, "^query must have shape .* D of at least 1"),
        (torch.zeros(4, 4, 2), ValueError, r"^segments\[0\].key must have shape \[Tm, Hkv, 2\]"),
        (torch.zeros(4, 3, 3), ValueError, r"^segments\[0\].key must have Hkv heads that divide the query's 3, got 2"),
        (torch.zeros(4, 4, 3, dtype=torch.bfloat16), TypeError, r"^segments\[0\].key must be bfloat16, got float32"),
        (torch.zeros(4, 4, 3, device="meta"), ValueError, r"^segments\[0\].key must be on meta, got cpu"),
    ],
)
def test_query(query, error, message):
    raises(error, message, query, [GOOD], OFFSETS)


@pytest.mark.parametrize(
    ("segments", "error", "message"),
    [
        ([], ValueError, "^segments must hold 1 to 62 segments, got 0"),
        ([GOOD] * 63, ValueError, "^segments must hold 1 to 62 segments, got 63"),
        (GOOD, TypeError, "^segments must be a list of Segment, got Segment"),
        (KEY, TypeError, "^segments must be a list of Segment, got Tensor"),
        ([GOOD, (KEY, VALUE, OFFSETS)], TypeError, r"^segments\[1\] must be a Segment, got tuple"),
        ([GOOD._replace(causal=1)], TypeError, r"^segments\[0\].causal must be a bool, got int"),
        ([GOOD._replace(key=None)], TypeError, r"^segments\[0\].key must be a tensor, got NoneType"),
        ([GOOD._replace(key=KEY[:, 0])], ValueError, r"^segments\[0\].key must have shape"),
        ([GOOD._replace(key=KEY[:, :0], value=VALUE[:, :0])], ValueError, r"^segments\[0\].key must have Hkv heads"),
        ([GOOD, GOOD._replace(key=KEY[:, :1])], ValueError, r"^segments\[1\].key must have shape \[Tm, 2, 3\]"),
        ([GOOD._replace(value=VALUE[:5])], ValueError, r"^segments\[0\].value must have shape \[6, 2, Dv\]"),
        ([GOOD._replace(value=VALUE[:, :1])], ValueError, r"^segments\[0\].value must have shape \[6, 2, Dv\]"),
        ([GOOD, GOOD._replace(value=VALUE[..., :4])], ValueError, r"^segments\[1\].value must have shape \[6, 2, 5\]"),
        ([GOOD._replace(value=VALUE.double())], TypeError, r"^segments\[0\].value must be float32, got float64"),
        ([GOOD._replace(offsets=OFFSETS.float())], TypeError, r"^segments\[0\].offsets must be int32 or int64"),
        ([GOOD._replace(offsets=OFFSETS[None])], ValueError, r"^segments\[0\].offsets must have shape \[B\+1\]"),
        ([GOOD._replace(offsets=OFFSETS[:0])], ValueError, r"^segments\[0\].offsets must have shape \[B\+1\]"),
        ([GOOD, GOOD._replace(offsets=OFFSETS[:2])], ValueError, r"^segments\[1\].offsets must have shape \[3\]"),
        ([GOOD._replace(offsets=[0, 3, 6])], TypeError, r"^segments\[0\].offsets must be a tensor, got list"),
        ([GOOD._replace(index=torch.zeros(6))], TypeError, r"^segments\[0\].index must be int32 or int64"),
        ([GOOD._replace(index=torch.zeros(6, 1).long())], ValueError, r"^segments\[0\].index must have shape"),
    ],
)
def test_segments(segments, error, message):
    raises(error, message, QUERY, segments, OFFSETS)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"query_offsets": OFFSETS[:2]}, ValueError, r"^query_offsets must have shape \[3\], got \[2\]"),
        ({"query_offsets": OFFSETS.float()}, TypeError, "^query_offsets must be int32 or int64"),
        ({"log_bias": torch.zeros(2, 1)}, ValueError, r"^log_bias must broadcast to \[B, H, M\] = \[2, 4, 1\]"),
        ({"log_bias": torch.zeros(1, 2, 4, 1)}, ValueError, "^log_bias must broadcast"),
        ({"log_bias": torch.zeros(1).long()}, TypeError, "^log_bias must be float32"),
        ({"log_bias": 0.0}, TypeError, "^log_bias must be a tensor, got float"),
        ({"value_gate": torch.zeros(3, 4, 1)}, ValueError, "^value_gate must broadcast"),
        ({"value_gate": torch.zeros(1, device="meta")}, ValueError, "^value_gate must be on cpu, got meta"),
        ({"sink": torch.zeros(2)}, ValueError, r"^sink must have shape \[4\], got \[2\]"),
        ({"sink": 0.0}, TypeError, "^sink must be a tensor, got float"),
        ({"query_norm": torch.zeros(4)}, ValueError, r"^query_norm must have shape \[3\]"),
        ({"key_norm": torch.zeros(3).long()}, TypeError, "^key_norm must be float32"),
        ({"scale": "1"}, TypeError, "^scale must be a float, got str"),
        ({"scale": True}, TypeError, "^scale must be a float, got bool"),
        ({"scale": float("nan")}, ValueError, "^scale must be finite, got nan"),
        ({"norm_eps": 0.0}, ValueError, "^norm_eps must be positive, got 0.0"),
        ({"norm_eps": -1e-6}, ValueError, "^norm_eps must be positive"),
        ({"norm_eps": None}, TypeError, "^norm_eps must be a float, got NoneType"),
    ],
)
def test_options(options, error, message):
    raises(error, message, QUERY, [GOOD], **({"query_offsets": OFFSETS} | options))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    ("segment", "query_offsets", "message"),
    [
        (GOOD, [0, 3, 2], "^query_offsets must be non-decreasing"),
        (GOOD, [0, 3, 5], r"^query_offsets must be non-decreasing and inside \[0, 4\]"),
        (GOOD, [-1, 3, 4], "^query_offsets must be non-decreasing"),
        (GOOD._replace(offsets=torch.tensor([0, 3, 7])), [0, 2, 4], r"^segments\[1\].offsets .* inside \[0, 6\]"),
        (GOOD._replace(offsets=torch.tensor([0, 3, 2])), [0, 2, 4], r"^segments\[1\].offsets must be non-decreasing"),
        (GOOD._replace(index=torch.zeros(5).long()), [0, 2, 4], r"^segments\[1\].offsets .* inside \[0, 5\]"),
        (GOOD._replace(index=torch.zeros(0).long()), [0, 2, 4], r"^segments\[1\].offsets .* inside \[0, 0\]"),
        (GOOD._replace(index=torch.arange(6) + 1), [0, 2, 4], r"^segments\[1\].index must .* inside \[0, 6\), got 6"),
        (GOOD._replace(index=torch.arange(6) - 2), [0, 2, 4], r"^segments\[1\].index must .*, got -2"),
    ],
)
def test_contents(segment, query_offsets, message, grad):
    raises(ValueError, message, QUERY.clone().requires_grad_(grad), [GOOD, segment], torch.tensor(query_offsets))


def test_contents_that_nothing_references_may_be_anything():
    index = torch.tensor([99, 0, 1, 2, -99])
    segment = Segment(KEY, VALUE, torch.tensor([1, 2, 4]), index)
    assert cross_modal_attention(QUERY, [segment], OFFSETS).isfinite().all()


def test_contents_on_a_device_that_does_not_check(monkeypatch):
    """Offsets are clamped, an index out of range acts as −1; MMREC_CHECK=1 asks for the check."""
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(x.shape, generator=g) for x in (QUERY, KEY, VALUE))
    index = torch.tensor([2, 99, -7, 0, 5, 6])

    def run(query_offsets, offsets, index):
        segment = Segment(key, value, torch.tensor(offsets), torch.tensor(index))
        return cross_modal_attention(query, [segment], torch.tensor(query_offsets), return_mass=True)

    use_reference(monkeypatch)
    expected = run([0, 2, 2, 4], [0, 4, 4, 6], [2, -1, -1, 0, 5, -1])
    monkeypatch.setattr(layout, "checks_contents", lambda device: library.check_requested())
    clamped = run([-5, 2, 1, 9], [-1, 4, 3, 10**12], index.tolist())
    assert torch.equal(clamped.out, expected.out) and torch.equal(clamped.mass, expected.mass)
    monkeypatch.setenv("MMREC_CHECK", "1")
    with pytest.raises(ValueError, match=r"^segments\[0\].index must"):
        run([0, 2, 2, 4], [0, 4, 4, 6], index.tolist())


@pytest.mark.parametrize(
    ("key", "value", "mask", "error", "message"),
    [
        (KEY, VALUE, None, ValueError, r"^key must have shape \[B, L, Hkv, D\]"),
        (KEY[None], VALUE[None, :5], None, ValueError, r"^value must have shape \[1, 6, 2, Dv\]"),
        (KEY[None], VALUE[None].double(), None, TypeError, "^value must be float32"),
        (KEY[None], VALUE[None], torch.ones(1, 5).bool(), ValueError, r"^mask must have shape \[1, 6\]"),
        (KEY[None], VALUE[None], torch.ones(1, 6), TypeError, "^mask must be bool, got float32"),
    ],
)
def test_from_padded(key, value, mask, error, message):
    with pytest.raises(error, match=message):
        Segment.from_padded(key, value, mask)


def test_each_op_has_one_provider_per_device():
    rows = [(p.op, p.device) for p in library.providers() if p.op.startswith("_attention")]
    assert rows == [(f"_attention_{way}", device) for way in ("forward", "backward") for device in ("cpu", "cuda")]
