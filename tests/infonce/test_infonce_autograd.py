"""Gradients, the raw ops' schemas and fakes, torch.compile, autocast."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mmrec_kernels import library, schemas
from mmrec_kernels.infonce import info_nce, info_nce_pairs


def leaf(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, dtype=dtype, generator=generator).requires_grad_()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("per_row", [True, False])
def test_gradcheck_of_each_floating_input(symmetric: bool, normalize: bool, reduction: str, per_row: bool) -> None:
    query, key, log_q, weight = leaf(4, 3), leaf(6, 3), leaf(6), leaf(4)
    scale = leaf(4, seed=5) if per_row else leaf(1, seed=5).detach()[0].requires_grad_()
    target = torch.tensor([5, 5, -1, 0])
    ids = torch.tensor([0, 1, 0, 2, 3, 1])
    exclude = (torch.tensor([0, 1, 1, 2, 2]), torch.tensor([2, 0]))

    def run(query: Tensor, key: Tensor, scale: Tensor, log_q: Tensor, weight: Tensor) -> Tensor:
        return info_nce(
            query, key, scale=scale, log_q=log_q, weight=weight.exp(), symmetric=symmetric, normalize=normalize,
            reduction=reduction, target=target, key_ids=ids, exclude=exclude, label_smoothing=0.2,
        )  # fmt: skip

    assert torch.autograd.gradcheck(run, (query, key, scale, log_q, weight))


def test_gradcheck_of_pairs() -> None:
    a, b, c, scale, pair_weight = leaf(5, 3), leaf(5, 3, seed=1), leaf(5, 3, seed=2), leaf(2), leaf(2, seed=9)
    mask = {"a": torch.tensor([1, 1, 0, 1, 1]).bool(), "c": torch.tensor([0, 1, 1, 1, 1]).bool()}

    def run(a: Tensor, b: Tensor, c: Tensor, scale: Tensor, pair_weight: Tensor) -> Tensor:
        return info_nce_pairs(
            {"a": a, "b": b, "c": c}, [("a", "b"), ("c", "a")], mask=mask, scale=scale, pair_weight=pair_weight,
            normalize=True,
        )  # fmt: skip

    assert torch.autograd.gradcheck(run, (a, b, c, scale, pair_weight))


def test_only_the_needed_gradients_are_made() -> None:
    tensors = {"query": leaf(4, 3), "key": leaf(4, 3, seed=1), "scale": leaf(4, seed=2), "log_q": leaf(4, seed=3)}
    every = torch.autograd.grad(info_nce(**tensors), list(tensors.values()))
    for i, name in enumerate(tensors):
        only = {n: t.detach().requires_grad_(n == name) for n, t in tensors.items()}
        info_nce(**only).backward()
        assert torch.equal(only[name].grad, every[i])
        assert all(tensor.grad is None for n, tensor in only.items() if n != name)


def test_a_weight_alone_gets_its_gradient() -> None:
    query, key, weight = leaf(4, 3).detach(), leaf(4, 3, seed=1).detach(), torch.ones(4, dtype=torch.float64)
    rows = info_nce(query, key, reduction="none")
    (gradient,) = torch.autograd.grad(info_nce(query, key, weight=weight.requires_grad_()), weight)
    torch.testing.assert_close(gradient, (rows - rows.mean()) / 4)


def test_upstream_gradients_of_stride_zero() -> None:
    query, key = leaf(5, 3), leaf(5, 3, seed=1)
    info_nce(query, key, reduction="none").sum().backward()
    (expected,) = torch.autograd.grad(info_nce(query, key, reduction="sum"), query)
    torch.testing.assert_close(query.grad, expected, rtol=1e-14, atol=0.0)


def test_backward_may_run_twice_on_a_retained_graph() -> None:
    query, key = leaf(5, 3), leaf(5, 3, seed=1)
    value = info_nce(query, key)
    first = torch.autograd.grad(value, [query, key], retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(value, [query, key]), strict=True))


def test_double_backward_raises() -> None:
    query, key = leaf(3, 2), leaf(3, 2, seed=1)
    (gradient,) = torch.autograd.grad(info_nce(query, key), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_one_batch_against_itself() -> None:
    x = leaf(5, 3)
    (gradient,) = torch.autograd.grad(info_nce(x, x), x)
    a, b = x.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
    da, db = torch.autograd.grad(info_nce(a, b), [a, b])
    torch.testing.assert_close(gradient, da + db, rtol=1e-13, atol=1e-15)


def _problem(dtype: torch.dtype, full: bool) -> list[object]:
    query, key = leaf(4, 3, dtype=dtype).detach(), leaf(6, 3, dtype=dtype).detach()
    wide = schemas.statistics_dtype(dtype)
    if not full:
        return [query, key, torch.ones(1, dtype=wide), *[None] * 8, False, False, False]
    return [
        query, key, torch.rand(4, dtype=wide), torch.tensor([0, 5, -1, 2]), torch.tensor([1, 1, 1, 0]).bool(),
        torch.tensor([1, 0, 1, 1, 1, 1]).bool(), torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 1, 3, 2, 2]),
        torch.tensor([0, 1, 1, 2, 2]), torch.tensor([3, 0]), torch.randn(6, dtype=wide), True, True, False,
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("workspace_bytes", [2**30, 8])
def test_opcheck_of_the_raw_ops(dtype: torch.dtype, full: bool, workspace_bytes: int) -> None:
    problem = _problem(dtype, full)
    tests = ["test_schema", "test_faketensor"]
    if dtype == torch.float32 and full:
        tests.append("test_aot_dispatch_dynamic")
    forward = (*problem, None, full, full, True, workspace_bytes)
    torch.library.opcheck(schemas.infonce_forward, forward, test_utils=tests)
    positive, row_lse, column_lse, total, kept, rank, reference, saved = schemas.infonce_forward(*forward)
    assert positive.dtype == row_lse.dtype == column_lse.dtype == total.dtype == torch.float64
    # The four rows' exponentials, padded to 32 keys, their references and the mark of the one tile.
    size = 4 * 32 * dtype.itemsize + (4 + 1) * schemas.statistics_dtype(dtype).itemsize
    assert saved.numel() == (size if workspace_bytes > 8 else 0)
    assert rank.shape == kept.shape == total.shape == reference.shape == (
        (4,) if full else (0,)
    ) and column_lse.shape == ((6,) if full else (0,))
    grads = (torch.rand_like(positive), torch.rand_like(row_lse), torch.rand_like(column_lse), torch.rand_like(total))
    upstream = grads if full else (*grads[:2], None, None)
    for needs in ((True, True, True, True), (False, True, False, False), (True, False, True, False)):
        backward = (*upstream, *problem, row_lse, column_lse, saved, *needs, workspace_bytes)
        torch.library.opcheck(schemas.infonce_backward, backward, test_utils=tests)
        shapes = [(4, 3), (6, 3), tuple(problem[2].shape), (6,)]
        results = schemas.infonce_backward(*backward)
        assert [tuple(r.shape) for r in results] == [s if n else (0,) for s, n in zip(shapes, needs, strict=True)]
        assert all(r.is_contiguous() for r in results)


def _everything(query: Tensor, key: Tensor, scale: Tensor, target: Tensor, ids: Tensor, log_q: Tensor) -> Tensor:
    value, stats = info_nce(
        query, key, scale=scale, target=target, key_ids=ids, log_q=log_q, label_smoothing=0.1, normalize=True,
        weight=log_q.exp()[: query.shape[0]], return_stats=True,
    )  # fmt: skip
    return value + stats.correct.sum() * 0


def _against_itself(query: Tensor, key: Tensor, *_: Tensor) -> Tensor:
    present = key[:, 0] > 0
    half = key[: query.shape[0]]
    pairs = info_nce_pairs({"a": query, "b": half}, [("a", "b"), ("b", "a")], mask={"a": present[: query.shape[0]]})
    return pairs + info_nce(query, query)


def _plainly(query: Tensor, key: Tensor, *_: Tensor) -> Tensor:
    return info_nce(query, key)


@pytest.mark.parametrize(
    ("function", "backend"), [(_everything, "aot_eager"), (_against_itself, "aot_eager"), (_plainly, "inductor")]
)
def test_compiles_whole_with_dynamic_shapes(function: Callable[..., Tensor], backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for rows, keys in ((4, 6), (7, 11), (9, 30)):
        arguments = [
            leaf(rows, 5, dtype=torch.float32), leaf(keys, 5, dtype=torch.float32),
            torch.tensor(3.0, requires_grad=True), torch.randint(-1, keys, (rows,)), torch.randint(-1, 4, (keys,)),
            leaf(keys, dtype=torch.float32),
        ]  # fmt: skip
        inputs = [arguments[i] for i in ((0, 1, 2, 5) if function is _everything else (0, 1))]
        expected, actual = function(*arguments), compiled(*arguments)
        torch.testing.assert_close(actual, expected)
        for a, b in zip(torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs), strict=True):
            torch.testing.assert_close(a, b)
    torch._dynamo.reset()


def test_autocast_keeps_the_inputs_dtype() -> None:
    query, key = leaf(16, 8, dtype=torch.float32), leaf(16, 8, dtype=torch.float32, seed=1)
    expected = info_nce(query, key, scale=20.0)
    gradients = torch.autograd.grad(expected, [query, key])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = info_nce(query, key, scale=20.0)
        inside = torch.autograd.grad(value, [query, key])
    assert value.dtype == torch.float32 and torch.equal(value, expected)
    assert all(torch.equal(a, b) for a, b in zip(inside, gradients, strict=True))


def test_inference_mode() -> None:
    with torch.inference_mode():
        query, key = torch.randn(3, 2), torch.randn(3, 2)
        assert info_nce(query, key).isfinite()


def test_the_ops_have_a_provider_on_cpu_and_cuda() -> None:
    served = {(p.op, p.device) for p in library.providers()}
    for op in ("_infonce_forward", "_infonce_backward"):
        assert {(op, "cpu"), (op, "cuda")} <= served
