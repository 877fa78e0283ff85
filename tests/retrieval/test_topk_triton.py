"""The Triton and CUDA C++ kernels of top_k: in the interpreter, compiled ahead of time, and on a GPU."""

from __future__ import annotations

import pytest
import torch
from topk_helpers import all_scores, check, lists, oracle, problem

from mmrec_kernels import schemas, top_k

triton = pytest.importorskip("triton")

GPU_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)


def flat(p, k, exclude=None, candidates=None):
    """The raw op's arguments."""
    none = (None, None)
    return (
        p["query"], p["items"], k, p.get("item_scales"), p["bias"], *(exclude or none), *(candidates or none), False
    )  # fmt: skip


def gpu_problem(b, n, d, dtype):
    made = problem(b, n, d, torch.float32 if dtype == torch.float16 else dtype)
    if dtype == torch.float16:
        made["query"], made["items"] = made["query"].half(), made["items"].half()
    if dtype == torch.int8:
        made["query"] = made["query"].to(torch.bfloat16)
    return made


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
@pytest.mark.parametrize("b, n, d, k", [(1, 150, 33, 5), (5, 70, 20, 3), (2, 9, 64, 12)])
def test_interpreted_kernel_matches_oracle(b, n, d, k, dtype):
    from mmrec_kernels.retrieval.triton import topk

    p = gpu_problem(b, n, d, dtype)
    scores, exclude, candidates = all_scores(**p), lists(b, n, 8), lists(b, n, 30)
    own = [{"candidates": candidates}, {"exclude": exclude, "candidates": candidates}]
    # A tile of 16 queries takes seconds to sort in the interpreter; own candidates never go through one.
    for chosen in [{"exclude": exclude}] if b > 4 else [{}, {"exclude": exclude}, *own]:
        values, ids = topk(*flat(p, k, **chosen))
        want, want_ids = oracle(scores, k, **chosen)
        assert torch.equal(ids, want_ids)
        torch.testing.assert_close(values.double(), want, rtol=1e-5, atol=1e-4)


@pytest.mark.interpret
def test_interpreted_kernel_keeps_ties_and_drops_nan():
    from mmrec_kernels.retrieval.triton import topk

    query, items = torch.randint(-2, 3, (2, 4)).float(), torch.randint(-2, 3, (140, 4)).float()
    items[5], items[7] = float("nan"), -0.0
    bias = torch.zeros(140)
    bias[9] = -float("inf")
    _, ids = topk(query, items, 20, None, bias, None, None, None, None, False)
    scores = all_scores(query, items, bias)
    scores[:, 5] = -float("inf")
    assert torch.equal(ids, oracle(scores, 20)[1])


SIGNATURE = {
    "scale_ptr": "*fp32", "bias_ptr": "*fp32", "exclude_offsets_ptr": "*i64", "exclude_ids_ptr": "*i64",
    "candidate_offsets_ptr": "*i64", "candidate_ids_ptr": "*i64", "partial_ptr": "*i64", "num_queries": "i32",
    "num_items": "i32", "width": "i32", "query_stride": "i32", "item_stride": "i32", "exclude_length": "i32",
    "candidate_length": "i32", "part": "i32",
}  # fmt: skip
# Queries, k, own candidates: each gives another tile configuration of block_sizes(). Those beyond (k > 128, or own
# candidates with k > 32) sort one long list per program and spill: they are for correctness, not speed.
CONFIGURATIONS = [(1, 10, False), (8, 10, True), (64, 10, False), (64, 50, False), (1, 100, False)]
DTYPES = [("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "i8")]
# Long lists take half a minute to compile each, and their sorts do not depend on the dtype.
TABLE = [(*c, *d) for c in CONFIGURATIONS for d in DTYPES if c[1] < 50 or d[0] == "bf16"]
# A tile of 16 sorted lists is allowed a few words, outside the loop over the width.
SPILL_BYTES = {1: 0, 16: 64}


@pytest.mark.parametrize("capability", (80, 90))
@pytest.mark.parametrize("num_queries, k, own, query, items", TABLE, ids=str)
def test_compiled_ahead_of_time_within_limits(num_queries, k, own, query, items, capability):
    from aot import compile_for
    from mmrec_kernels.retrieval.triton import _scan_kernel, block_sizes

    blocks = block_sizes(num_queries, 64, k, own)
    warps = blocks.pop("num_warps")
    constexprs = {
        "HAS_SCALE": items == "i8", "HAS_BIAS": True, "HAS_EXCLUDE": True, "HAS_CANDIDATES": own,
        "PRECISION": "ieee", "UPCAST": False, **blocks,
    }  # fmt: skip
    signature = {**SIGNATURE, "query_ptr": f"*{query}", "items_ptr": f"*{items}"}
    used = compile_for(_scan_kernel, signature, constexprs, capability, num_warps=warps)
    assert used.stack_bytes <= SPILL_BYTES[blocks["BLOCK_Q"]]
    assert used.registers * warps * 32 <= 65536
    assert used.shared_bytes <= 100 * 1024
    assert "tf32" not in used.ptx
    if blocks["BLOCK_Q"] > 1 and query != "fp32":
        assert "mma.sync" in used.ptx


@pytest.mark.parametrize("capability", (80, 90))
def test_merge_compiled_ahead_of_time(capability):
    from aot import compile_for
    from mmrec_kernels.retrieval.triton import _merge_kernel

    signature = {"partial_ptr": "*i64", "scores_ptr": "*fp32", "ids_ptr": "*i64", "k": "i32", "num_splits": "i32"}
    assert compile_for(_merge_kernel, signature, {"K": 16}, capability).stack_bytes == 0


GPU_SHAPES = [
    (1, 100, 64, 5),
    (7, 1000, 33, 10),
    (40, 777, 128, 100),
    (300, 20000, 64, 10),
    (3, 5000, 64, 1500),
    (5, 3, 7, 9),
]


@pytest.mark.gpu
@pytest.mark.parametrize("op", (schemas.retrieval_topk, schemas.retrieval_topk_stream), ids=str)
@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_gpu_kernels_match_oracle(shape, dtype, op):
    b, n, d, k = shape
    p = gpu_problem(b, n, d, dtype)
    scores, exclude, candidates = all_scores(**p), lists(b, n), lists(b, n, 60)
    on_gpu = {name: t.cuda() for name, t in p.items()}
    for chosen in ({}, {"exclude": exclude}, {"candidates": candidates}):
        there = {name: tuple(t.cuda() for t in pair) for name, pair in chosen.items()}
        values, ids = op(*flat(on_gpu, k, **there))
        again = op(*flat(on_gpu, k, **there))
        assert torch.equal(again[0], values) and torch.equal(again[1], ids)
        from mmrec_kernels import TopK

        check(TopK(values.cpu(), ids.cpu()), scores, k, **chosen)


@pytest.mark.gpu
def test_gpu_offsets_outside_the_list_are_clamped_and_captured_in_a_graph():
    p = {name: t.cuda() for name, t in problem(2, 500, 64, torch.float32).items()}
    wild = (torch.tensor([-5, 2, 1 << 40]).cuda(), torch.tensor([3, 1 << 40, -7]).cuda())
    expected = top_k(**p, k=5, exclude=wild)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        top_k(**p, k=5, exclude=wild)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = top_k(**p, k=5, exclude=wild)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured.ids, expected.ids)
