"""The contract of `info_nce`, sentence by sentence, against scalar loops and torch's own cross-entropy in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from infonce_oracle import naive
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from mmrec_kernels.infonce import info_nce

pytestmark = pytest.mark.usefixtures("provider")

INF = float("inf")


def embeddings(rows: int, keys: int, width: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(rows, width, dtype=torch.float64, generator=generator)
    return query.requires_grad_(), torch.randn(keys, width, dtype=torch.float64, generator=generator).requires_grad_()


def same(actual: Tensor, expected: Tensor, inputs: list[Tensor], **tolerance: float) -> None:
    """Equal values and equal gradients under a random upstream gradient."""
    tolerance = tolerance or {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(actual, expected.to(actual.dtype), **tolerance)
    upstream = torch.rand(actual.shape, dtype=actual.dtype, generator=torch.Generator().manual_seed(7)) + 0.5
    ours = torch.autograd.grad(actual, inputs, upstream)
    theirs = torch.autograd.grad(expected, inputs, upstream, materialize_grads=True, allow_unused=True)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, **tolerance)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("seed", range(6))
def test_everything_at_once_equals_the_scalar_loops(symmetric: bool, reduction: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, keys = [(6, 6), (5, 9), (7, 4), (1, 3), (9, 9), (8, 2)][seed]
    query, key = embeddings(rows, keys, seed=seed)
    target = torch.randint(-1, keys, (rows,), generator=generator)
    target[0] = 0
    counts = torch.randint(0, 3, (rows,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    options = {
        "target": target,
        "key_ids": torch.randint(-1, 4, (keys,), generator=generator),
        "query_ids": torch.randint(-1, 4, (rows,), generator=generator) if seed % 2 else None,
        "exclude": (offsets, torch.randint(-1, keys, (int(offsets[-1]),), generator=generator)),
        "scale": torch.rand((rows,) if seed % 3 else (), dtype=torch.float64, generator=generator).add(0.5),
        "log_q": torch.randn(keys, dtype=torch.float64, generator=generator),
        "weight": torch.rand(rows, dtype=torch.float64, generator=generator),
        "log_q_of_positive": seed not in (0, 3),
        "normalize": seed >= 3,
        "label_smoothing": 0.0 if seed == 1 else 0.15,
        "symmetric": symmetric,
        "reduction": reduction,
    }
    inputs = [query, key, options["scale"], options["log_q"], options["weight"]]
    for tensor in inputs:
        tensor.requires_grad_()
    value, stats = info_nce(query, key, return_stats=True, **options)
    expected, rows_of_oracle = naive(query, key, **options)
    same(value, expected, inputs)
    for i, row in enumerate(rows_of_oracle):
        lse, positive, rank = (-INF, -INF, -1) if row is None else row
        assert stats.lse[i].item() == pytest.approx(lse, rel=1e-12)
        assert stats.positive[i].item() == pytest.approx(positive, rel=1e-12)
        assert stats.rank[i].item() == rank
        assert stats.correct[i].item() is (rank == 0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_one_direction_is_cross_entropy(smoothing: float) -> None:
    query, key = embeddings(5, 8)
    target = torch.tensor([7, 0, 0, 3, 5])
    value = info_nce(query, key, scale=2.5, target=target, symmetric=False, label_smoothing=smoothing)
    same(value, cross_entropy(2.5 * query @ key.T, target, label_smoothing=smoothing), [query, key])


def test_both_directions_are_the_mean_of_two_cross_entropies() -> None:
    query, key = embeddings(6, 6)
    logits, labels = 3.0 * query @ key.T, torch.arange(6)
    same(info_nce(query, key, scale=3.0), (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2,
         [query, key])  # fmt: skip


def test_scale_defaults_to_one_and_symmetric_to_true() -> None:
    query, key = embeddings(4, 4)
    assert torch.equal(info_nce(query, key), info_nce(query, key, scale=1.0, symmetric=True))


def test_extra_keys_are_negatives_of_rows_and_have_no_column() -> None:
    query, key = embeddings(4, 7)
    logits, labels = query @ key.T, torch.arange(4)
    expected = (cross_entropy(logits, labels) + cross_entropy(logits[:, :4].T, labels)) / 2
    same(info_nce(query, key), expected, [query, key])


def test_a_row_without_target_stays_a_negative_in_columns_only() -> None:
    query, key = embeddings(5, 5)
    target = torch.tensor([0, 1, -1, 3, -7])
    value, stats = info_nce(query, key, target=target, reduction="none", return_stats=True)
    assert value[2] == 0 and value[4] == 0
    assert stats.lse[2] == -INF and stats.positive[4] == -INF and stats.rank[2] == -1 and not stats.correct[4]
    logits = query @ key.T
    rows = cross_entropy(logits[[0, 1, 3]], torch.tensor([0, 1, 3]), reduction="none")
    columns = cross_entropy(logits.T[[0, 1, 3]], torch.tensor([0, 1, 3]), reduction="none")
    same(value[[0, 1, 3]], (rows + columns) / 2, [query, key])
    one_way = info_nce(query, key, target=target, symmetric=False)
    assert torch.autograd.grad(one_way, query)[0][[2, 4]].count_nonzero() == 0


def test_rows_that_share_a_target_are_not_each_others_negatives() -> None:
    query, key = embeddings(3, 2)
    target = torch.tensor([1, 1, 0])
    logits = query @ key.T
    column = [torch.stack([logits[0, 1], logits[2, 1]]), torch.stack([logits[1, 1], logits[2, 1]])]
    expected = [cross_entropy(c, torch.tensor(0)) for c in column]
    expected.append(cross_entropy(logits[[2, 0, 1], 0], torch.tensor(0)))
    expected = (cross_entropy(logits, target, reduction="none") + torch.stack(expected)) / 2
    same(info_nce(query, key, target=target, reduction="none"), expected, [query, key])


def test_log_q_is_subtracted_from_the_logits_of_rows_and_cancels_in_columns() -> None:
    query, key = embeddings(5, 5)
    log_q = torch.linspace(-4, -1, 5, dtype=torch.float64).requires_grad_()
    logits, labels = query @ key.T, torch.arange(5)
    expected = (cross_entropy(logits - log_q, labels) + cross_entropy(logits.T, labels)) / 2
    same(info_nce(query, key, log_q=log_q), expected, [query, key, log_q])


def test_a_constant_log_q_changes_nothing() -> None:
    query, key = embeddings(5, 6)
    constant = torch.full((6,), -3.0, dtype=torch.float64, requires_grad=True)
    value = info_nce(query, key, log_q=constant)
    torch.testing.assert_close(value, info_nce(query, key), rtol=1e-12, atol=0.0)
    assert abs(torch.autograd.grad(value, constant)[0].sum()) < 1e-14


def test_a_positive_that_is_not_sampled_has_no_log_q() -> None:
    """Khrylchenko et al. 2025: the gradient is that of log(Σ_{j≠t} e^{s_j} / q_j) − s_t, weighted by the probability
    that the row is misclassified."""
    query, key = embeddings(5, 9)
    log_q = torch.linspace(-4, 1, 9, dtype=torch.float64).requires_grad_()
    target = torch.tensor([8, 0, 3, 3, 1])
    options = {"target": target, "log_q": log_q, "symmetric": False, "log_q_of_positive": False}
    inputs = [query, key, log_q]

    def margin() -> Tensor:
        logits = query @ key.T
        negatives = (logits - log_q).scatter(1, target[:, None], -INF).logsumexp(1)
        return negatives - logits.gather(1, target[:, None])[:, 0]

    value = info_nce(query, key, reduction="none", **options)
    same(value, torch.logaddexp(margin(), torch.zeros(5, dtype=torch.float64)), inputs)
    ours = torch.autograd.grad(info_nce(query, key, reduction="sum", **options), inputs)
    theirs = torch.autograd.grad((torch.sigmoid(margin()).detach() * margin()).sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_sampled_softmax_without_log_q_of_its_positive_is_unbiased() -> None:
    """Over all draws of n negatives with probability q, the mean of the sum of exponentials is the full softmax's."""
    key = torch.randn(4, 3, dtype=torch.float64)
    query, q = torch.randn(1, 3, dtype=torch.float64), torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    draws = torch.cartesian_prod(*[torch.arange(3)] * 2)  # two draws from the keys 1, 2, 3; the positive is key 0
    for draw in draws:
        keys = torch.cat([torch.zeros(1, dtype=torch.int64), draw + 1])
        log_q = torch.cat([torch.zeros(1, dtype=torch.float64), (2 * q[draw]).log()])
        loss = info_nce(query, key[keys], log_q=log_q, symmetric=False, log_q_of_positive=False)
        total += q[draw].prod() * loss.expm1()  # Σ_neg / e^{s_pos}
    torch.testing.assert_close(total, cross_entropy(query @ key.T, torch.tensor([0])).expm1())


def test_accidental_hits_follow_the_id_of_the_wanted_key() -> None:
    query, key = embeddings(4, 4)
    ids = torch.tensor([3, 8, 3, -1])
    logits = (query @ key.T).masked_fill(
        torch.tensor([[0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]).bool(), -INF
    )
    labels = torch.arange(4)
    expected = (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2
    same(info_nce(query, key, key_ids=ids), expected, [query, key])
    assert torch.equal(info_nce(query, key, key_ids=ids), info_nce(query, key, key_ids=ids, query_ids=ids))


def test_negative_ids_never_match() -> None:
    query, key = embeddings(4, 4)
    ids = torch.full((4,), -1)
    assert torch.equal(info_nce(query, key, key_ids=ids, query_ids=ids), info_nce(query, key))


def test_query_ids_reach_rows_without_a_target() -> None:
    """A row without a term leaves the columns of the key that it wants."""
    query, key = embeddings(3, 3)
    target = torch.tensor([0, 1, -1])
    value = info_nce(query, key, target=target, key_ids=torch.tensor([5, 6, 7]), query_ids=torch.tensor([5, 6, 5]))
    logits = query @ key.T
    rows = cross_entropy(logits[:2], target[:2])
    columns = cross_entropy(logits[:2, 0], torch.tensor(0)) + cross_entropy(logits[:, 1], torch.tensor(1))
    same(value, (rows + columns / 2) / 2, [query, key])


def test_int32_indices_mean_the_same() -> None:
    query, key = embeddings(3, 4)
    target, ids = torch.tensor([3, 0, 1]), torch.tensor([1, 1, 2, 3])
    offsets, positions = torch.arange(4), torch.tensor([1, 1, 1])
    wide = info_nce(query, key, target=target, key_ids=ids, exclude=(offsets, positions))
    narrow = info_nce(query, key, target=target.int(), key_ids=ids.int(), exclude=(offsets.int(), positions.int()))
    assert torch.equal(wide, narrow)


def test_excluded_pairs_leave_both_directions() -> None:
    query, key = embeddings(3, 3)
    offsets, positions = torch.tensor([0, 2, 2, 3]), torch.tensor([2, 1, 0])
    hidden = torch.tensor([[0, 1, 1], [0, 0, 0], [1, 0, 0]]).bool()
    logits, labels = (query @ key.T).masked_fill(hidden, -INF), torch.arange(3)
    expected = (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2
    same(info_nce(query, key, exclude=(offsets, positions)), expected, [query, key])


def test_exclude_takes_any_order_duplicates_skips_and_the_own_target() -> None:
    query, key = embeddings(2, 4)
    plain = info_nce(query, key, exclude=(torch.tensor([0, 2, 3]), torch.tensor([1, 3, 0])))
    messy = info_nce(query, key, exclude=(torch.tensor([1, 7, 9]), torch.tensor([99, 3, 1, 3, -1, 0, 1, 0, 1, 99])))
    assert torch.equal(plain, messy)


def test_scale_per_row_scales_that_row_in_columns_too() -> None:
    query, key = embeddings(4, 4)
    scale = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64, requires_grad=True)
    logits, labels = scale[:, None] * (query @ key.T), torch.arange(4)
    expected = (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2
    same(info_nce(query, key, scale=scale), expected, [query, key, scale])


def test_scale_of_zero_has_the_right_gradient() -> None:
    query, key = embeddings(4, 4)
    scale = torch.zeros((), dtype=torch.float64, requires_grad=True)
    expected = cross_entropy(scale * query @ key.T, torch.arange(4))
    same(info_nce(query, key, scale=scale, symmetric=False), expected, [query, key, scale])


def test_mean_divides_by_the_weights_of_rows_that_have_a_term() -> None:
    query, key = embeddings(4, 4)
    target, weight = torch.tensor([0, -1, 2, 3]), torch.tensor([1.0, 100.0, 0.0, 3.0], dtype=torch.float64)

    def rows() -> Tensor:
        return info_nce(query, key, target=target, reduction="none")

    def weighted(reduction: str) -> Tensor:
        return info_nce(query, key, target=target, weight=weight, reduction=reduction)

    same(weighted("mean"), (rows() * weight)[[0, 2, 3]].sum() / 4, [query, key])
    same(weighted("sum"), (rows() * weight)[[0, 2, 3]].sum(), [query, key])
    torch.testing.assert_close(weighted("none"), rows() * weight)
    same(info_nce(query, key, target=target), rows().sum() / 3, [query, key])


def test_mean_over_nothing_is_zero_with_zero_gradients() -> None:
    query, key = embeddings(3, 3)
    for options in ({"target": torch.full((3,), -1)}, {"weight": torch.zeros(3, dtype=torch.float64)}):
        value = info_nce(query, key, **options)
        assert value == 0
        for gradient in torch.autograd.grad(value, [query, key]):
            assert torch.equal(gradient, torch.zeros_like(gradient))


def test_a_row_without_negatives_counts_with_zero() -> None:
    query, key = embeddings(2, 2)
    both = torch.tensor([4, 4])
    value, stats = info_nce(query, key, key_ids=both, reduction="none", return_stats=True)
    assert torch.equal(value, torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(stats.lse, (query * key).sum(1), rtol=1e-14, atol=0.0)
    assert stats.rank.tolist() == [0, 0]
    for gradient in torch.autograd.grad(value.sum(), [query, key]):
        assert torch.equal(gradient, torch.zeros_like(gradient))
    single = info_nce(query, key, target=torch.tensor([0, 1]), exclude=(torch.tensor([0, 1, 1]), torch.tensor([1])))
    rest = info_nce(query, key, exclude=(torch.tensor([0, 1, 1]), torch.tensor([1])), reduction="none")
    torch.testing.assert_close(single, rest.sum() / 2)


def test_label_smoothing_reaches_the_row_term_only() -> None:
    query, key = embeddings(4, 4)
    logits, labels = query @ key.T, torch.arange(4)
    expected = (cross_entropy(logits, labels, label_smoothing=0.3) + cross_entropy(logits.T, labels)) / 2
    same(info_nce(query, key, label_smoothing=0.3), expected, [query, key])


def test_label_smoothing_averages_over_kept_keys() -> None:
    query, key = embeddings(2, 4)
    exclude = (torch.tensor([0, 1, 1]), torch.tensor([3]))
    value = info_nce(query, key, exclude=exclude, label_smoothing=0.2, symmetric=False, reduction="none")
    logits = query @ key.T
    expected = torch.stack(
        [
            cross_entropy(logits[0, :3], torch.tensor(0), label_smoothing=0.2),
            cross_entropy(logits[1], torch.tensor(1), label_smoothing=0.2),
        ]
    )
    same(value, expected, [query, key])


def test_normalize_is_that_of_torch_and_zero_rows_get_no_gradient() -> None:
    query, key = embeddings(4, 4)
    same(info_nce(query, key, scale=9.0, normalize=True),
         info_nce(normalize(query), normalize(key), scale=9.0), [query, key])  # fmt: skip
    with torch.no_grad():
        query[1] = 0.0
        key[2] = 0.0
    value = info_nce(query, key, scale=9.0, normalize=True)
    dq, dk = torch.autograd.grad(value, [query, key])
    assert torch.equal(dq[1], torch.zeros(5, dtype=torch.float64)) and dq[0].count_nonzero() == 5
    assert torch.equal(dk[2], torch.zeros(5, dtype=torch.float64)) and dk[0].count_nonzero() == 5


def test_rank_counts_strictly_greater_negatives_and_ties_are_correct() -> None:
    query = torch.tensor([[1.0, 0.0]])
    key = torch.tensor([[2.0, 0.0], [3.0, 0.0], [2.0, 5.0], [4.0, 0.0], [1.0, 0.0]])
    _, stats = info_nce(query, key, return_stats=True)
    assert stats.rank.tolist() == [2] and not stats.correct.item() and stats.rank.dtype == torch.int64
    _, stats = info_nce(query, key, exclude=(torch.tensor([0, 2]), torch.tensor([1, 3])), return_stats=True)
    assert stats.rank.tolist() == [0] and stats.correct.item()


def test_stats_are_detached() -> None:
    query, key = embeddings(3, 3)
    value, stats = info_nce(query, key, return_stats=True)
    assert value.requires_grad
    assert not any(tensor.requires_grad for tensor in stats)
    logits = query @ key.T
    torch.testing.assert_close(stats.lse, logits.logsumexp(1).detach())
    torch.testing.assert_close(stats.positive, logits.diagonal().detach())


def test_result_dtypes() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        query = torch.randn(3, 4, dtype=dtype).requires_grad_()
        key = torch.randn(3, 4, dtype=dtype).requires_grad_()
        value, stats = info_nce(query, key, return_stats=True)
        assert value.dtype == stats.lse.dtype == stats.positive.dtype == wide
        assert stats.correct.dtype == torch.bool
        value.backward()
        assert query.grad.dtype == key.grad.dtype == dtype


@pytest.mark.parametrize(("rows", "keys", "width"), [(0, 0, 4), (0, 5, 4), (3, 3, 0), (1, 1, 4)])
def test_empty_inputs(rows: int, keys: int, width: int) -> None:
    query, key = embeddings(rows, keys, width)
    for symmetric in (True, False):
        for smoothing in (0.0, 0.1):
            value, stats = info_nce(query, key, symmetric=symmetric, label_smoothing=smoothing, return_stats=True)
            expected, _ = naive(query, key, symmetric=symmetric, label_smoothing=smoothing)
            torch.testing.assert_close(value, expected)
            gradients = torch.autograd.grad(value, [query, key])
            assert [g.shape for g in gradients] == [query.shape, key.shape]
            assert all(g.count_nonzero() == 0 for g in gradients)
            assert stats.rank.shape == (rows,)


def test_no_keys_at_all() -> None:
    query, key = embeddings(2, 0)
    value = info_nce(query, key, target=torch.tensor([-1, -1]), key_ids=torch.zeros(0, dtype=torch.int64))
    assert value == 0
    assert torch.equal(torch.autograd.grad(value, query)[0], torch.zeros_like(query))


def test_no_rows_against_weights_and_exclusions() -> None:
    query, key = embeddings(0, 3)
    scale = torch.zeros(0, dtype=torch.float64, requires_grad=True)
    exclude = (torch.zeros(1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    value = info_nce(query, key, weight=torch.zeros(0), exclude=exclude, scale=scale, reduction="none")
    assert value.shape == (0,)
    assert torch.autograd.grad(value.sum(), scale)[0].shape == (0,)


def test_the_example_of_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = Path(__file__).parents[2] / "docs" / "infonce.md"
    code = page.read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, object] = {}
    exec(compile(code.replace("from mmrec_kernels", "from mmrec_kernels.infonce"), str(page), "exec"), names)
    assert isinstance(names["loss"], Tensor) and names["loss"].isfinite()
    assert len(capsys.readouterr().out.split()) == 2
