"""`group=`: two and four gloo processes against one process that holds the whole batch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from mmrec_kernels.infonce import info_nce, info_nce_pairs

ROWS, KEYS = (5, 3, 1, 4), (7, 3, 2, 4)  # of up to four ranks
PER_KEY = ("key", "key_ids", "log_q")
RING = pytest.mark.parametrize("ring", [False, True], ids=["gathered", "in a ring"])
Processes = list[dict[Any, Any]]  # what each rank found
DIFFERENTIABLE = ("query", "key", "scale", "log_q", "weight")


def batch(rows: tuple[int, ...], keys: tuple[int, ...], *, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """Every argument of each rank, targets and positions counted in the rank's own keys."""
    ranks = []
    for rank, (nq, nk) in enumerate(zip(rows, keys, strict=True)):
        g = torch.Generator().manual_seed(seed * 10 + rank)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        counts = torch.randint(0, 2, (nq,), generator=g)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        ranks.append(
            {
                "query": torch.randn(nq, 4, dtype=dtype, generator=g),
                "key": torch.randn(nk, 4, dtype=dtype, generator=g),
                "scale": torch.rand(nq, dtype=wide, generator=g) + 0.5,
                "target": torch.randint(-1, nk, (nq,), generator=g) if nk else torch.full((nq,), -1),
                "key_ids": torch.randint(-1, 6, (nk,), generator=g),
                "exclude": (offsets, torch.randint(-1, max(nk, 0), (int(offsets[-1]),), generator=g)),
                "log_q": torch.randn(nk, dtype=wide, generator=g),
                "weight": torch.rand(nq, dtype=wide, generator=g),
            }
        )
    return ranks


def joined(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """The arguments of one process: rows in order of rank, indices shifted to the concatenated keys."""
    whole: dict[str, Any] = {}
    for name in ranks[0]:
        if name not in ("target", "exclude"):
            whole[name] = torch.cat([r[name] for r in ranks])

    def shifted(index: Tensor, start: int) -> Tensor:
        return torch.where(index >= 0, index + start, -1)

    starts = [sum(r["key"].shape[0] for r in ranks[:i]) for i in range(len(ranks))]
    if "target" in ranks[0]:
        whole["target"] = torch.cat([shifted(r["target"], s) for r, s in zip(ranks, starts, strict=True)])
    else:
        whole["target"] = torch.cat([torch.arange(r["query"].shape[0]) + s for r, s in zip(ranks, starts, strict=True)])
    if "exclude" in ranks[0]:
        counts = torch.cat([r["exclude"][0].diff() for r in ranks])
        positions = torch.cat([shifted(r["exclude"][1], s) for r, s in zip(ranks, starts, strict=True)])
        whole["exclude"] = (torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]), positions)
    return whole


def plain(ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"query": r["query"], "key": r["key"]} for r in ranks]


def cases(count: int) -> dict[str, tuple[list[dict[str, Any]], dict[str, Any]]]:
    """The ranks' arguments and the options of each case, for `count` ranks."""
    rows, keys = ROWS[:count], KEYS[:count]
    full = batch(rows, keys)
    return {
        "plain": (plain(full), {}),
        "one direction": (plain(full), {"symmetric": False}),
        "everything": (full, {"label_smoothing": 0.1, "normalize": True}),
        "sum": (full, {"reduction": "sum"}),
        "none": (full, {"reduction": "none", "label_smoothing": 0.2}),
        "recomputed": (full, {"workspace_bytes": 64}),
        "an empty rank": (batch((rows[0], 0, *rows[2:]), (keys[0], 0, *keys[2:])), {}),
        "a rank with keys only": (batch((0, *rows[1:]), keys, seed=3), {}),
        "a rank with rows only": (batch(rows, (keys[0], 0, *keys[2:]), seed=4), {}),
        "a positive without log_q": (full, {"log_q_of_positive": False}),
        "bfloat16": (plain(batch(rows, keys, dtype=torch.bfloat16)), {}),
    }


def gradients(
    arguments: dict[str, Any], options: dict[str, Any], group: Any = None, ring: bool = False
) -> dict[str, Tensor]:
    arguments = {n: t.clone() if isinstance(t, Tensor) else t for n, t in arguments.items()}
    inputs = [arguments[n].requires_grad_() for n in DIFFERENTIABLE if n in arguments]
    loss, stats = info_nce(**arguments, **options, group=group, ring=ring, return_stats=True)
    found = torch.autograd.grad(loss.sum(), inputs)
    names = [n for n in DIFFERENTIABLE if n in arguments]
    return {"loss": loss.detach(), **stats._asdict(), **dict(zip(names, found, strict=True))}


class Towers(nn.Module):
    """Two towers and a learned temperature; the temperature is a parameter of the module, as DDP needs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.user, self.item = nn.Linear(4, 3, dtype=torch.float64), nn.Linear(4, 3, dtype=torch.float64)
        self.log_scale = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.user(query), self.item(key), self.log_scale.exp()


def tower_loss(model: nn.Module, arguments: dict[str, Any], group: Any = None, ring: bool = False) -> Tensor:
    rest = {n: t for n, t in arguments.items() if n not in ("query", "key", "scale")}
    query, key, scale = model(arguments["query"], arguments["key"])
    return info_nce(query, key, scale=scale, normalize=True, group=group, ring=ring, **rest)


def pair_arguments(rows: tuple[int, ...]) -> list[dict[str, Any]]:
    ranks = []
    for rank, n in enumerate(rows):
        g = torch.Generator().manual_seed(40 + rank)
        ranks.append(
            {
                "embeddings": {name: torch.randn(n, 3, dtype=torch.float64, generator=g) for name in "abc"},
                "mask": {"a": torch.rand(n, generator=g) < 0.7, "c": torch.rand(n, generator=g) < 0.6},
                "ids": torch.randint(0, 5, (n,), generator=g),
            }
        )
    return ranks


def pair_gradients(arguments: dict[str, Any], group: Any = None, ring: bool = False) -> list[Tensor]:
    inputs = [t.clone().requires_grad_() for t in arguments["embeddings"].values()]
    loss = info_nce_pairs(
        dict(zip("abc", inputs, strict=True)), [("a", "b"), ("c", "a")], mask=arguments["mask"], ids=arguments["ids"],
        group=group, ring=ring,
    )  # fmt: skip
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def refused(rank: int, group: Any) -> list[str]:
    """Arguments that are wrong on one rank, or differ: every rank must raise instead of waiting for the others."""
    query, key, ids = torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    bad_target = torch.tensor([0, 9 if rank == 1 else 1])
    attempts: list[dict[str, Any]] = [
        {"target": bad_target},
        {"symmetric": rank == 0},
        {"key_ids": ids if rank == 0 else None},
        {"label_smoothing": 0.1 * rank},
        {"scale": torch.ones(2, requires_grad=rank == 0)},
        {"ring": rank == 0},
    ]
    said = []
    for options in attempts:
        try:
            info_nce(query, key, group=group, **options)
            said.append("nothing")
        except ValueError as error:
            said.append(str(error))
    return said


def process(rank: int, folder: str, count: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=count)
    group = dist.group.WORLD
    results: dict[str, Any] = {}
    for ring in (False, True):
        for name, (ranks, options) in cases(count).items():
            results[name, ring] = gradients(ranks[rank], options, group, ring)
        model = DistributedDataParallel(Towers())
        tower_loss(model, batch(ROWS[:count], KEYS[:count])[rank], group, ring).backward()
        results["towers", ring] = [p.grad for p in model.module.parameters()]
        results["pairs", ring] = pair_gradients(pair_arguments(ROWS[:count])[rank], group, ring)
    results["refused"] = refused(rank, group)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()  # nobody leaves while another still talks
    dist.destroy_process_group()
    os._exit(0)  # all is said: an interpreter that shuts down beside gloo's threads aborts once in a while


@pytest.fixture(scope="module", params=[2, 4])
def processes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Processes:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    folder = tmp_path_factory.mktemp("group")
    spawn(process, args=(str(folder), request.param), nprocs=request.param)
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(request.param)]


@RING
@pytest.mark.parametrize("name", list(cases(2)))
def test_losses_stats_and_gradients_equal_those_of_one_process(processes: Processes, name: str, ring: bool) -> None:
    count = len(processes)
    ranks, options = cases(count)[name]
    shares = [p[name, ring] for p in processes]
    whole = gradients(joined(ranks), options)
    mean = options.get("reduction", "mean") == "mean"
    losses = torch.cat([s["loss"].reshape(-1) for s in shares])
    bits = ranks[0]["query"].dtype == torch.bfloat16
    tolerance = {"rtol": 2e-2, "atol": 1e-3} if bits else {"rtol": 1e-11, "atol": 1e-13}
    if options.get("reduction") == "none":
        torch.testing.assert_close(losses, whole["loss"], **tolerance)
    else:
        torch.testing.assert_close(losses.sum() / (count if mean else 1), whole["loss"], **tolerance)
    for statistic in ("lse", "positive", "rank", "correct"):
        torch.testing.assert_close(torch.cat([s[statistic] for s in shares]), whole[statistic])
    for tensor in DIFFERENTIABLE:
        if tensor in whole:
            gathered = torch.cat([s[tensor] for s in shares]) / (count if mean else 1)
            torch.testing.assert_close(gathered, whole[tensor], **tolerance)


@RING
def test_parameter_and_scale_gradients_under_ddp_equal_those_of_one_process(processes: Processes, ring: bool) -> None:
    model, count = Towers(), len(processes)
    tower_loss(model, joined(batch(ROWS[:count], KEYS[:count]))).backward()
    for results in processes:
        for mine, parameter in zip(results["towers", ring], model.parameters(), strict=True):
            assert parameter.grad is not None and parameter.grad.abs().max() > 1e-4
            torch.testing.assert_close(mine, parameter.grad, rtol=1e-11, atol=1e-13)


@RING
def test_pairs_with_missing_modalities_equal_those_of_one_process(processes: Processes, ring: bool) -> None:
    ranks = pair_arguments(ROWS[: len(processes)])
    whole = pair_gradients(
        {
            "embeddings": {n: torch.cat([r["embeddings"][n] for r in ranks]) for n in "abc"},
            "mask": {n: torch.cat([r["mask"][n] for r in ranks]) for n in "ac"},
            "ids": torch.cat([r["ids"] for r in ranks]),
        }
    )
    loss, *found = zip(*(p["pairs", ring] for p in processes), strict=True)
    torch.testing.assert_close(torch.stack(loss).mean(), whole[0])
    for mine, other in zip(found, whole[1:], strict=True):
        torch.testing.assert_close(torch.cat(mine) / len(processes), other)


@pytest.mark.parametrize("ring", [False, True])
def test_a_group_of_one_is_one_process(ring: bool, tmp_path: Path) -> None:
    (ranks,) = batch((5,), (7,))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        ours = gradients(ranks, {"label_smoothing": 0.1}, dist.group.WORLD, ring)
    finally:
        dist.destroy_process_group()
    for name, tensor in gradients(ranks, {"label_smoothing": 0.1}).items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-12, atol=1e-14)


def test_a_ring_needs_a_group() -> None:
    with pytest.raises(ValueError, match="ring needs group, got None"):
        info_nce(torch.zeros(2, 3), torch.zeros(2, 3), ring=True)


def test_wrong_or_unlike_arguments_raise_on_every_rank(processes: Processes) -> None:
    first, second, *_ = (p["refused"] for p in processes)
    assert first[0] == "group needs valid arguments on every rank, got wrong ones on rank 1"
    assert second[0] == "target must be below the number of keys, 2, got 9"
    assert first[1] == "group needs the same symmetric on every rank, got False on rank 1 and True here"
    assert second[1] == "group needs the same symmetric on every rank, got True on rank 0 and False here"
    for said in (first, second):
        assert said[2].startswith("group needs the same key_ids (given or None) on every rank")
        assert said[3].startswith("group needs the same label_smoothing on every rank")
        assert said[4].startswith("group needs the same requires_grad of scale on every rank")
        assert said[5].startswith("group needs the same ring on every rank")
