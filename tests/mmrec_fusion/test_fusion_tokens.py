from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmrec.fusion import Tokens, Whitening, gather_ragged


def tokens_of(lengths: list[int], width: int, num_kinds: int = 1, seed: int = 0) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    total = int(offsets[-1])
    kind = torch.randint(num_kinds, (total,), generator=generator)
    return Tokens(torch.randn(total, width, generator=generator), offsets, kind)


def rows_of(tokens: Tokens, item: int) -> Tensor:
    return tokens.values[tokens.offsets[item] : tokens.offsets[item + 1]]


def test_gather_ragged_names_the_rows_of_each_item() -> None:
    rows, offsets = gather_ragged(torch.tensor([0, 2, 2, 5]), torch.tensor([2, 1, 0, 2]))
    assert rows.tolist() == [2, 3, 4, 0, 1, 2, 3, 4]
    assert offsets.tolist() == [0, 3, 3, 5, 8]


@pytest.mark.parametrize("items", [[], [1], [1, 1]])
def test_gather_ragged_of_nothing(items: list[int]) -> None:
    rows, offsets = gather_ragged(torch.tensor([0, 2, 2, 5]), torch.tensor(items, dtype=torch.int64))
    assert rows.tolist() == [] and offsets.tolist() == [0] * (len(items) + 1)


@pytest.mark.parametrize("item", [-1, 3])
def test_gather_ragged_refuses_an_item_that_is_not_there(item: int) -> None:
    with pytest.raises((IndexError, RuntimeError)):
        gather_ragged(torch.tensor([0, 2, 2, 5]), torch.tensor([item]))


def test_select_takes_each_items_tokens_in_the_given_order() -> None:
    tokens = tokens_of([2, 0, 3, 1], 4, num_kinds=5)
    chosen = [3, 2, 1, 2]
    selected = tokens.select(torch.tensor(chosen))
    assert selected.num_items == 4 and selected.present.tolist() == [True, True, False, True]
    for row, item in enumerate(chosen):
        assert torch.equal(rows_of(selected, row), rows_of(tokens, item))
        first, stop = int(tokens.offsets[item]), int(tokens.offsets[item + 1])
        place = slice(int(selected.offsets[row]), int(selected.offsets[row + 1]))
        assert torch.equal(selected.kind[place], tokens.kind[first:stop])


def test_the_gradient_of_a_repeated_item_adds_up() -> None:
    tokens = tokens_of([1, 2], 3)
    tokens = tokens._replace(values=tokens.values.requires_grad_())
    tokens.select(torch.tensor([1, 1, 1])).values.sum().backward()
    assert tokens.values.grad is not None
    assert tokens.values.grad.tolist() == [[0.0] * 3, [3.0] * 3, [3.0] * 3]


def test_mean_is_per_item_and_zero_without_tokens() -> None:
    tokens = tokens_of([2, 0, 3, 1], 4)
    tokens = tokens._replace(values=tokens.values.double().requires_grad_())
    rows = tokens.values
    expected = torch.stack([rows[:2].mean(0), torch.zeros(4).double(), rows[2:5].mean(0), rows[5]])
    torch.testing.assert_close(tokens.mean(), expected)
    assert torch.autograd.gradcheck(lambda v: tokens._replace(values=v).mean(), tokens.values)
    assert torch.equal(tokens_of([0, 0], 4).mean(), torch.zeros(2, 4))


def numpy_whitening(values: Tensor, kind: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """PCA through a singular value decomposition in numpy: mean per kind, and W up to signs."""
    import numpy as np

    x, k = values.double().numpy(), kind.numpy()
    mean = np.stack([x[k == j].mean(0) for j in range(k.max() + 1)])
    _, singular, directions = np.linalg.svd(x - mean[k], full_matrices=False)
    variance = singular**2 / len(x)
    step = np.sqrt(variance + 1e-3 * variance.sum() / x.shape[1])
    return torch.from_numpy(mean), torch.from_numpy((directions.T / step)[:, :rank])


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_whitening_is_principal_components_of_numpy(rank: int) -> None:
    tokens = tokens_of([3, 0, 2, 4] * 20, 6, num_kinds=2)
    stretched = tokens.values * torch.tensor([5.0, 3.0, 2.0, 1.0, 0.5, 0.1]) + 7 * tokens.kind.unsqueeze(1) + 3
    tokens = tokens._replace(values=stretched @ torch.linalg.qr(torch.randn(6, 6))[0])
    whiten = Whitening(6, 2, rank).fit(tokens, torch.arange(tokens.num_items))
    mean, matrix = numpy_whitening(tokens.values, tokens.kind, rank)
    torch.testing.assert_close(whiten.mean.double(), mean, rtol=1e-5, atol=1e-5)
    largest = matrix.abs().argmax(0, keepdim=True)
    torch.testing.assert_close(whiten.matrix.double(), matrix * matrix.gather(0, largest).sign(), rtol=1e-4, atol=1e-5)

    white = (tokens.values.double() - mean[tokens.kind]) @ whiten.matrix.double()
    expected = white / white.norm(dim=1, keepdim=True) * rank**0.5
    torch.testing.assert_close(whiten(tokens.values, tokens.kind).double(), expected, rtol=1e-4, atol=1e-4)


def test_white_directions_are_uncorrelated_with_variance_near_one() -> None:
    tokens = tokens_of([1] * 400, 5)
    tokens = tokens._replace(values=tokens.values @ torch.randn(5, 5) + 10)
    whiten = Whitening(5, 1, 4).fit(tokens, torch.arange(400))
    white = ((tokens.values - whiten.mean) @ whiten.matrix).double()
    covariance = white.T @ white / 400
    assert (covariance - covariance.diag().diag()).abs().max() < 1e-4
    variance = torch.linalg.eigvalsh(torch.cov(tokens.values.double().T, correction=0)).flip(0)
    torch.testing.assert_close(
        covariance.diag(), (variance / (variance + 1e-3 * variance.mean()))[:4], rtol=1e-3, atol=0
    )


def test_whitening_looks_at_the_training_items_only() -> None:
    tokens = tokens_of([2, 1, 0, 3, 2, 2], 4, num_kinds=2)
    items = torch.tensor([0, 2, 3, 4])
    whiten = Whitening(4, 2, 3).fit(tokens, items)
    changed = tokens.values.clone()
    changed[2:3] = torch.nan
    changed[8:] = 1e6
    other = Whitening(4, 2, 3).fit(tokens._replace(values=changed), items)
    assert torch.equal(whiten.mean, other.mean) and torch.equal(whiten.matrix, other.matrix)


def test_every_direction_points_where_its_largest_entry_is_positive() -> None:
    tokens = tokens_of([3] * 30, 8)
    matrix = Whitening(8, 1, 8).fit(tokens, torch.arange(30)).matrix
    assert (matrix.gather(0, matrix.abs().argmax(0, keepdim=True)) > 0).all()
    mirrored = Whitening(8, 1, 8).fit(tokens._replace(values=-tokens.values), torch.arange(30)).matrix
    torch.testing.assert_close(mirrored, matrix)


def test_with_fewer_tokens_than_rank_only_their_span_is_kept() -> None:
    tokens = tokens_of([1] * 4, 10)
    whiten = Whitening(10, 1, 6).fit(tokens, torch.arange(4))
    used = whiten.matrix.abs().amax(0) > 0
    assert used.tolist() == [True] * 3 + [False] * 3
    span = tokens.values - tokens.values.mean(0)
    outside = torch.randn(10)
    outside = outside - span.T @ torch.linalg.lstsq(span.T, outside).solution
    moved = whiten(tokens.values + 5 * outside, tokens.kind)
    torch.testing.assert_close(moved, whiten(tokens.values, tokens.kind), rtol=1e-3, atol=1e-3)


def test_identical_tokens_whiten_to_zero_and_nothing_is_nan() -> None:
    tokens = Tokens(torch.ones(5, 3), torch.arange(6), torch.zeros(5, dtype=torch.int64))
    whiten = Whitening(3, 1, 2).fit(tokens, torch.arange(5))
    assert torch.equal(whiten(tokens.values, tokens.kind), torch.zeros(5, 2))


def test_without_tokens_nothing_changes() -> None:
    tokens = tokens_of([0, 2, 0], 4)
    whiten = Whitening(4, 3, 2)
    before = {name: value.clone() for name, value in whiten.state_dict().items()}
    whiten.fit(tokens, torch.tensor([0, 2]))
    after = whiten.state_dict()
    assert set(after) == {"mean", "matrix"} and all(torch.equal(after[name], before[name]) for name in before)


def test_a_kind_without_training_tokens_has_mean_zero() -> None:
    tokens = Tokens(torch.randn(6, 4), torch.arange(7), torch.tensor([0, 0, 2, 2, 0, 2]))
    whiten = Whitening(4, 3, 2).fit(tokens, torch.arange(6))
    assert torch.equal(whiten.mean[1], torch.zeros(4))
    torch.testing.assert_close(whiten.mean[2], tokens.values[tokens.kind == 2].mean(0))


@pytest.mark.parametrize("rank", [0, 5])
def test_rank_out_of_range(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"rank must be in \[1, 4\], got {rank}"):
        Whitening(4, 1, rank)
