"""`top_k` beside torch's product and top-k and faiss' flat indexes.

float32, bfloat16 (float16 on GPU) items against a query of the same dtype; int8 items with a step per item against a
float32 query, which is not rounded. The oracle is the exact top-k of the given (already rounded) items in float64.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import schemas
from ..retrieval import top_k
from .case import Call, Case, Inputs, Provider, Work, by_candidate, generator, our_name, torch_dtype

OP = "retrieval"
MODES = ("forward",)
DTYPES = {"cpu": ("float32", "bfloat16", "int8"), "cuda": ("float32", "bfloat16", "float16", "int8")}
SHAPES = {
    "small": ((1, 20_000, 64), (32, 20_000, 64), (64, 4_000, 128)),
    "full": (
        (1, 100_000, 64),
        (1, 1_000_000, 64),
        (1, 1_000_000, 128),
        (4, 1_000_000, 64),
        (32, 100_000, 64),
        (32, 1_000_000, 64),
        (256, 1_000_000, 64),
        (1024, 12_000, 128),
    ),
}  # queries, items, width
KS = (10, 100)
CHUNKS = (8_192, 32_768, 131_072)
_SAMPLE = 131_072
_ORACLE_CHUNK = 65_536


def cases(
    shapes: str,
    device: str,
    dtypes: Sequence[str],
    modes: Sequence[str] = MODES,
    ks: Sequence[int] = KS,
    candidates: bool = False,
) -> list[Case]:
    """One case per shape, dtype and k; with `candidates` also by the CUDA C++ kernel that does not serve yet."""
    return [case(shape, dtype, device, k, candidates) for shape in SHAPES[shapes] for dtype in dtypes for k in ks]


def case(shape: tuple[int, int, int], dtype: str, device: str, k: int, candidates: bool = False) -> Case:
    """The case of `queries, items, width`. Read: items, their steps and the queries, once. Written: scores and ids."""
    queries, items, width = shape
    item_bytes = 1 if dtype == "int8" else torch_dtype(dtype).itemsize
    query_bytes = 4 if dtype == "int8" else item_bytes
    work = Work(
        flops=2 * queries * items * width,
        read=items * width * item_bytes + queries * width * query_bytes + (4 * items if dtype == "int8" else 0),
        written=queries * k * (4 + 8),
    )
    return Case(
        OP,
        {"queries": queries, "items": items, "width": width, "k": k},
        dtype,
        device,
        "forward",
        work,
        providers(dtype, device, queries, candidates),
        inputs=lambda: inputs(shape, dtype, device, k),
        judge=judge,
        compute_dtype=torch.float32 if dtype == "int8" else torch_dtype(dtype),
    )


def inputs(shape: tuple[int, int, int], dtype: str, device: str, k: int) -> Inputs:
    """Standard normal queries and items; int8 items are normal rows over their largest entry / 127."""
    queries, num_items, width = shape
    random = generator(device)
    query = torch.randn(queries, width, generator=random, device=device)
    items = torch.randn(num_items, width, generator=random, device=device)
    if dtype != "int8":
        return {"query": query.to(torch_dtype(dtype)), "items": items.to(torch_dtype(dtype)), "scales": None, "k": k}
    scales = items.abs().amax(1) / 127
    return {"query": query, "items": (items / scales[:, None]).round_().to(torch.int8), "scales": scales, "k": k}


def providers(dtype: str, device: str, queries: int, candidates: bool = False) -> tuple[Provider, ...]:
    """Ours and the peers in their best configurations."""
    storage = "int8 → float32 " if dtype == "int8" else ""
    found = [
        Provider(our_name("_retrieval_topk", device), _ours, ours=True),
        Provider(f"torch {storage}matmul + topk", _plain),
        Provider(f"torch {storage}matmul + topk in item chunks", _chunked),
    ]
    if candidates:
        found.append(Provider("mmrec (CUDA C++, items streamed)", _ours_streamed, ours=True))
    if device == "cpu":
        for kind, name in _FAISS[dtype]:
            found.append(Provider(f"faiss {name}", _faiss(kind, sharded=False), module="faiss", install="faiss-cpu"))
            # faiss gives each query to one thread: with fewer queries than threads, its best is a part per thread.
            if queries < torch.get_num_threads():
                sharded = Provider(
                    f"faiss {name}, a shard per thread", _faiss(kind, sharded=True), module="faiss", install="faiss-cpu"
                )
                found.append(sharded)
    return tuple(found)


_FAISS = {
    "float32": (("flat", "flat float32"),),
    "bfloat16": (("QT_bf16", "flat bfloat16 (SQ)"), ("QT_fp16", "flat float16 (SQ)")),
    "int8": (("QT_8bit", "flat SQ8 (its own 8-bit code, per dimension)"),),
}


def _ours(given: Inputs, mode: str) -> Call:
    query, items, scales, k = (given[name] for name in ("query", "items", "scales", "k"))
    return lambda: top_k(query, items, k, item_scales=scales)


def _ours_streamed(given: Inputs, mode: str) -> Call:
    return by_candidate(schemas.retrieval_topk_stream, _ours(given, mode))


def _scores(given: Inputs) -> Callable[[int, int], Tensor]:
    """Scores `[B, end − begin]` of a range of items, the cheapest way that torch has for the shape and dtype."""
    query, items, scales = given["query"], given["items"], given["scales"]
    single = query.shape[0] == 1
    # Whichever is the smaller matrix takes the steps.
    scale_items = scales is not None and query.shape[0] > query.shape[1]

    def scores(begin: int, end: int) -> Tensor:
        part = items[begin:end]
        if scales is not None:
            part = part.to(query.dtype)
        if scale_items:
            part = part.mul_(scales[begin:end, None])
        found = part.mv(query[0])[None] if single else query @ part.T
        return found if scales is None or scale_items else found.mul_(scales[begin:end])

    return scores


def _plain(given: Inputs, mode: str) -> Call:
    scores, num_items, k = _scores(given), given["items"].shape[0], given["k"]
    return lambda: scores(0, num_items).topk(k)


def _chunked(given: Inputs, mode: str) -> Call:
    """The chunk that is fastest on the first items of this case."""
    scores, num_items, k = _scores(given), given["items"].shape[0], given["k"]
    if num_items <= CHUNKS[0]:
        return lambda: _running_topk(scores, num_items, k, -(-num_items // 2))
    sample = min(num_items, _SAMPLE)

    def attempt(chunk: int) -> float:
        # The sum waits for a GPU.
        return _seconds(lambda: _running_topk(scores, sample, k, chunk)[0].sum().item())

    tried = [chunk for chunk in CHUNKS if chunk < num_items]
    best = min(tried, key=lambda chunk: min(attempt(chunk) for _ in range(3)))
    return lambda: _running_topk(scores, num_items, k, best)


def _running_topk(scores: Callable[[int, int], Tensor], num_items: int, k: int, chunk: int) -> tuple[Tensor, Tensor]:
    """The k best of each chunk, and the k best of these."""
    values, ids = [], []
    for begin in range(0, num_items, chunk):
        end = min(begin + chunk, num_items)
        best, where = scores(begin, end).topk(min(k, end - begin))
        values.append(best)
        ids.append(where.add_(begin))
    best, where = torch.cat(values, 1).topk(k)
    return best, torch.cat(ids, 1).gather(1, where)


def _faiss(kind: str, *, sharded: bool) -> Callable[[Inputs, str], Call]:
    def make(given: Inputs, mode: str) -> Call:
        import faiss

        threads = torch.get_num_threads()
        faiss.omp_set_num_threads(threads)
        items = given["items"].float()
        if given["scales"] is not None:
            items.mul_(given["scales"][:, None])
        query, k, shards = given["query"].float().numpy(), given["k"], threads if sharded else 1

        def search(index: Any, blas_from: int) -> Any:
            faiss.cvar.distance_compute_blas_threshold = blas_from
            return index.search(query, k)

        blas_from = 0
        if kind == "flat":  # a matrix product, or a dot product at a time: whichever is faster on the first items
            sample = _faiss_index(faiss, kind, items[:_SAMPLE].numpy(), shards)
            blas_from = min(
                (0, 2**30), key=lambda limit: min(_seconds(lambda: search(sample, limit)) for _ in range(3))
            )
        index = _faiss_index(faiss, kind, items.numpy(), shards)
        return lambda: search(index, blas_from)

    return make


def _seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _faiss_index(faiss: Any, kind: str, items: Any, shards: int) -> Any:
    def flat(part: Any) -> Any:
        if kind == "flat":
            index = faiss.IndexFlatIP(width)
        else:
            quantiser = getattr(faiss.ScalarQuantizer, kind)
            index = faiss.IndexScalarQuantizer(width, quantiser, faiss.METRIC_INNER_PRODUCT)
            index.train(items)
        index.add(part)
        return index

    num_items, width = items.shape
    if shards == 1:
        return flat(items)
    index = faiss.IndexShards(width, True, True)
    for i in range(shards):
        index.add_shard(flat(items[num_items * i // shards : num_items * (i + 1) // shards]))
    return index


def judge(given: Inputs) -> Callable[[Any], dict[str, float]]:
    """`max` and `l2`: returned scores against the float64 scores of the returned ids, over those of the exact top k.
    `rank_agreement`: the share of places that hold an item as good as the exact one, to 1e-6 of the largest score."""
    query, items, scales, k = (given[name] for name in ("query", "items", "scales", "k"))
    wide_query = query.double()

    def wide(part: Tensor, part_scales: Tensor | None) -> Tensor:
        return part.double() if part_scales is None else part.double() * part_scales.double()[..., None]

    def scores(begin: int, end: int) -> Tensor:
        return wide_query @ wide(items[begin:end], None if scales is None else scales[begin:end]).T

    exact, _ = _running_topk(scores, items.shape[0], k, _ORACLE_CHUNK)
    largest, norm = float(exact.abs().max()), float(exact.norm())

    def errors(result: Any) -> dict[str, float]:
        found, ids = (torch.as_tensor(x).to(query.device) for x in result)
        if found.shape != exact.shape or bool((ids < 0).any()):
            raise ValueError(
                f"result must hold {list(exact.shape)} items, got {list(found.shape)} with {int((ids < 0).sum())} empty"
            )
        if not bool(found.isfinite().all()):
            raise ValueError("result must hold finite scores, got an infinity or a NaN")
        kept = None if scales is None else scales[ids]
        true = torch.stack(
            [wide(items[ids[b]], None if kept is None else kept[b]) @ wide_query[b] for b in range(len(ids))]
        )
        difference = found.double() - true
        return {
            "max": float(difference.abs().max()) / largest,
            "l2": float(difference.norm()) / norm,
            "rank_agreement": float(((true - exact).abs() <= 1e-6 * largest).double().mean()),
        }

    return errors
