"""Neighbours of a history, from the item store."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mmrec.prompting import HardPrompt, neighbours
from mmrec.recommender.answers import HistoryError
from mmrec.recommender.latency import generated


@pytest.mark.parametrize("dtype", ("float32", "int8"))
def test_neighbours_of_the_last_items(dtype):
    with generated(300, dtype, width=16) as online:
        version = online.version
        histories = [["1", "2", "3", "nobody"], ["250", "7"]]
        found = neighbours(version, histories, 4, last=2)
        every = version.vectors(torch.arange(300))
        for titles, kept, all_of in zip(found, ([2, 3], [250, 7]), ([1, 2, 3], [250, 7]), strict=True):
            scores = every @ F.normalize(every[kept], dim=1).mean(0)
            scores[all_of] = -torch.inf
            assert titles == [f"Item {row}" for row in scores.topk(4).indices.tolist()]
        assert len(neighbours(version, histories, 1000)[1]) == 298
        text = HardPrompt().build(["Item 250", "Item 7"], context=found[1]).text
        assert f'Related items:\n- "{found[1][0]}"' in text
        assert neighbours(version, [], 3) == []
        with pytest.raises(HistoryError, match="history 1 has 1 item"):
            neighbours(version, [["1"], ["nobody"]], 3)
        with pytest.raises(ValueError, match="k and last must be at least 1, got 0 and 5"):
            neighbours(version, histories, 0)
