"""``results`` and ``demo``: many pieces at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_helpers import Mmrec, read_json

from mmrec.commands import runs
from mmrec.commands.results import variants
from mmrec.evaluation import Result, compare
from mmrec.recommender.config import RecommenderConfig

SHORT = ("--modalities", "identity,table", "--epochs", "1")


def test_variants_are_the_whole_identity_only_and_each_modality_alone() -> None:
    config = RecommenderConfig(modalities=("identity", "text", "image"), tune_backbone=True)
    found = variants(config)
    assert [v.modalities for v in found] == [("identity", "text", "image"), ("identity",), ("text",), ("image",)]
    assert [v.tune_backbone for v in found] == [True, False, True, False]
    assert len(variants(RecommenderConfig(modalities=("identity",)))) == 1


def test_results_pairs_seeds_and_reuses_finished_runs(
    mmrec: Mmrec, generated: Path, tiny: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, written = tmp_path / "study", tmp_path / "study.json"
    options = ("--data", generated, "--out", out, *tiny, *SHORT)
    options += ("--seeds", "0,1,2", "--peer", "bpr")
    line = mmrec("results", *options, "--json", written).succeeded()
    found = read_json(written)
    names = ["identity+table", "identity-only", "table", "bpr"]
    assert list(found["runs"]) == names and found["seed"] == [0, 1, 2] and found["model"] == names[0]
    whole, plain = (
        [Result.load(out / name / f"seed-{seed}" / "metrics.json") for seed in (0, 1, 2)] for name in names[:2]
    )
    paired = compare(whole, plain, "NDCG@10")
    shown = found["differences"]["identity-only"]["NDCG@10"]
    assert (shown["mean"], shown["low"], shown["high"], shown["seeds"]) == (paired.mean, paired.low, paired.high, 3)
    assert {"most-popular", "item-knn", "item-knn-20"} <= set(found["models"])
    assert set(found["groups"]) == {"warm", "cold-among-all", "cold-among-cold"} == set(found["group_differences"])
    for group, models in found["groups"].items():
        apart = found["group_differences"][group]["identity-only"]["HR@10"]["mean"]
        assert apart == pytest.approx(models[names[0]]["HR@10"]["mean"] - models["identity-only"]["HR@10"]["mean"])
    text = (out / "results.md").read_text(encoding="utf-8")
    assert str(paired) in text and "identity+table − identity-only" in line.out
    assert "what each modality brings" in (out / "report.html").read_text(encoding="utf-8")

    def never(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(runs.TrainedRun, "evaluate", never)
    monkeypatch.setattr("mmrec.recommender.training.train", never)
    monkeypatch.setattr("mmrec.peers.fit_pairwise", never)
    again = tmp_path / "again.json"
    mmrec("results", *options, "--json", again).succeeded()
    assert read_json(again) == found
    unordered = mmrec("results", *options, "--protocol", "G", "--peer", "esasrec")
    unordered.failed("--model esasrec: histories have no order under protocol G")
    assert "seed 0" not in unordered.out, "what a peer lacks is known before anything is trained"


@pytest.mark.parametrize("seeds", ["0,1", "0,0,1", "a,b,c", "", "-1,0,1"])
def test_results_needs_three_seeds(mmrec: Mmrec, generated: Path, tmp_path: Path, seeds: str) -> None:
    mmrec("results", "--data", generated, "--out", tmp_path / "s", f"--seeds={seeds}").failed("--seeds", repr(seeds))


def test_demo_goes_the_whole_way(mmrec: Mmrec, tiny: tuple[str, ...], tmp_path: Path) -> None:
    out, written = tmp_path / "demo", tmp_path / "demo.json"
    backbone = tiny[tiny.index("--backbone") : tiny.index("--backbone") + 2]
    sizes = [part for name in ("text_max_length=32", "width=16", "image_size=32") for part in ("--set", name)]
    options = ("--out", out, "--users", 60, "--items", 48, "--epochs", 1, *backbone, *sizes)
    line = mmrec("demo", *options, "--json", written).succeeded()
    found = read_json(written)
    assert found["protocol"] == "S" and found["config"]["quantize"] == "nf4" and found["config"]["lora_rank"] == 8
    assert {"identity-only", "most-popular", "item-knn", "item-knn-20"} <= set(found["beside"])
    assert len(found["recommendations"]) == 2
    report = out / "run" / "report.html"
    assert report.is_file() and str(report) in line.out
    before = report.stat().st_mtime_ns
    again = mmrec("demo", *options).succeeded()
    assert "finished already" in again.out and report.stat().st_mtime_ns > before
