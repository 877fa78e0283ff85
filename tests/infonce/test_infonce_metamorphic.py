"""What must not change, does not: permutations, splits, padding, shifts, memory that nobody reads, blocks, repeats."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmrec_kernels import schemas
from mmrec_kernels.infonce import info_nce, reference

pytestmark = pytest.mark.usefixtures("provider")

NAN = float("nan")


def embeddings(rows: int, keys: int, width: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * 31 + keys)
    return (
        torch.randn(rows, width, dtype=dtype, generator=generator).requires_grad_(),
        torch.randn(keys, width, dtype=dtype, generator=generator).requires_grad_(),
    )


def run(query: Tensor, key: Tensor, **options: object) -> list[Tensor]:
    value, stats = info_nce(query, key, return_stats=True, **options)
    return [value.detach(), *torch.autograd.grad(value.sum(), [query, key]), *stats]


def assert_same_bits(first: list[Tensor], second: list[Tensor]) -> None:
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=0.0, equal_nan=True)


def test_permuting_rows_and_keys_permutes_the_result() -> None:
    query, key = embeddings(7, 9)
    rows, keys = torch.randperm(7), torch.randperm(9)
    target = torch.randint(9, (7,))
    value, dq, dk, lse, *_ = run(query, key, target=target, reduction="none")
    shuffled_query, shuffled_key = query[rows].detach().requires_grad_(), key[keys].detach().requires_grad_()
    moved = keys.argsort()[target[rows]]
    value2, dq2, dk2, lse2, *_ = run(shuffled_query, shuffled_key, target=moved, reduction="none")
    for a, b in ((value[rows], value2), (dq[rows], dq2), (dk[keys], dk2), (lse[rows], lse2)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_swapping_the_sides_of_a_symmetric_loss_swaps_the_gradients() -> None:
    query, key = embeddings(6, 6)
    value, dq, dk, *_ = run(query, key)
    value2, dk2, dq2, *_ = run(key, query)
    for a, b in ((value, value2), (dq, dq2), (dk, dk2)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_one_direction_splits_by_rows() -> None:
    query, key = embeddings(8, 8)
    target = torch.arange(8)
    whole = info_nce(query, key, symmetric=False, reduction="none")
    parts = [info_nce(query[s], key, target=target[s], symmetric=False, reduction="none")
             for s in (slice(0, 3), slice(3, 8))]  # fmt: skip
    torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-13, atol=1e-15)


def test_padding_with_excluded_keys_and_idle_rows_changes_nothing() -> None:
    query, key = embeddings(4, 4)
    value, dq, dk, *_ = run(query, key)
    padded_query = torch.cat([query.detach(), torch.full((2, 6), NAN, dtype=torch.float64)]).requires_grad_()
    padded_key = torch.cat([key.detach(), torch.full((3, 6), NAN, dtype=torch.float64)]).requires_grad_()
    target = torch.tensor([0, 1, 2, 3, -1, -1])
    counts = torch.tensor([3, 3, 3, 3, 7, 7])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    positions = torch.cat([torch.arange(4, 7).repeat(4), torch.arange(7).repeat(2)])
    value2, dq2, dk2, *_ = run(padded_query, padded_key, target=target, exclude=(offsets, positions))
    torch.testing.assert_close(value, value2, rtol=1e-13, atol=0.0)
    torch.testing.assert_close(dq, dq2[:4], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(dk, dk2[:4], rtol=1e-12, atol=1e-15)
    assert dq2[4:].count_nonzero() == 0 and dk2[4:].count_nonzero() == 0


@pytest.mark.parametrize("normalize", [True, False])
def test_nan_in_a_query_without_a_term_changes_nothing_in_one_direction(normalize: bool) -> None:
    query, key = embeddings(5, 6)
    scale, weight = torch.rand(5, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    target = torch.tensor([3, -1, 0, 5, -1])
    options = {"target": target, "symmetric": False, "normalize": normalize, "label_smoothing": 0.1}
    clean = run(query, key, scale=scale, weight=weight, **options)
    with torch.no_grad():
        for tensor in (query, scale, weight):
            tensor[[1, 4]] = NAN
    scale.requires_grad_()
    assert_same_bits(clean, run(query, key, scale=scale, weight=weight, **options))
    (dscale,) = torch.autograd.grad(info_nce(query, key, scale=scale, weight=weight, **options), scale)
    assert dscale[[1, 4]].count_nonzero() == 0 and dscale.isfinite().all()


def test_nan_changes_nothing_where_no_row_has_a_term() -> None:
    query, key = (torch.full((3, 4), NAN, requires_grad=True) for _ in range(2))
    value, dq, dk, *_ = run(query, key, target=torch.full((3,), -1))
    assert value == 0 and torch.equal(dq, torch.zeros(3, 4)) and torch.equal(dk, torch.zeros(3, 4))


def test_a_key_that_every_row_leaves_out_by_id_is_not_read() -> None:
    query, key = embeddings(3, 4)
    options = {"key_ids": torch.tensor([1, 1, 1, 1]), "query_ids": torch.tensor([1, 1, 1])}
    clean = run(query, key, **options)
    with torch.no_grad():
        key[3] = NAN
    assert_same_bits(clean, run(query, key, **options))


def test_a_key_that_only_idle_rows_keep_is_not_read_in_one_direction() -> None:
    query, key = embeddings(3, 4)
    options = {"target": torch.tensor([0, 1, -1]), "exclude": (torch.tensor([0, 1, 2, 2]), torch.tensor([3, 3]))}
    clean = run(query, key, symmetric=False, label_smoothing=0.1, **options)
    with torch.no_grad():
        key[3] = NAN
    assert_same_bits(clean, run(query, key, symmetric=False, label_smoothing=0.1, **options))


def test_positions_outside_the_offsets_are_not_read() -> None:
    query, key = embeddings(2, 4)
    clean = run(query, key, exclude=(torch.tensor([0, 1, 2]), torch.tensor([2, 3])))
    wild = torch.tensor([2**62, 2, 3, -(2**62), 2**40])
    assert_same_bits(clean, run(query, key, exclude=(torch.tensor([1, 2, 3]), wild)))


def test_nan_upstream_reaches_only_its_own_row() -> None:
    query, key = embeddings(3, 3)
    target = torch.tensor([0, -1, 2])
    value = info_nce(query, key, target=target, symmetric=False, reduction="none")
    dq, dk = torch.autograd.grad(value, [query, key], torch.tensor([1.0, NAN, 1.0], dtype=torch.float64))
    assert dq.isfinite().all() and dk.isfinite().all()


def test_a_nan_that_is_read_is_not_hidden() -> None:
    query, key = embeddings(3, 3)
    with torch.no_grad():
        query[1, 0] = NAN
    for normalize in (True, False):
        value, dq, *_ = run(query, key, symmetric=False, normalize=normalize, reduction="none")
        assert value.isnan().tolist() == [False, True, False]
        assert dq.isnan().any(1).tolist() == [False, True, False]


def test_expanded_and_strided_inputs_equal_contiguous_ones() -> None:
    query, key = embeddings(6, 10, 4)
    for q, k in ((query.detach().T.contiguous().T, key.detach()[::2][:, [0, 1, 2, 3]]),
                 (query.detach()[:1].expand(5, 4), key.detach().T.clone().T)):  # fmt: skip
        target = torch.zeros(1, dtype=torch.int64).expand(q.shape[0])
        scale = torch.rand(1, dtype=torch.float64).expand(q.shape[0])
        strided = run(q.requires_grad_(), k.requires_grad_(), target=target, scale=scale)
        packed = run(
            q.detach().contiguous().requires_grad_(), k.detach().contiguous().requires_grad_(),
            target=target.contiguous(), scale=scale.contiguous(),
        )  # fmt: skip
        for a, b in zip(strided, packed, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("symmetric", [True, False])
def test_blocks_and_recomputation_change_only_rounding(symmetric: bool) -> None:
    query, key = embeddings(13, 17)
    ids, log_q = torch.randint(0, 9, (17,)), torch.randn(17, dtype=torch.float64)
    options = {"symmetric": symmetric, "key_ids": ids, "log_q": log_q, "label_smoothing": 0.1, "reduction": "none"}
    options["exclude"] = (torch.arange(14), torch.randint(0, 17, (13,)))
    whole = run(query, key, **options)
    for workspace_bytes in (1, 17 * 8 * 2, 17 * 8 * 5, 17 * 8 * 13):
        for a, b in zip(whole, run(query, key, workspace_bytes=workspace_bytes, **options), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


class _Watch(TorchDispatchMode):
    """The bytes of the largest matrix, and the names of the ops that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.names = 0, set[str]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.add(func.name())
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.ndim == 2:
                self.largest = max(self.largest, tensor.numel() * tensor.element_size())
        return result


def _whole_problem(query: Tensor, key: Tensor) -> tuple[object, ...]:
    rows, keys = query.shape[0], key.shape[0]
    offsets, positions = torch.arange(rows + 1), torch.randint(0, keys, (rows,))
    ids = torch.randint(0, 9, (keys,))
    target, query_mask, key_mask = torch.randint(0, keys, (rows,)), torch.ones(rows).bool(), torch.ones(keys).bool()
    return (query, key, torch.ones(1), target, query_mask, key_mask, None, ids, offsets, positions, torch.zeros(keys),
            True, True, False)  # fmt: skip


def _forward_and_backward(problem: tuple[object, ...], workspace_bytes: int) -> None:
    positive, row_lse, column_lse, total, *_, saved = reference.forward(
        *problem, None, True, True, True, workspace_bytes
    )
    grads, needs = (positive, row_lse, column_lse, total), (True, True, True, True)
    reference.backward(*grads, *problem, row_lse, column_lse, saved, *needs, workspace_bytes)


def test_no_matrix_of_logits_exceeds_the_workspace() -> None:
    query, key = (t.detach().float() for t in embeddings(64, 96, 2))
    problem = _whole_problem(query, key)
    for workspace_bytes in (64 * 96 * 4, 96 * 4 * 10, 96 * 4):
        with _Watch() as seen:
            _forward_and_backward(problem, workspace_bytes)
        # Vectors of rows and keys are the floor: [96, 2] float32 and its int64 relatives.
        assert 0 < seen.largest <= max(workspace_bytes, 96 * 2 * 8)
        marks = (64 + 1) * 4
        expected = 64 * 96 * 4 + marks if workspace_bytes >= 64 * 96 * 4 else 0
        assert schemas.infonce_saved_bytes(64, 96, torch.float32, workspace_bytes) == expected


def test_nothing_is_read_back_by_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the reference must not synchronise: no shape depends on values, once contents are trusted."""
    query, key = (t.detach().float() for t in embeddings(8, 12, 4))
    problem = _whole_problem(query, key)
    monkeypatch.setattr(reference, "check_contents", lambda *_: None)
    with _Watch() as seen:
        _forward_and_backward(problem, 2**20)
    synchronising = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "unique", "repeat_interleave")
    assert "aten::mm" in seen.names
    assert not [name for name in seen.names if any(s in name for s in synchronising)]


@pytest.mark.usefixtures("on_reference")
def test_out_of_range_entries_act_as_minus_one_where_contents_are_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = embeddings(3, 3)
    offsets = torch.tensor([0, 1, 1, 2])
    expected = run(query, key, target=torch.tensor([0, -1, 2]), exclude=(offsets, torch.tensor([1, -1])))
    monkeypatch.setattr(reference, "check_contents", lambda *_: None)
    actual = run(query, key, target=torch.tensor([0, 2**40, 2]), exclude=(offsets, torch.tensor([1, 99])))
    assert_same_bits(expected, actual)


def test_the_forward_keeps_its_bits_whatever_is_asked_of_it() -> None:
    query, key = embeddings(9, 9, dtype=torch.float32)
    plain = info_nce(query.detach(), key.detach(), scale=7.0)
    assert torch.equal(plain, info_nce(query, key, scale=7.0))
    assert torch.equal(plain, info_nce(query, key, scale=7.0, return_stats=True)[0])
    with torch.no_grad():
        assert torch.equal(plain, info_nce(query, key, scale=7.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_runs_repeat_bit_for_bit(dtype: torch.dtype) -> None:
    query, key = embeddings(60, 80, 16, dtype)
    target = torch.randint(0, 5, (60,))
    first = run(query, key, target=target, scale=3.0)
    for _ in range(4):
        assert_same_bits(first, run(query, key, target=target, scale=3.0))


def test_a_rows_bits_do_not_depend_on_other_rows_contents() -> None:
    query, key = (t.detach() for t in embeddings(12, 12, 16, torch.float32))
    first = info_nce(query, key, symmetric=False, reduction="none")
    query[6:] = torch.randn(6, 16)
    assert torch.equal(first[:6], info_nce(query, key, symmetric=False, reduction="none")[:6])
