from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrec.evaluation import Ragged
from mmrec.recommender import Batch, epoch_batches, num_batches

LENGTHS = [0, 1, 2, 5, 6, 7, 13, 40]


def histories(lengths: list[int]) -> Ragged:
    """Item rows are unique over all histories, so that a target names its place."""
    stops = np.cumsum([0, *lengths])
    return Ragged.from_lists([range(a, b) for a, b in zip(stops, stops[1:], strict=False)])


def windows(batches: list[Batch]) -> list[tuple[list[int], list[int]]]:
    found = []
    for batch in batches:
        lengths = batch.offsets.diff().tolist()
        parts = zip(batch.index.split(lengths), batch.target.split(lengths), strict=True)
        found += [(index.tolist(), target.tolist()) for index, target in parts]
    return found


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 30), max_size=8), st.integers(1, 9), st.integers(1, 5), st.integers(0, 3))
def test_every_interaction_but_a_historys_first_is_a_target_once(
    lengths: list[int], max_length: int, batch_size: int, epoch: int
) -> None:
    given_histories = histories(lengths)
    batches = epoch_batches(given_histories, max_length, batch_size, seed=3, epoch=epoch)
    targets = sorted(t for _, target in windows(batches) for t in target)
    assert targets == sorted(row for items in given_histories.to_lists() for row in items[1:])
    assert len(batches) <= num_batches(given_histories, max_length, batch_size)
    assert all(1 <= len(batch.offsets) - 1 <= batch_size for batch in batches)
    for index, target in windows(batches):
        assert 1 <= len(index) <= max_length
        assert target == [row + 1 for row in index] and index == list(range(index[0], index[0] + len(index)))


def test_a_short_history_is_one_window_from_its_first_item() -> None:
    for epoch in range(20):
        found = windows(epoch_batches(histories(LENGTHS), 6, 4, seed=0, epoch=epoch))
        assert (list(range(14, 20)), list(range(15, 21))) in found  # 7 items: 6 positions
        assert ([1], [2]) in found  # 2 items: 1 position


def test_order_is_a_function_of_seed_and_epoch_only() -> None:
    def read(seed: int, epoch: int) -> list[tuple[list[int], list[int]]]:
        torch.manual_seed(seed * 31 + epoch)
        np.random.seed(epoch)
        return windows(epoch_batches(histories(LENGTHS), 6, 3, seed=seed, epoch=epoch))

    read(9, 9)
    assert read(0, 1) == read(0, 1)
    assert read(0, 1) != read(0, 2) and read(0, 1) != read(1, 1)


def test_drawing_an_epoch_leaves_the_global_generators_alone() -> None:
    state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()  # type: ignore[index, union-attr]
    epoch_batches(histories(LENGTHS), 6, 3, seed=0, epoch=0)
    assert np.array_equal(np.random.get_state()[1], state)  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_cuts_of_a_long_history_move_through_every_phase() -> None:
    first_windows = set()
    for epoch in range(60):
        found = windows(epoch_batches(histories([40]), 6, 100, seed=0, epoch=epoch))
        lengths = [len(index) for index, _ in sorted(found)]
        assert all(length == 6 for length in lengths[1:-1])
        first_windows.add(lengths[0])
    assert first_windows == {1, 2, 3, 4, 5, 6}


def test_windows_are_shuffled_and_spread_evenly() -> None:
    batches = epoch_batches(histories([3] * 50), 6, 8, seed=0, epoch=0)
    sizes = [len(batch.offsets) - 1 for batch in batches]
    assert len(batches) == 7 and max(sizes) - min(sizes) <= 1
    order = [index[0] for index, _ in windows(batches)]
    assert order != sorted(order)


@pytest.mark.parametrize("lengths", [[], [0], [1, 1, 0]])
def test_nothing_to_predict(lengths: list[int]) -> None:
    assert epoch_batches(histories(lengths), 6, 3, seed=0, epoch=0) == []
    assert num_batches(histories(lengths), 6, 3) == 0


def test_types_and_device() -> None:
    batch = epoch_batches(histories(LENGTHS), 6, 3, seed=0, epoch=0)[0].to("cpu")
    assert isinstance(batch, Batch)
    assert {tensor.dtype for tensor in batch} == {torch.int64}
