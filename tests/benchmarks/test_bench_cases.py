"""The cases of every op: all providers compute the same thing, and the work they are held against is counted right."""

import importlib

import bench_package  # noqa: F401
import pytest
import torch
from mmrec_kernels.benchmarks import attention, infonce, nf4, retrieval, routing, routing_peers
from mmrec_kernels.benchmarks.case import MODES

TINY = {
    "attention": {"batch": 5, "heads": 2, "width": 8, "queries": 3, "segments": 3, "longest": 6},
    "infonce": (12, 12, 8, False),
    "routing": {"tokens": 20, "width": 8, "hidden": 16, "experts": 5, "k": 2},
    "router": {"tokens": 40, "width": 8, "experts": 5, "k": 2},
    "nf4": {"rows": 3, "out": 64, "in": 64, "rank": 4, "adapters": 1},
}
TOLERANCE = {"float32": 2e-6, "bfloat16": 6e-2}


def judged(case):
    """Errors by provider; every provider that is installed has to work."""
    given = case.inputs()
    judge = case.judge(given)
    found = {}
    for provider in case.providers:
        if provider.missing() is not None:
            continue
        if provider.yardstick:
            provider.make(given, case.mode)()
        elif "repacked" not in provider.name:
            found[provider.name] = judge(provider.finish(given, provider.make(given, case.mode)()))
    assert any(provider.ours for provider in case.providers)
    assert len({provider.name for provider in case.providers}) == len(case.providers)
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("op", TINY)
def test_all_providers_agree_with_float64(op, mode, dtype):
    with torch.compiler.set_stance("force_eager"):  # bitsandbytes would compile its decode for half a minute
        found = judged(importlib.import_module(f"mmrec_kernels.benchmarks.{op}").case(TINY[op], dtype, "cpu", mode))
    assert len(found) >= 2
    for name, errors in found.items():
        assert errors["l2"] < TOLERANCE[dtype], name


def test_infonce_over_a_catalogue():
    for errors in judged(infonce.case((6, 40, 8, False), "float32", "cpu", "full")).values():
        assert errors["l2"] < TOLERANCE["float32"]


@pytest.mark.parametrize("mode", ["forward", "full"])
def test_infonce_with_hits_log_q_and_scales(mode):
    with torch.compiler.set_stance("force_eager"):
        for errors in judged(infonce.case((40, 40, 8, True), "float32", "cpu", mode)).values():
            assert errors["l2"] < TOLERANCE["float32"]


def test_padded_errors_are_those_of_the_real_rows():
    """A wrong gradient of one key must show, in whatever layout a provider has it."""
    case = attention.case(TINY["attention"], "float32", "cpu", "full")
    given = case.inputs()
    judge = case.judge(given)
    padded = next(p for p in case.providers if "beforehand" in p.name)
    query, key, value = padded.make(given, "full")()
    key[given["slot"][7]] += 1
    assert judge(padded.finish(given, (query, key, value)))["max"] > 0.1
    untouched = torch.ones(len(key), dtype=torch.bool)
    untouched[given["slot"]] = False
    assert untouched.any()  # there is padding
    key[given["slot"][7]] -= 1
    key[untouched] = 1e3
    assert judge(padded.finish(given, (query, key, value)))["l2"] < 1e-5


@pytest.mark.parametrize("dtype", retrieval.DTYPES["cpu"])
@pytest.mark.parametrize("queries", [1, 5])
def test_retrieval_providers(dtype, queries, monkeypatch, threads):
    threads(2)  # with fewer queries than threads there is a sharded index
    monkeypatch.setattr(retrieval, "CHUNKS", (64, 256))
    case = retrieval.case((queries, 600, 16), dtype, "cpu", 10)
    found = judged(case)
    sharded = [name for name in found if name.endswith("a shard per thread")]
    if any("faiss" in name for name in found):
        assert bool(sharded) == (queries == 1)
    for name, errors in found.items():
        if "SQ8" in name:  # requantised: near, not equal
            assert 1e-5 < errors["max"] < 2e-2 and errors["rank_agreement"] >= 0.5, name
        elif "torch matmul" in name and dtype == "bfloat16":  # scores rounded to bfloat16
            assert errors["max"] < 1e-2 and errors["rank_agreement"] >= 0.5, name
        else:
            assert errors["max"] < 1e-6 and errors["rank_agreement"] == 1.0, name


def test_candidates_are_asked_for_by_name():
    """A case on a GPU can be made without one."""
    for module, dtype, name in (
        (retrieval, "float32", "items streamed"),
        (attention, "float16", "a warp per sequence"),
    ):
        plain, more = (module.cases("small", "cuda", (dtype,), ("forward",), candidates=c) for c in (False, True))
        for one, other in zip(plain, more, strict=True):
            added = [p for p in other.providers if p.name not in {q.name for q in one.providers}]
            assert [p.ours for p in added] == [True] and name in added[0].name
    for dtype, mode in (("float32", "forward"), ("float16", "full")):  # what it does not do
        for case in attention.cases("small", "cuda", (dtype,), (mode,), candidates=True):
            assert not any("warp" in p.name for p in case.providers)


def test_retrieval_judge_tells_a_wrong_item_from_a_tie():
    case = retrieval.case((2, 50, 8), "float32", "cpu", 5)
    given = case.inputs()
    given["items"][7] = given["items"][8]  # an exact tie
    judge = case.judge(given)
    exact = (given["query"].double() @ given["items"].double().T).topk(5)
    assert judge((exact.values.float(), exact.indices))["rank_agreement"] == 1.0
    swapped = torch.where(exact.indices == 7, 8, torch.where(exact.indices == 8, 7, exact.indices))
    assert judge((exact.values.float(), swapped))["rank_agreement"] == 1.0
    wrong = exact.indices.clone()
    worst = (given["query"] @ given["items"].T).argmin(1)
    wrong[0, 4] = worst[0]
    errors = judge((exact.values.float(), wrong))
    assert errors["rank_agreement"] == 0.9
    assert errors["max"] > 0.1  # and the score is not that item's
    with pytest.raises(ValueError, match="1 empty"):
        judge(
            (
                exact.values.float(),
                exact.indices.index_fill(1, torch.tensor([4]), 3).masked_fill(wrong != exact.indices, -1),
            )
        )


def test_retrieval_work():
    assert retrieval.case((32, 1000, 64), "float32", "cpu", 10).work == retrieval.Work(
        flops=2 * 32 * 1000 * 64, read=4 * 64 * (1000 + 32), written=32 * 10 * 12
    )
    assert retrieval.case((1, 1000, 64), "int8", "cpu", 10).work.read == 1000 * (64 + 4) + 4 * 64


def test_retrieval_shapes_are_those_of_the_acceptance_test():
    found = retrieval.cases("full", "cpu", retrieval.DTYPES["cpu"])
    shapes = {(1, 100_000, 64), (32, 100_000, 64), (1024, 12_000, 128), (1, 1_000_000, 128)}
    shapes |= {(queries, 1_000_000, 64) for queries in (1, 4, 32, 256)}
    wanted = {(*shape, k, dtype) for shape in shapes for k in (10, 100) for dtype in ("float32", "bfloat16", "int8")}
    assert {(*case.shape.values(), case.dtype) for case in found} == wanted


@pytest.mark.parametrize("module", [attention, infonce, nf4, retrieval, routing], ids=lambda m: m.OP)
@pytest.mark.parametrize("shapes", ["small", "full"])
def test_every_case_counts_its_work(module, shapes):
    for case in module.cases(shapes, "cpu", module.DTYPES["cpu"]):
        assert min(case.work.flops, case.work.read, case.work.written) > 0
        assert case.op == module.OP
        assert case.providers[0].name.startswith("mmrec (")


def test_a_peer_that_would_take_too_much_memory_says_so(monkeypatch):
    """Where it could run it is one of those that agree with float64, above."""
    case = routing.cases("small", "cpu", ("float32",), ("forward",))[0]
    monkeypatch.setattr(routing_peers, "_MOST_BYTES", 1000)
    for name in ("torch all experts for all tokens", "transformers batched_mm"):
        peer = next(p for p in case.providers if p.name == name)
        with pytest.raises(ValueError, match=r"would make 0\.0 GiB in one piece"):
            peer.make(case.inputs(), "forward")


def test_attention_work_counts_only_keys_that_exist():
    shape = TINY["attention"]
    case = attention.case(shape, "float32", "cpu", "forward")
    keys = sum(len(key) for key in case.inputs()["keys"])
    assert keys < shape["batch"] * shape["segments"] * shape["longest"]
    assert case.work.flops == 4 * 2 * 8 * 3 * keys
    assert case.work.read == 4 * 16 * (2 * keys + 15)
