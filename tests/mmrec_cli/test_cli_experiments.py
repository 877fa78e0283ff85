"""``mmrec experiment``: every one from one command line on the generated catalogue, with tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cli_helpers import Mmrec, read_json

from mmrec.commands.experiments import EXPERIMENTS

TRAIN = "width=16,item_heads=1,heads=1,expert_hidden=16,image_size=16,image_patch=16,batch_size=16,text_max_length=32"


def tables(found: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    return {table["title"]: table["rows"] for table in found["tables"]}


def written(out: Path) -> dict[str, Any]:
    """What every experiment leaves behind."""
    found = read_json(out / "results.json")
    text, page = ((out / name).read_text(encoding="utf-8") for name in ("results.md", "report.html"))
    assert found["question"] in text and "Findings" in page and found["findings"]
    for sentence in found["findings"]:
        assert sentence in text
    for table in found["tables"]:
        assert table["title"] in page and table["rows"]
    assert found["fingerprint"] and found["seed"] and found["seconds"] > 0 and found["settings"]
    return found


@pytest.fixture
def training(tiny_backbone: Path) -> tuple[str, ...]:
    return ("--set", "epochs=1", "--set", f"train={TRAIN}", "--set", f"backbone={tiny_backbone}")


@pytest.fixture
def reading(tiny_causal: Path) -> tuple[str, ...]:
    return tuple(
        part
        for entry in (f"backbone={tiny_causal}", "users=30", "steps=2", "batch_size=4", "max_length=300", "history=2")
        for part in ("--set", entry)
    )


def test_alignment(
    mmrec: Mmrec, generated: Path, training: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("experiment", "alignment-ablation", "--data", generated, "--out", tmp_path, "--seeds", "0,1", *training)
    kinds = ("--set", "kinds=none,bootstrap,infonce+contrast", "--set", "hold_out=0.2")
    mmrec(*options, *kinds).succeeded()
    found = written(tmp_path)
    rows = tables(found)
    names = [row["model"] for row in rows["All items"]]
    assert names[:4] == ["none", "bootstrap", "infonce+contrast", "identity-only"] and "most-popular" in names
    assert rows["All items"][0]["values"]["HR@10"]["seeds"] == 2
    assert {"Targets that training saw", "Targets that training never saw, ranked among all items"} <= set(rows)
    compared = rows["Minus no alignment: all items"]
    assert [row["model"] for row in compared] == ["bootstrap", "infonce+contrast", "identity-only"]
    leaks = {row["model"]: row["values"] for row in rows["What the aligned vectors hold"]}
    assert leaks["none"]["private from shared"] is None and leaks["infonce+contrast"]["private from shared"] >= 0
    config = read_json(tmp_path / "runs" / "infonce+contrast" / "seed-1" / "config.json")["config"]
    assert (config["align"], config["disentangle"], config["align_weight"]) == ("infonce", "contrast", 0.1)
    assert read_json(tmp_path / "runs" / "none" / "seed-0" / "config.json")["config"]["align_weight"] == 0

    def never(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr("mmrec.recommender.training.train", never)
    mmrec(*options, *kinds).succeeded()
    assert tables(written(tmp_path)) == rows
    mmrec(*options, "--set", "kinds=bootstrap,infonce").failed("--set kinds", "hold 'none'")
    mmrec(*options, "--set", "kinds=none,magic").failed("--set kinds", "'magic'", "infonce")
    mmrec(*options, "--set", "modalities=text").failed("--set modalities", "two at least")


def test_modality_ablation(mmrec: Mmrec, generated: Path, training: tuple[str, ...], tmp_path: Path) -> None:
    own = ("--set", "modalities=identity,text,table", "--set", "permutations=1")
    options = ("experiment", "modality-ablation", "--data", generated, "--out", tmp_path, "--seeds", "0,1")
    mmrec(*options, *training, *own).succeeded()
    found = written(tmp_path)
    rows = tables(found)
    assert [row["model"] for row in rows["Models"]] == ["identity+text+table", "identity-only", "text", "table"]
    (title,) = (name for name in rows if name.startswith("Dependence of identity+text+table"))
    parts = {row["modality"]: row["values"] for row in rows[title]}
    assert list(parts) == ["identity", "text", "table"]
    gains = [max(values["drop"]["mean"], 0) for values in parts.values()]
    if sum(gains):
        assert parts["text"]["dominance index"] == pytest.approx(gains[1] / sum(gains))
    alone = {row["model"]: row["values"]["NDCG@10"]["mean"] for row in rows["Models"]}
    for name, model in {"identity": "identity-only", "text": "text"}.items():
        assert parts[name]["trained alone"]["mean"] == pytest.approx(alone[model])
        gap = parts[name]["only"]["mean"] - alone[model]
        assert parts[name]["only less trained alone"]["mean"] == pytest.approx(gap)
    assert sum(rows["Attention mass"][0]["values"].values()) == pytest.approx(1, abs=1e-4)
    mmrec(*options, *training, "--set", "modalities=text").failed("--set modalities", "two at least")


def test_missing_modality(mmrec: Mmrec, generated: Path, training: tuple[str, ...], tmp_path: Path) -> None:
    own = ("--set", "modalities=identity,text,table", "--set", "rates=0,0.5", "--set", "dropout=0,0.5")
    options = ("experiment", "missing-modality", "--data", generated, "--out", tmp_path, "--seeds", "0")
    mmrec(*options, *training, *own).succeeded()
    found = written(tmp_path)
    rows = tables(found)
    curves = rows["Curves, NDCG@10"]
    assert len(curves) == 2 * (4 + 1 + 1)
    whole = {row["model"]: row["values"]["NDCG@10"]["mean"] for row in rows["Models, nothing taken away"]}
    for row in curves:
        values = row["values"]
        assert values["0"] == pytest.approx(whole[row["model"]]), "nothing is taken away at rate 0"
        assert values["area"] == pytest.approx((values["0"] + values["0.5"]) / 2)
    assert {row["filled by"] for row in curves} == {"nothing", "mean", "neighbour", "left out"}
    config = read_json(tmp_path / "runs" / "modality_dropout 0.5" / "seed-0" / "config.json")["config"]
    assert config["modality_dropout"] == 0.5 and len(found["charts"]) == 3
    mmrec(*options, *training, "--set", "rates=0.5,0.1").failed("--set rates", "increase")
    mmrec(*options, *training, "--set", "modalities=identity").failed("--set modalities", "content to take away")


def test_soft_prompt_and_lora(mmrec: Mmrec, generated: Path, reading: tuple[str, ...], tmp_path: Path) -> None:
    own = ("--set", "rank=2", "--set", "last_layers=1", "--set", "soft_tokens=2")
    options = ("experiment", "soft-prompt-lora", "--data", generated, "--out", tmp_path, "--seeds", "0,1")
    line = mmrec(*options, *reading, *own).succeeded()
    found = written(tmp_path)
    rows = tables(found)
    assert [row["model"] for row in rows["Means"]][:4] == ["frozen", "soft prompt", "LoRA, last layers", "both"]
    assert [row["model"] for row in rows["Minus frozen"]] == ["soft prompt", "LoRA, last layers", "both"]
    (interaction,) = rows["Interaction: what the soft prompt adds beside LoRA, less what it adds alone"]
    means = {row["model"]: row["values"]["NDCG@10"]["mean"] for row in rows["Means"]}
    expected = means["both"] - means["LoRA, last layers"] - means["soft prompt"] + means["frozen"]
    assert interaction["values"]["NDCG@10"]["mean"] == pytest.approx(expected, abs=1e-12)
    assert found["facts"]["test users"] == 30 and line.out.count(", seed ") == 8
    again = mmrec(*options, *reading, *own).succeeded()
    assert ", seed " not in again.out and tables(written(tmp_path)) == rows
    other = mmrec(*options, *reading, *own, "--set", "steps=1").succeeded()
    assert other.out.count(", seed ") == 8, "what a config says decides, for the frozen model too"


def test_gap(mmrec: Mmrec, generated: Path, reading: tuple[str, ...], tmp_path: Path) -> None:
    own = ("--set", "rank=2", "--set", "soft_tokens=2", "--set", "examples=4,16")
    mmrec("experiment", "gap", "--data", generated, "--out", tmp_path, "--seeds", "0", *reading, *own).succeeded()
    found = written(tmp_path)
    rows = tables(found)["Every way"]
    assert [(row["way"], row["examples"]) for row in rows[:3]] == [
        ("frozen, plain", "0"), ("frozen, hard prompt", "0"), ("soft prompt", "4"),
    ]  # fmt: skip
    assert len(rows) == 2 + 2 * 4
    chart = found["charts"][0]
    assert set(chart["series"]) == {
        "soft prompt",
        "LoRA",
        "LoRA, hard prompt",
        "hybrid",
        "frozen, plain",
        "frozen, hard prompt",
    }
    assert [point[0] for point in chart["series"]["LoRA"]] == [4.0, 16.0]


def test_factorial(mmrec: Mmrec, generated: Path, reading: tuple[str, ...], tmp_path: Path) -> None:
    own = ("--set", "ranks=1,2", "--set", "placements=all-linear", "--set", "orders=joint,prompt-first")
    options = ("experiment", "prompt-adapter", "--data", generated, "--out", tmp_path, "--seeds", "0,1")
    mmrec(*options, *reading, *own, "--set", "soft_tokens=2").succeeded()
    found = written(tmp_path)
    rows = tables(found)
    effects = {row["effect"]: row["values"] for row in rows["Effects on NDCG@10"]}
    assert set(effects) == {
        "prompt", "rank", "order", "prompt × rank", "prompt × order", "rank × order", "three and more together",
        "between seeds",
    }  # fmt: skip
    assert sum(values["share"]["mean"] for values in effects.values()) == pytest.approx(1)
    assert sum(values["freedom"] for values in effects.values()) == 15
    assert len(rows["Cells"]) == 8 and len(rows["Levels"]) == 6
    cells = [row["values"]["NDCG@10"]["mean"] for row in rows["Cells"] if row["rank"] == "1"]
    (level,) = (row for row in rows["Levels"] if row["level"] == "1")
    assert level["values"]["NDCG@10"]["mean"] == pytest.approx(sum(cells) / 4)


def test_prompting(
    mmrec: Mmrec, generated: Path, tiny_causal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = [
        f"backbone={tiny_causal}",
        "users=6",
        "negatives=5",
        "history=3",
        "shots=2",
        "neighbours=2",
        "max_length=1500",
    ]
    settings = [part for entry in own for part in ("--set", entry)]
    options = ("experiment", "prompting", "--data", generated, "--out", tmp_path, *settings)
    mmrec(*options).succeeded()
    found = written(tmp_path)
    rows = tables(found)
    (title,) = (name for name in rows if name.startswith("6 users, 6 candidates"))
    ways = {row["way"]: row["values"] for row in rows[title]}
    assert {
        "text, yes or no",
        "JSON, yes or no",
        "text, likelihood",
        "most-popular",
        "item-knn-20",
        "by chance",
    } <= set(ways)
    assert ways["by chance"]["HR@1"] == pytest.approx(1 / 6) and 0 <= ways["text, yes or no"]["AUC"]["mean"] <= 1
    cost = {row["way"]: row["values"]["tokens of a prompt"] for row in rows["What it takes"]}
    assert cost["text, examples, yes or no"] > cost["text, yes or no"] < cost["text, retrieved items, yes or no"]

    def never(*_: object, **__: object) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr("mmrec.llm.YesNoScorer.__call__", never)
    mmrec(*options).succeeded()
    assert tables(written(tmp_path)) == rows


def test_evaluator(mmrec: Mmrec, generated: Path, tiny_causal: Path, tmp_path: Path) -> None:
    own = [f"backbone={tiny_causal}", "users=12", "rows=3", "history=3", "pairs=2", "text_chars=40", "max_length=1500"]
    settings = [part for entry in own for part in ("--set", entry)]
    mmrec("experiment", "evaluator", "--data", generated, "--out", tmp_path, *settings).succeeded()
    found = written(tmp_path)
    rows = tables(found)
    judges = [row["judge"] for row in rows["Agreement with stars"]]
    assert judges[1:3] == ["popularity as judge", "chance"] and len(judges) == 7
    planted = rows["Planted faults, and what is found of them"]
    wanted = {(row["judge"], row["fault"]): row["values"]["planted"] for row in planted if row["values"]["planted"]}
    assert wanted == {
        ("planted: first place", "position_bias"): 0.2, ("planted: long texts", "verbosity_bias"): 1.0,
        ("planted: popular items", "popularity_bias"): 0.5,
    }  # fmt: skip
    noise = {row["judge"]: row["values"]["τ"] for row in rows["Agreement with stars"]}["planted: noise only"]
    assert noise["mean"] > 0.3 and found["facts"]["rows"] == 36


def test_latency(mmrec: Mmrec, generated: Path, training: tuple[str, ...], tmp_path: Path) -> None:
    own = (
        "--set",
        "modalities=identity,table",
        "--set",
        "seconds=0.05",
        "--set",
        "depths=2",
        "--set",
        "dtypes=float32",
    )
    mmrec("experiment", "latency", "--data", generated, "--out", tmp_path, *training, *own).succeeded()
    found = written(tmp_path)
    rows = tables(found)
    ways = rows["Ways to answer, single requests"]
    assert {row["model"] for row in ways} == {"identity+table", "identity-only", "table"}
    assert all(row["values"]["p50 ms"] > 0 for row in ways) and any(row["frontier"] for row in ways)
    assert {row["stage"] for row in rows["Stages of a request"]} >= {"user", "retrieval", "total"}


def test_the_list_and_what_cannot_be(mmrec: Mmrec, generated: Path, tmp_path: Path) -> None:
    listed = mmrec("experiment").succeeded()
    assert all(f"{name}: {experiment.question}" in listed.out for name, experiment in EXPERIMENTS.items())
    out = ("--data", generated, "--out", tmp_path)
    mmrec("experiment", "magic", *out).failed("experiment 'magic': there are prompting, soft-prompt-lora")
    mmrec("experiment", "gap").failed("--data is needed")
    mmrec("experiment", "gap", *out, "--set", "colour=red").failed("--set needs NAME=VALUE with one of", "'colour=red'")
    mmrec("experiment", "gap", *out, "--set", "steps=many").failed("--set steps cannot be 'many'; its default is 60")
    mmrec("experiment", "gap", *out, "--set", "examples=1,x").failed("--set examples cannot be", "'x'")
    mmrec("experiment", "gap", *out, "--set", "examples=").failed("--set examples cannot be ''; its default is 64")
    mmrec("experiment", "gap", *out, "--set", "steps=true").failed("--set steps cannot be True")
    mmrec("experiment", "gap", *out, "--seeds", "a").failed("--seeds", "'a'")
