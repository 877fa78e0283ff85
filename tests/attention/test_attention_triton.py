"""The Triton kernels of attention: in the interpreter, compiled ahead of time, and on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from attention_oracle import CASES, EVERYTHING, FLAGS, Case, gradients, oracle, upstream
from attention_providers import use_reference, use_triton
from test_attention_kernel import CASES as MANY_BLOCKS

from gpu import assert_captured
from mmrec_kernels.attention import Segment, arguments, cross_modal_attention
from numerics import FLOORS, errors

triton = pytest.importorskip("triton")

MORE = {
    "long queries": lambda **k: Case([[40, 3, 0, 17], [20, 0, 0, 5]], [33, 2, 20, 18], **k),
    "long queries, everything": lambda **k: Case(
        [[40, 3, 0, 17], [20, 0, 0, 5], [6, 1, 2, 3]], [33, 2, 20, 18], indexed=(1,), causal=(0,),
        extras=EVERYTHING, around=3, **k
    ),
    "long latent queries": lambda **k: Case(
        [[40, 3, 0], [20, 0, 0]], latent=19, indexed=(0,), extras=EVERYTHING, **k
    ),
    "long queries, one tile of keys": lambda **k: Case([[9, 3, 0], [2, 0, 0]], [33, 40, 20], extras=EVERYTHING, **k),
    "long causal": lambda **k: Case([[50, 7], [3, 20]], [50, 7], heads=2, causal=(0, 1), extras=("log_bias",), **k),
    "many segments": lambda **k: Case([[2, 1]] * 7, [2, 3], extras=EVERYTHING, **k),
}  # fmt: skip


def results(function: Any, case: Case, dtype: torch.dtype, above: Any, **more: Any) -> dict[str, torch.Tensor]:
    """Outputs, finite ones, and gradients by name."""
    leaves = case.to(dtype)
    outputs = case.call(function, leaves, **more)
    grads = gradients(outputs, leaves, above(outputs))
    named = dict(zip(("out", "lse", "mass"), outputs, strict=True))
    for kind in ("key", "value"):  # those of all segments are one result of the raw op
        named[f"d{kind}s"] = torch.cat([grads.pop(n).flatten() for n in list(grads) if n[:-1] == kind])
    named |= {f"d{n}": x for n, x in grads.items()}
    return {n: torch.where(x.isfinite(), x, 0).detach() for n, x in named.items()}


# The interpreter multiplies float16 exactly; its bfloat16 stores truncate, which is one unit in the last place.
TRUNCATED = {torch.bfloat16: torch.finfo(torch.bfloat16).eps}


def check_against_eager(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule: at most twice the error of eager torch in the same dtype, plus the floor."""
    case.leaves = {n: x.to(dtype) for n, x in case.leaves.items()}
    exact = results(oracle, case, torch.float64, upstream)
    eager = results(oracle, case, dtype, upstream)
    use_triton(monkeypatch)
    ours = results(cross_modal_attention, case, dtype, upstream, **FLAGS)
    for name, x in ours.items():
        for got, theirs in zip(errors(x, exact[name]), errors(eager[name], exact[name]), strict=True):
            assert got <= 2 * theirs + FLOORS[dtype] + TRUNCATED.get(dtype, 0.0), (name, got, theirs)


NARROW = [(name, dtype) for name in [*CASES, *MORE] for dtype in (torch.float32, torch.float16)]
NARROW += [(name, torch.bfloat16) for name in MORE]  # the same lines as for float16


@pytest.mark.interpret
@pytest.mark.parametrize(("name", "dtype"), NARROW, ids=str)
def test_interpreted_kernels_match_the_oracle(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    check_against_eager((CASES | MORE)[name](width=16, value_width=12), dtype, monkeypatch)


# Several tiles of queries and keys, exactly: one head, few rows, causal, latent.
@pytest.mark.interpret
@pytest.mark.parametrize("name", ["few rows", "one query head", "causal", "few latent"])
def test_interpreted_kernels_equal_the_reference_over_many_tiles(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = MANY_BLOCKS[name]()
    with monkeypatch.context() as patched:
        use_reference(patched)
        exact = results(cross_modal_attention, case, torch.float64, upstream, **FLAGS)
    use_triton(monkeypatch)
    for what, x in results(cross_modal_attention, case, torch.float64, upstream, **FLAGS).items():
        assert max(errors(x, exact[what])) <= 1e-12, what


@pytest.mark.interpret
@pytest.mark.parametrize("name", ["long queries, everything", "long latent queries", "everything", "many segments"])
def test_interpreted_gradients_are_exact(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, beside autograd through the oracle; a second run gives the same bits. Memory that the launchers ask
    for holds NaN, so that what nobody writes is seen."""
    case = (CASES | MORE)[name]()
    exact = results(oracle, case, torch.float64, upstream)
    use_triton(monkeypatch)
    new_empty = torch.Tensor.new_empty

    def poisoned(self: torch.Tensor, *args: Any, **more: Any) -> torch.Tensor:
        found = new_empty(self, *args, **more)
        return found.fill_(torch.nan) if found.is_floating_point() else found

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    ours, again = (results(cross_modal_attention, case, torch.float64, upstream, **FLAGS) for _ in range(2))
    for what, x in ours.items():
        assert max(errors(x, exact[what])) <= 1e-13, what
        assert torch.equal(x, again[what]), what


@pytest.mark.interpret
def test_interpreted_store_gradients_by_one_head_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmrec_kernels.attention.triton import backward_pass

    case = Case([[30, 4], [3, 40]], [2, 20], kv_heads=4, indexed=(0, 1), extras=("key_norm",), around=1)
    use_triton(monkeypatch)
    whole = results(cross_modal_attention, case, torch.float64, upstream, **FLAGS)
    monkeypatch.setattr(backward_pass, "SHARE_BYTES", 1)
    apart = results(cross_modal_attention, case, torch.float64, upstream, **FLAGS)
    assert all(torch.equal(x, apart[what]) for what, x in whole.items())


@pytest.mark.interpret
def test_interpreted_float16_takes_norms_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights whose product with a query would leave the numbers of float16."""
    for size in (1e-4, 1e4):
        case = Case([[9, 3]], [2, 3], width=16, extras=("query_norm", "key_norm"))
        case.leaves["query_norm"] = case.leaves["query_norm"].abs() * size
        case.leaves["key_norm"] = case.leaves["key_norm"].abs() * size
        case.leaves = {n: x.half().double() if "norm" not in n else x for n, x in case.leaves.items()}
        scale = 0.25 / size**2
        exact = case.call(oracle, scale=scale)
        with monkeypatch.context() as patched:
            use_triton(patched)
            narrow = {n: x.half() if "norm" not in n else x.float() for n, x in case.leaves.items()}
            ours = case.call(cross_modal_attention, narrow, scale=scale, **FLAGS)
        for x, y in zip(ours, exact, strict=True):
            assert max(errors(x, y)) <= 2e-3


@pytest.mark.interpret
@pytest.mark.parametrize("bias", [-1e9, -1e30, torch.finfo(torch.float32).min])
def test_interpreted_bias_that_masks_all_there_is(bias: float, monkeypatch: pytest.MonkeyPatch) -> None:
    use_triton(monkeypatch)
    case = Case([[20]], [3], width=16, value_width=16)
    leaves = case.to(torch.float32)

    def differentiated(**more: Any) -> tuple[torch.Tensor, ...]:
        out = case.call(cross_modal_attention, leaves, **more)
        return out, *torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out) * 0.5)

    masked = differentiated(log_bias=torch.full((1, 1, 1), bias))
    for biased, plain in zip(masked, differentiated(), strict=True):
        torch.testing.assert_close(biased, plain, rtol=2e-3, atol=2e-3 * float(plain.abs().max()))


@pytest.mark.interpret
@pytest.mark.parametrize("latent", [False, True])
def test_interpreted_kernels_take_empty_sizes(latent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    use_triton(monkeypatch)
    for lengths, queries in (([[], []], []), ([[0], [0]], [0]), ([[2], [1]], [0])):
        case = Case(lengths, None if latent else queries, around=2, extras=EVERYTHING)
        found = results(cross_modal_attention, case, torch.float32, upstream, **FLAGS)
        assert all(x.isfinite().all() for x in found.values())


@pytest.mark.interpret
def test_interpreted_kernels_clamp_what_is_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU without MMREC_CHECK: an entry out of range is −1, an offset out of range the nearest that is not."""
    use_triton(monkeypatch)
    query, key = torch.randn(6, 2, 16), torch.randn(20, 2, 16, requires_grad=True)

    def differentiated(offsets: list[int], entries: list[int], index: list[int], queries: list[int]) -> Any:
        segments = [
            Segment(key, key, torch.tensor(offsets)),
            Segment(key, key, torch.tensor(entries), torch.tensor(index)),
        ]
        out = cross_modal_attention(query, segments, torch.tensor(queries))
        return out, torch.autograd.grad(out.square().sum(), key)[0]

    right = differentiated([0, 8, 20], [0, 2, 4], [0, -1, -1, 19], [0, 3, 6])
    with pytest.raises(ValueError, match="offsets"):
        differentiated([-5, 8, 100], [0, 2, 9], [0, 99, -7, 19], [0, 3, 50])
    monkeypatch.setattr(arguments, "checks_contents", lambda device: False)
    wrong = differentiated([-5, 8, 100], [0, 2, 9], [0, 99, -7, 19], [0, 3, 50])
    assert all(torch.equal(a, b) for a, b in zip(wrong, right, strict=True))


@pytest.mark.interpret
def test_interpreted_kernels_leave_wide_heads_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case([[5]], [2], width=300, value_width=4)
    with monkeypatch.context() as patched:
        use_reference(patched)
        exact = results(cross_modal_attention, case, torch.float64, upstream, **FLAGS)
    use_triton(monkeypatch)
    ours = results(cross_modal_attention, case, torch.float64, upstream, **FLAGS)
    assert all(torch.equal(x, exact[what]) for what, x in ours.items())


@pytest.mark.parametrize("asked", ["tf32", "ieee"])
def test_float32_products_follow_torchs_own_precision(asked: str) -> None:
    """Also where it was asked for by `fp32_precision`, after which reading `allow_tf32` raises."""
    from mmrec_kernels.triton_common import precision

    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = asked
        assert precision(torch.float32) == asked and precision(torch.bfloat16) == "ieee"
    finally:
        matmul.fp32_precision = before


# ---- ahead of time ---------------------------------------------------------------------------------------------------

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
EVERY_FLAG = {
    "INDEXED": 2, "CAUSAL": 1, "HAS_BIAS": True, "HAS_GATE": True, "HAS_SINK": True, "HAS_LSE": True, "HAS_MASS": True,
    "HAS_QUERY_NORM": True, "HAS_KEY_NORM": True, "RETURN_MASS": True, "NEED_BIAS": True, "NEED_GATE": True,
    "NEED_REST": True,
}  # fmt: skip
SEGMENTS = 3


def compiled(name: str, dtype: str, width: int, rows: int, masked: bool, capability: int) -> Any:
    """Resources of a kernel in its shipped configuration; `masked`: everything that an argument can ask for."""
    import triton.language as tl

    from aot import compile_for
    from mmrec_kernels.attention.triton import backward_kernels, block_sizes, forward_kernels
    from mmrec_kernels.attention.triton.backward_pass import Destination, RowGrads, Upstream
    from mmrec_kernels.attention.triton.tiles import Keys, PerSegment, Queries

    kernel = getattr(forward_kernels if name == "forward" else backward_kernels, f"{name}_kernel")
    blocks = block_sizes(name, rows, 150 if rows > 4 else 12, width, width, DTYPES[dtype])
    warps, stages = blocks.pop("num_warps"), blocks.pop("num_stages")
    constants: dict[str, Any] = {
        "LONG": False, "LATENT": False, **{flag: type(on)(0) for flag, on in EVERY_FLAG.items()}, "BY_HEAD": False,
        "FIT": False, "GROUP": 1, "ALIGN": 16, "GRAD_ALIGN": 16, "NEED_QUERY": True, "KEY_NEEDS": 2**SEGMENTS - 1,
        "VALUE_NEEDS": 2**SEGMENTS - 1, "PRECISION": "ieee", "UPCAST": False, "WIDE": tl.float32, **blocks,
    }  # fmt: skip
    constants |= EVERY_FLAG if masked else {}
    constants = {n: v for n, v in constants.items() if n in kernel.arg_names}
    rows_of, wide, count = f"*{dtype}:16", "*fp32:16", "i32:16"
    small = PerSegment(wide, "i32", "i32", "i32")
    grads = (Destination(rows_of, count),) * SEGMENTS
    types = {
        "queries": Queries(rows_of, count, count, count, "*i64:16", wide, wide, "fp32", "fp32", "fp32"),
        "segments": (Keys(rows_of, count, count, rows_of, count, count, count, "*i64:16", count),) * SEGMENTS,
        "offsets_ptr": "*i64", "table_ptr": "*i32", "starts_ptr": "*i64", "bias": small, "gate": small,
        "sink_ptr": "*fp32", "out_ptr": f"*{dtype}", "lse_ptr": "*fp64", "mass_ptr": "*fp32",
        "upstream": Upstream(rows_of, wide, wide, rows_of, "*fp64:16", wide),
        "row_grads": RowGrads(rows_of, wide, wide, wide), "key_grads": grads, "value_grads": grads,
    }  # fmt: skip
    signature = {a: types.get(a, "i32") for a in kernel.arg_names if a not in constants}
    return compile_for(kernel, signature, constants, capability, num_warps=warps, num_stages=stages), warps


# Kernel, dtype, width, rows of queries: what takes another configuration.
TABLE = [
    (name, dtype, width, rows)
    for dtype, width in (("bf16", 32), ("bf16", 64), ("fp16", 128), ("bf16", 256), ("fp32", 64), ("fp32", 128))
    for name, rows in (("forward", 4), ("forward", 64), ("rows", 4), ("rows", 16), ("rows", 64), ("keys", 64))
]


# A few words beside tiles that would otherwise be half as large.
SPILL_BYTES = {
    ("rows", "bf16", 32): 8, ("rows", "bf16", 64): 120, ("forward", "fp32", 64): 8, ("forward", "fp32", 128): 8,
    ("rows", "fp32", 128): 176, ("keys", "fp32", 128): 144,
}  # fmt: skip
EVERYTHING_SPILL_BYTES = {"forward": 0, "rows": 424, "keys": 368}


@pytest.mark.parametrize("capability", (80, 90))
@pytest.mark.parametrize(("name", "dtype", "width", "rows"), TABLE, ids=str)
def test_compiled_ahead_of_time_within_limits(name: str, dtype: str, width: int, rows: int, capability: int) -> None:
    used, warps = compiled(name, dtype, width, rows, False, capability)
    assert used.stack_bytes <= SPILL_BYTES.get((name, dtype, width), 0)
    assert used.registers * warps * 32 <= 65536
    assert used.shared_bytes <= 100 * 1024
    assert "tf32" not in used.ptx
    assert "ld.global.b16" not in used.ptx  # rows are read in whole vectors
    assert ("mma" in used.ptx) == (dtype != "fp32")


@pytest.mark.parametrize("capability", (80, 90))
@pytest.mark.parametrize(("name", "rows"), [("forward", 16), ("rows", 16), ("keys", 64)])
def test_everything_at_once_compiled_ahead_of_time(name: str, rows: int, capability: int) -> None:
    used, warps = compiled(name, "bf16", 64, rows, True, capability)
    assert used.stack_bytes <= EVERYTHING_SPILL_BYTES[name]
    assert used.registers * warps * 32 <= 65536 and used.shared_bytes <= 100 * 1024


def test_launches_compiled_ahead_of_time() -> None:
    """Every kernel, as the launchers ask for it; and 29 more ragged batches of a model, which may need other sizes of
    tiles once, but no kernel for numbers of their own."""
    from aot import launches_of

    told = launches_of(Path(__file__).parent)
    assert set(told["everything"]) == {
        "table_kernel", "forward_kernel", "rows_kernel", "keys_kernel", "reference_sums_kernel", "clear_kernel",
        "norm_backward_kernel", "row_sums_kernel",
    }  # fmt: skip
    assert max(told["ragged"].values(), default=0) <= 2, told["ragged"]


# ---- on a GPU --------------------------------------------------------------------------------------------------------


def on_gpu(case: Case) -> Case:
    case.plan = [(o.cuda(), None if i is None else i.cuda(), c) for o, i, c in case.plan]
    case.query_offsets = None if case.query_offsets is None else case.query_offsets.cuda()
    return case


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*MORE, *MANY_BLOCKS])
def test_gpu_kernels_match_the_oracle(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    make = (MORE | MANY_BLOCKS)[name]
    case = make()
    case.leaves = {n: x.to(dtype).double() for n, x in case.leaves.items()}
    with monkeypatch.context() as patched:
        use_reference(patched)
        exact = results(cross_modal_attention, case, torch.float64, upstream, **FLAGS)
    case = on_gpu(case)
    case.leaves = {n: x.cuda() for n, x in case.leaves.items()}

    def above(outputs: Any) -> list[torch.Tensor]:
        return [u.cuda() for u in upstream([x.cpu() for x in outputs])]

    ours, again = (results(cross_modal_attention, case, dtype, above, **FLAGS) for _ in range(2))
    limit = {torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 2 * torch.finfo(torch.bfloat16).eps}[dtype]
    for what, x in ours.items():
        assert torch.equal(x, again[what]), what
        assert max(errors(x.cpu(), exact[what])) <= limit, what


@pytest.mark.gpu
def test_gpu_attention_is_captured_in_a_graph() -> None:
    case = on_gpu(MANY_BLOCKS["indexed"]())
    case.leaves = {n: x.cuda() for n, x in case.leaves.items()}
    leaves = case.to(torch.bfloat16)

    def step() -> tuple[torch.Tensor, ...]:
        out = case.call(cross_modal_attention, leaves)
        return out, *torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))

    assert_captured(step)


@pytest.mark.gpu
def test_gpu_takes_seventy_thousand_sequences() -> None:
    batch = 70_000
    query, key = (torch.randn(n, 2, 16, device="cuda", requires_grad=True) for n in (batch, 2 * batch))
    offsets = torch.arange(batch + 1, device="cuda")
    out = cross_modal_attention(query, [Segment(key, key, 2 * offsets)], offsets)
    pairs = key.view(batch, 2, 2, 16)
    weights = (torch.einsum("bhd,bkhd->bhk", query, pairs) / 4).softmax(-1)
    torch.testing.assert_close(out, torch.einsum("bhk,bkhd->bhd", weights, pairs), rtol=1e-4, atol=1e-5)
    out.square().sum().backward()
    assert query.grad is not None and query.grad.isfinite().all()


@pytest.mark.gpu
def test_gpu_takes_wrong_offsets_and_indices_without_touching_what_is_outside() -> None:
    key, query = torch.randn(20, 2, 16, device="cuda", requires_grad=True), torch.randn(6, 2, 16, device="cuda")
    index = torch.tensor([0, 99, -7, 19], device="cuda")
    segments = [
        Segment(key, key, torch.tensor([-5, 8, 100], device="cuda")),
        Segment(key, key, torch.tensor([0, 2, 9], device="cuda"), index),
    ]
    out = cross_modal_attention(query, segments, torch.tensor([0, 3, 50], device="cuda"))
    out.sum().backward()
    right = [
        Segment(key, key, torch.tensor([0, 8, 20], device="cuda")),
        Segment(key, key, torch.tensor([0, 2, 4], device="cuda"), torch.tensor([0, -1, -1, 19], device="cuda")),
    ]
    assert torch.equal(out, cross_modal_attention(query, right, torch.tensor([0, 3, 6], device="cuda")))
