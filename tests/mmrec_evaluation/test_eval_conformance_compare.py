"""Every comparison that means nothing is refused, with the reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
from metric_oracle import NAMES

from mmrec.evaluation import compare, evaluate, rank_scores
from mmrec.evaluation.metrics import Metric
from mmrec.evaluation.protocols import Split, global_time, leave_last_out
from mmrec.evaluation.results import Result, Row


def result(names: Sequence[str] = ("NDCG@10",), **changes: Any) -> Result:
    users = np.arange(6)
    values = {name: np.random.default_rng(len(name)).random(6) for name in names}
    settings = {"protocol": "S", "split": "S-1", "stage": "test", "mask": "train", "dataset": "d", "fingerprint": "f"}
    return Result(**{"model": "m", "seed": None, **settings, **changes}, rows={"all": Row(users, values)})


SETTINGS = {"protocol": "G", "split": "S-2", "stage": "valid", "mask": "none", "fingerprint": "g"}


@pytest.mark.parametrize("field", SETTINGS)
def test_results_that_differ_in_one_setting_are_refused_wherever_they_stand(field: str) -> None:
    same, other = result(), result(**{field: SETTINGS[field]})
    why = f"results differ in {field} and cannot be compared: .*'{SETTINGS[field]}'"
    for left, right in ((same, other), (other, same)):
        with pytest.raises(ValueError, match=why):
            compare(left, right, "NDCG@10", resamples=100)
    seeds = [dataclasses.replace(same, seed=n) for n in range(3)]
    for n in range(3):
        mixed = [*seeds[:n], dataclasses.replace(other, seed=n), *seeds[n + 1 :]]
        for left, right in ((mixed, seeds), (seeds, mixed), (mixed, mixed)):
            with pytest.raises(ValueError, match=why):
                compare(left, right, "NDCG@10", resamples=100)
    assert compare(seeds, same, "NDCG@10", resamples=100).mean == 0


def test_the_name_of_the_data_does_not_matter_its_content_does() -> None:
    assert compare(result(), result(dataset="another name"), "NDCG@10", resamples=100).mean == 0


@pytest.mark.parametrize("asked", NAMES)
def test_a_result_without_exactly_this_metric_is_refused(asked: str) -> None:
    """Of another variant or another depth; among same depths the error says that it is another definition."""
    ours, wanted = result([asked]), Metric.parse(asked)
    for name in NAMES:
        if name == asked:
            continue
        has, other = Metric.parse(name), result([name], model="theirs")
        kin = (has.base, has.k) == (wanted.base, wanted.k)
        why = f"only ['{name}']: another definition, not comparable" if kin else f"it has ['{name}']"
        for left, right in ((ours, other), (other, ours)):
            with pytest.raises(ValueError) as caught:
                compare(left, right, asked, resamples=100)
            assert f"'theirs' has no {asked}" in str(caught.value) and why in str(caught.value)
    assert compare(ours, result([*NAMES], model="theirs"), asked, resamples=100).users == 6


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("MAP@10", "ambiguous: write MAP-min, MAP-all or MAP-hits"),
        ("NDCG-ngcf@10", "needs the length of the list"),
        ("NDCG", "needs the form NAME@K"),
        ("ndcg@10", "is not known"),
        ("AUC@10", "is not known"),
    ],
)
def test_names_that_fix_no_formula_are_refused(name: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        compare(result(), result(), name)
    with pytest.raises(ValueError, match=why):
        result([name])


def test_real_splits_masks_and_stages_are_told_apart() -> None:
    """Nothing set by hand: what ``evaluate`` notes down is enough to refuse."""
    rng = np.random.default_rng(3)
    user, item, time = np.repeat(np.arange(20), 6), rng.integers(0, 30, 120), rng.permutation(120)
    scores = rng.random((20, 30))

    def ranker(split: Split, stage: Any, k: int, **settings: Any) -> np.ndarray:
        return rank_scores(lambda rows: scores[rows], split, stage, k, **settings)

    last = leave_last_out(user, item, 20, 30, time=time)
    run = partial(evaluate, ranker, dataset="d", metrics=["NDCG@10"], groups=False)
    base = run(last, model="base", fingerprint="f")
    others = {
        "protocol": run(global_time(user, item, time, 20, 30), model="o", fingerprint="f"),
        "split": run(leave_last_out(user, item, 20, 30, time=time[::-1]), model="o", fingerprint="f"),
        "stage": run(last, model="o", fingerprint="f", stage="valid"),
        "mask": run(last, model="o", fingerprint="f", mask="none"),
        "fingerprint": run(last, model="o", fingerprint="g"),
    }
    for field, other in others.items():
        with pytest.raises(ValueError, match=f"results differ in {field} and cannot be compared"):
            compare(base, other, "NDCG@10", resamples=100)
    assert compare(base, run(last, model="again", fingerprint="f"), "NDCG@10", resamples=100).mean == 0
