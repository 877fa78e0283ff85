"""``mmrec evaluate`` and ``mmrec info`` without any trained model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import Mmrec, read_json

from mmrec.adaptation import Catalogue
from mmrec.evaluation import compare, evaluate, item_knn, most_popular, split
from mmrec.evaluation.protocols import hold_out_items


@pytest.mark.parametrize("protocol", ["S", "G", "T"])
def test_evaluate_floor_gives_the_library_s_figures(
    mmrec: Mmrec, generated: Path, tmp_path: Path, protocol: str
) -> None:
    written = tmp_path / "floor.json"
    line = mmrec("evaluate", "--data", generated, "--protocol", protocol, "--model", "most-popular", "--json", written)
    line.succeeded()
    catalogue = Catalogue.load(generated)
    parts = split(catalogue, protocol)
    expected = evaluate(most_popular, parts, model="x", dataset="x", fingerprint=catalogue.fingerprint())
    found = read_json(written)
    assert found["metrics"] == expected.metrics
    assert {"HR@10", "NDCG@10", "Recall@20"} <= set(found["metrics"])
    assert (found["protocol"], found["model"], found["seed"]) == (protocol, "most-popular", None)
    assert found["fingerprint"] == catalogue.fingerprint() and found["split"] == parts.id
    assert f"{expected.metrics['NDCG@10']:.4f}" in line.out


def test_floors_stand_beside_with_paired_intervals(mmrec: Mmrec, generated: Path, tmp_path: Path) -> None:
    written = tmp_path / "knn.json"
    line = mmrec(
        "evaluate",
        "--data",
        generated,
        "--protocol",
        "S",
        "--model",
        "item-knn",
        "--neighbours",
        "5",
        "--json",
        written,
    ).succeeded()
    found = read_json(written)
    assert found["model"] == "item-knn-5"
    assert set(found["beside"]) == {"most-popular", "item-knn", "item-knn-20"}
    catalogue = Catalogue.load(generated)
    parts, fingerprint = split(catalogue, "S"), catalogue.fingerprint()

    def knn5(*args: object, **kwargs: object) -> np.ndarray:
        return item_knn(*args, neighbours=5, **kwargs)  # type: ignore[arg-type]

    ours = evaluate(knn5, parts, model="a", dataset="x", fingerprint=fingerprint)
    floor = evaluate(most_popular, parts, model="b", dataset="x", fingerprint=fingerprint)
    paired = compare(ours, floor, "HR@10")
    shown = found["differences"]["most-popular"]["HR@10"]
    assert (shown["mean"], shown["low"], shown["high"]) == (paired.mean, paired.low, paired.high)
    assert "item-knn-5 − most-popular" in line.out and str(paired) in line.out


def test_stage_mask_metrics_and_groups_reach_the_result(mmrec: Mmrec, generated: Path, tmp_path: Path) -> None:
    written = tmp_path / "valid.json"
    mmrec(
        "evaluate", "--data", generated, "--protocol", "S", "--model", "most-popular", "--stage", "valid", "--mask",
        "none", "--metric", "NDCG-ngcf20@7", "--no-groups", "--no-floors", "--json", written,
    ).succeeded()  # fmt: skip
    found = read_json(written)
    assert (found["stage"], found["mask"]) == ("valid", "none")
    assert "NDCG-ngcf20@7" in found["metrics"] and set(found["rows"]) == {"all"} and not found["beside"]


def test_cold_items_have_their_own_rows(mmrec: Mmrec, generated: Path, tmp_path: Path) -> None:
    written = tmp_path / "cold.json"
    line = mmrec("evaluate", "--data", generated, "--protocol", "S", "--model", "most-popular", "--json", written)
    assert {"warm", "cold-among-all", "cold-among-cold"} <= set(read_json(written.resolve())["rows"])
    assert "cold-among-cold" in line.succeeded().out


def test_held_out_items_are_cold(mmrec: Mmrec, generated: Path, tmp_path: Path) -> None:
    written = tmp_path / "held.json"
    floor = ("evaluate", "--data", generated, "--protocol", "S", "--model", "most-popular", "--no-floors")
    mmrec(*floor, "--hold-out", 0.2, "--split-seed", 5, "--json", written).succeeded()
    found = read_json(written)
    assert found["split"] == hold_out_items(split(Catalogue.load(generated), "S"), 0.2, seed=5).id
    assert found["rows"]["cold-among-all"]["users"] > 0 and "held out" in found["split_rule"]
    mmrec(*floor, "--hold-out", 2).failed("share", "2")


def test_against_a_floor_that_is_not_printed_anyway(mmrec: Mmrec, generated: Path, tmp_path: Path) -> None:
    written = tmp_path / "against.json"
    mmrec(
        "evaluate", "--data", generated, "--protocol", "S", "--model", "item-knn", "--no-floors", "--against",
        "most-popular", "--json", written,
    ).succeeded()  # fmt: skip
    assert set(read_json(written)["differences"]) == {"most-popular"}


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "arguments", "figures"),
    [
        ("movielens-100k-mm", ["S", "most-popular"], {"HR@10": 0.04984, "NDCG@10": 0.02530, "HR@20": 0.08165}),
        ("movielens-100k-mm", ["S", "item-knn"], {"HR@10": 0.05938, "NDCG@10": 0.02810, "HR@20": 0.11347}),
        ("amazon-scientific", ["S", "most-popular"], {"HR@10": 0.0261, "NDCG@10": 0.0172}),
        ("amazon-baby", ["G", "most-popular"], {"Recall@10": 0.0295, "Recall@20": 0.0505, "NDCG@20": 0.0210}),
    ],
)
def test_floors_of_the_real_data(
    mmrec: Mmrec,
    real_data: Callable[[str], Path],
    tmp_path: Path,
    name: str,
    arguments: list[str],
    figures: dict[str, float],
) -> None:
    written = tmp_path / "real.json"
    protocol, model = arguments
    mmrec(
        "evaluate", "--data", real_data(name), "--protocol", protocol, "--model", model, "--no-floors", "--no-groups",
        "--json", written,
    ).succeeded()  # fmt: skip
    found = read_json(written)["metrics"]
    digits = 5 if name.startswith("movielens") else 4
    assert {key: round(found[key], digits) for key in figures} == figures


def test_info_tells_what_a_folder_holds(mmrec: Mmrec, generated: Path, tmp_path: Path) -> None:
    written = tmp_path / "info.json"
    line = mmrec("info", "--data", generated, "--json", written).succeeded()
    assert read_json(written)["data"] == Catalogue.load(generated).describe()
    assert "60 users, 48 items" in line.out and "protocols: S, G, T" in line.out


def test_info_without_arguments_lists_packages(mmrec: Mmrec) -> None:
    line = mmrec("info").succeeded()
    assert "torch" in line.out and "mmrec-kernels" in line.out
