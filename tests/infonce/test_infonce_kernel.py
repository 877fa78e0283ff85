"""The compiled kernels over many tiles, where the contract tests fit into one: sizes, masks, references, threads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from infonce_providers import use_reference
from torch import Tensor

from mmrec_kernels import library, schemas
from mmrec_kernels.infonce import info_nce
from numerics import assert_accurate, errors

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
# Below, at and above the sizes of tiles (96 x 192), groups, panels and pairs; a width beyond one chain.
SHAPES = [(96, 192, 32), (97, 193, 33), (300, 500, 70), (1, 200, 5), (200, 3, 2), (250, 250, 300), (12, 6, 129)]


def unit(rows: int, width: int, dtype: torch.dtype, seed: int) -> Tensor:
    x = torch.randn(rows, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(x).to(dtype)


def everything(rows: int, keys: int, dtype: torch.dtype) -> dict[str, Any]:
    """Options that leave pairs out everywhere: ids, lists, rows without a term."""
    generator = torch.Generator().manual_seed(rows + keys)
    wide = schemas.statistics_dtype(dtype)
    counts = torch.randint(0, 4, (rows,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    return {
        "target": torch.randint(-1, keys, (rows,), generator=generator),
        "key_ids": torch.randint(-1, 40, (keys,), generator=generator),
        "exclude": (offsets, torch.randint(-1, keys, (int(offsets[-1]),), generator=generator)),
        "scale": torch.rand(rows, generator=generator, dtype=wide) * 20,
        "log_q": torch.randn(keys, generator=generator, dtype=wide),
        "label_smoothing": 0.1,
        "normalize": True,
    }


def widened(options: dict[str, Any]) -> dict[str, Any]:
    return {
        n: v.detach().double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in options.items()
    }


def run(query: Tensor, key: Tensor, **options: Any) -> tuple[dict[str, Tensor], Any]:
    """Values and gradients by name, and the statistics."""
    inputs = {"query": query, "key": key, **{n: options[n] for n in ("scale", "log_q") if n in options}}
    inputs = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    value, stats = info_nce(**{**options, **inputs}, reduction="none", return_stats=True)
    upstream = torch.linspace(0.5, 1.5, query.shape[0], dtype=value.dtype)
    gradients = torch.autograd.grad(value, list(inputs.values()), upstream)
    return {"value": value.detach(), **dict(zip(inputs, gradients, strict=True))}, stats


def eager(query: Tensor, key: Tensor, scale: float, symmetric: bool) -> dict[str, Tensor]:
    """What a user writes in plain torch, in the inputs' own dtype, the positive a key of the same index."""
    q, k = query.detach().clone().requires_grad_(), key.detach().clone().requires_grad_()
    logits, target = (q * scale) @ k.T, torch.arange(q.shape[0])
    value = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    if symmetric:
        columns = torch.nn.functional.cross_entropy(logits[:, : q.shape[0]].T, target, reduction="none")
        value = (value + columns) / 2
    upstream = torch.linspace(0.5, 1.5, q.shape[0], dtype=value.dtype)
    dq, dk = torch.autograd.grad(value, [q, k], upstream)
    return {"value": value.detach(), "query": dq, "key": dk}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0] <= s[1]], ids=str)
def test_plain_losses_are_as_accurate_as_eager_torch(
    shape: tuple[int, int, int], dtype: torch.dtype, symmetric: bool
) -> None:
    rows, keys, width = shape
    query, key = unit(rows, width, dtype, 1), unit(keys, width, dtype, 2)
    ours, _ = run(query, key, scale=torch.tensor(12.0), symmetric=symmetric)
    exact, _ = run(query.double(), key.double(), scale=torch.tensor(12.0).double(), symmetric=symmetric)
    theirs = eager(query, key, 12.0, symmetric)
    for name in ("value", "query", "key"):
        assert_accurate(ours[name], exact[name], theirs[name], dtype=dtype)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("workspace_bytes", [2**30, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_everything_at_once_equals_the_reference_in_float64(
    shape: tuple[int, int, int], dtype: torch.dtype, workspace_bytes: int, symmetric: bool, monkeypatch: Any
) -> None:
    rows, keys, width = shape
    query, key = unit(rows, width, dtype, 1) * 3, unit(keys, width, dtype, 2)
    options = {**everything(rows, keys, dtype), "symmetric": symmetric}
    ours, stats = run(query, key, workspace_bytes=workspace_bytes, **options)
    use_reference(monkeypatch)
    exact, exact_stats = run(query.double(), key.double(), **widened(options))
    # What is rounded to bfloat16 (exponentials, weights, gradients) may be off by its last bit; the rest is float32.
    limit = {torch.float32: 3e-6, torch.bfloat16: torch.finfo(torch.bfloat16).eps, torch.float64: 1e-12}[dtype]
    for name, tensor in ours.items():
        assert max(errors(tensor, exact[name])) <= (3e-6 if name == "value" else limit), name
    torch.testing.assert_close(stats.lse.double(), exact_stats.lse.double(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(stats.positive.double(), exact_stats.positive.double(), rtol=1e-6, atol=1e-6)
    if dtype == torch.float64:
        assert torch.equal(stats.rank, exact_stats.rank) and torch.equal(stats.correct, exact_stats.correct)


def _spread(rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Rows and keys whose logits lie hundreds apart within one tile, in both directions."""
    query, key = torch.randn(rows, width), torch.randn(rows, width)
    return query * torch.logspace(-2, 2, rows)[torch.randperm(rows), None], key * torch.logspace(-1, 1, rows)[:, None]


@pytest.mark.parametrize("workspace_bytes", [2**30, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_keys_far_below_the_highest_logit_of_their_tile_lose_nothing(dtype: torch.dtype, workspace_bytes: int) -> None:
    """The exponentials of such tiles do not serve both directions; every sum and gradient has its own digits."""
    query, key = (t.to(dtype) for t in _spread(150, 16))
    key[77:90] *= 1e-3  # whole keys that every row scores low
    query[100:140, :] = -query[100:140, :].abs()
    key[100:140, :] = key[100:140, :].abs()
    options = {"workspace_bytes": workspace_bytes, "scale": torch.tensor(1.0, dtype=dtype)}
    scale, flags = torch.ones(1, dtype=dtype), (True, False, False, None, False, False, True)
    saved = schemas.infonce_forward(query, key, scale, *[None] * 8, *flags, 2**30)[7]
    assert saved[-dtype.itemsize :].view(dtype).item() == 0  # the mark of a tile: not exact for both directions
    ours, _ = run(query, key, **options)
    exact, _ = run(query.double(), key.double(), **widened(options))
    # Logits of a few hundred carry a float32 error of 1e-5, and so do probabilities.
    limit = 2e-4 if dtype == torch.float32 else 1e-11
    for name in ("value", "query", "key", "scale"):
        assert errors(ours[name], exact[name])[1] <= limit, name
    for mine, other in zip(ours["key"].double(), exact["key"], strict=True):  # each key for itself
        assert float((mine - other).norm()) <= limit * 10 * float(other.norm()) + 1e-12


@pytest.mark.parametrize("options", [{}, {"normalize": True}, {"everything": True}, {"spread": True}], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("workspace_bytes", [2**30, 1])
def test_a_pair_that_dominates_its_row_or_key_is_not_rounded(
    workspace_bytes: int, symmetric: bool, options: dict[str, bool]
) -> None:
    """Few pairs make up these gradients: what sums many has float32's digits, dq and dk their own rounding."""
    rows, keys, width = 210, 420, 40
    generator = torch.Generator().manual_seed(5)
    key = unit(keys, width, torch.bfloat16, 2) * 3
    twins = torch.randperm(keys - rows, generator=generator)[:rows] + rows  # the negative that each row mistakes
    query = (key[twins].float() / 3 + 0.05 * torch.randn(rows, width, generator=generator)).to(torch.bfloat16)
    if options.get("spread"):  # a key far below the others: tiles take two exponentials
        key[5::50] *= 20
        key[7::50] *= -20
    given = {"scale": torch.tensor(37.0), "log_q": torch.randn(keys, generator=generator), "symmetric": symmetric}
    if options.get("everything"):
        given.update(everything(rows, keys, torch.bfloat16), symmetric=symmetric)
        given["scale"] = given["scale"] + 60
    given["normalize"] = options.get("normalize", False)
    ours, _ = run(query, key, workspace_bytes=workspace_bytes, **given)
    exact, _ = run(query.double(), key.double(), **widened(given))
    # A quarter of a row's sum may be rounded, in many pairs.
    sums = torch.finfo(torch.bfloat16).eps / 32
    for name, limit in (("query", 2.3e-3), ("key", 2.3e-3), ("scale", sums), ("log_q", sums)):
        assert errors(ours[name], exact[name])[1] <= limit, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("workspace_bytes", [2**30, 1])
def test_any_number_of_threads_gives_the_same_bits(threads: Any, dtype: torch.dtype, workspace_bytes: int) -> None:
    query, key = unit(700, 40, dtype, 1), unit(900, 40, dtype, 2)
    options = {**everything(700, 900, dtype), "workspace_bytes": workspace_bytes}
    results = []
    for count in (1, 2, 4):
        threads(count)
        values, stats = run(query, key, **options)
        results.append([*values.values(), *stats])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_a_key_equal_to_the_positive_never_ranks_above_it(normalize: bool, dtype: torch.dtype) -> None:
    """The positive is compared as the products compute it: equal keys have equal logits, wherever they lie."""
    query, key = unit(300, 177, dtype, 1), unit(300, 177, dtype, 2) * 2
    options = {"scale": 9.0, "normalize": normalize, "return_stats": True, "symmetric": False}
    log_q = torch.rand(300, dtype=schemas.statistics_dtype(dtype))
    _, once = info_nce(query, key, log_q=log_q, **options)
    _, thrice = info_nce(query, key.repeat(3, 1), log_q=log_q.repeat(3), **options)
    assert torch.equal(thrice.rank, 3 * once.rank) and torch.equal(thrice.positive, once.positive)
    assert int(once.rank.max()) > 200 and int(once.rank.min()) < 20


def test_ids_beyond_32_bits_are_told_apart() -> None:
    query, key = unit(50, 8, torch.float64, 1), unit(50, 8, torch.float64, 2)
    ids = torch.arange(50) % 7
    far = ids * 2**32 + 5  # equal in their lower halves
    small, _ = run(query, key, key_ids=ids)
    large, _ = run(query, key, key_ids=far)
    assert all(torch.equal(a, b) for a, b in zip(small.values(), large.values(), strict=True))
    unknown, _ = run(query, key, key_ids=far, query_ids=torch.full((50,), 2**40 + 1))
    none, _ = run(query, key)
    assert all(torch.equal(a, b) for a, b in zip(unknown.values(), none.values(), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_around_the_inputs_is_not_read(dtype: torch.dtype) -> None:
    """Rows and keys inside larger tensors of NaN, of odd widths, give the bits of tensors that stand alone."""
    query, key = unit(130, 37, dtype, 1), unit(260, 37, dtype, 2)

    def inside(x: Tensor) -> Tensor:
        room = torch.full((x.shape[0] + 2, x.shape[1] + 3), float("nan"), dtype=dtype)
        room[1:-1, 1:-2] = x
        return room[1:-1, 1:-2]

    alone, _ = run(query, key, scale=torch.tensor(5.0, dtype=schemas.statistics_dtype(dtype)))
    q, k = inside(query).requires_grad_(), inside(key).requires_grad_()
    value = info_nce(q, k, scale=5.0, reduction="none")
    dq, dk = torch.autograd.grad(value, [q, k], torch.linspace(0.5, 1.5, 130, dtype=value.dtype))
    for mine, other in ((value, "value"), (dq, "query"), (dk, "key")):
        assert torch.equal(mine.detach(), alone[other])


def test_what_is_saved_serves_two_backwards_and_is_not_written() -> None:
    query, key = unit(200, 24, torch.float32, 1).requires_grad_(), unit(400, 24, torch.float32, 2).requires_grad_()
    value = info_nce(query, key, scale=30.0, reduction="none")
    first = torch.autograd.grad(value, [query, key], torch.ones(200), retain_graph=True)
    torch.autograd.grad(value, [query, key], torch.rand(200), retain_graph=True)
    again = torch.autograd.grad(value, [query, key], torch.ones(200))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("rows, keys, width", [(0, 0, 4), (0, 5, 4), (3, 0, 4), (3, 5, 0), (0, 5, 0)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_sizes(rows: int, keys: int, width: int, dtype: torch.dtype) -> None:
    query = torch.randn(rows, width, dtype=dtype).requires_grad_()
    key = torch.randn(keys, width, dtype=dtype).requires_grad_()
    target = torch.full((rows,), -1) if keys < rows else None
    value, stats = info_nce(query, key, target=target, return_stats=True)
    dq, dk = torch.autograd.grad(value, [query, key])
    assert dq.shape == query.shape and dk.shape == key.shape and not dq.any() and not dk.any()
    # Without a width every logit is 0: the loss is the logarithm of the number of keys, and of rows in the columns.
    expected = torch.tensor([5.0, 3.0]).log().mean().item() if rows and keys else 0.0
    assert value.item() == pytest.approx(expected, rel=1e-6) and stats.lse.shape == (rows,)


@pytest.mark.parametrize("height", [88.5, 93.3, 100.0, 500.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_key_that_keeps_nothing_in_a_tile_may_lie_anywhere_below_it(dtype: torch.dtype, height: float) -> None:
    """The last tile of 97 rows is one row, whose own key is its positive and keeps nothing there."""
    query, key = torch.zeros(97, 2, dtype=dtype), torch.zeros(97, 2, dtype=dtype)
    query[96, 0], key[:96, 0] = 1, height
    ours, _ = run(query, key)
    assert all(tensor.isfinite().all() for tensor in ours.values())
    exact, _ = run(query.double(), key.double())
    for name in ("value", "query", "key"):
        torch.testing.assert_close(ours[name].double(), exact[name], rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize("size", [1e4, 1e5, 1e6, 1e8])
@pytest.mark.parametrize("workspace_bytes", [2**30, 1])
def test_logits_up_to_1e16_stay_finite(size: float, workspace_bytes: int) -> None:
    query, key = torch.randn(30, 4) * size, torch.randn(40, 4) * size
    ours, stats = run(query, key, workspace_bytes=workspace_bytes)
    exact, _ = run(query.double(), key.double())
    assert all(tensor.isfinite().all() for tensor in ours.values()) and stats.lse.isfinite().all()
    torch.testing.assert_close(ours["value"].double(), exact["value"], rtol=1e-5, atol=1e-5 * size**2)


def test_ranks_over_no_width_are_zero() -> None:
    info_nce(torch.randn(50, 9), torch.randn(50, 9), return_stats=True)  # leaves something in the scratch
    _, stats = info_nce(torch.zeros(50, 0), torch.zeros(50, 0), return_stats=True)
    assert not stats.rank.any() and stats.correct.all()


def test_the_compiled_kernels_serve_where_they_are_built() -> None:
    if library.cpu_isa() == "none":
        pytest.skip("_C is not built")
    served = {p.op: p.name for p in library.providers() if p.device == "cpu"}
    assert served["_infonce_forward"] == served["_infonce_backward"] == "compiled"
