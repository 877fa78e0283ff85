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


def config_of(out: Path, name: str, seed: int) -> dict[str, Any]:
    """The config of the one run of that name."""
    (path,) = (out / "runs").glob(f"{name}-????????/seed-{seed}/config.json")
    return read_json(path)["config"]


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
    config = config_of(tmp_path, "infonce+contrast", 1)
    assert (config["align"], config["disentangle"], config["align_weight"]) == ("infonce", "contrast", 0.1)
    assert config_of(tmp_path, "none", 0)["align_weight"] == 0
    with monkeypatch.context() as patched:
        patched.setattr("mmrec.commands.experiments.alignment._agreement", lambda leaks: float("nan"))
        mmrec(*options, *kinds).succeeded()
        unknown = written(tmp_path)
        assert tables(unknown)["What the aligned vectors hold"][0]["values"]["agreement"] is None
        assert not any("says most" in text or "nan" in text for text in unknown["findings"])

    def never(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr("mmrec.recommender.training.train", never)
    mmrec(*options, *kinds).succeeded()
    assert tables(written(tmp_path)) == rows
    mmrec(*options, "--set", "kinds=bootstrap,infonce").failed("--set kinds", "hold 'none'")
    mmrec(*options, "--set", "train=width=16,align=vae").failed("--set train cannot hold align=vae", "--set kinds")
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
        assert values["area"]["mean"] == pytest.approx((values["0"] + values["0.5"]) / 2)
        assert values["area"]["low"] <= values["area"]["mean"] <= values["area"]["high"]
    areas = {tuple(row[n] for n in ("model", "taken away", "filled by")): row["values"]["area"] for row in curves}
    more = [areas[f"modality_dropout {rate}", "whole", "nothing"]["mean"] for rate in ("0", "0.5")]
    (told,) = (text for text in found["findings"] if text.startswith("whole: "))
    assert f"({more[1] - more[0]:+.4f} [" in told
    assert sum(text.startswith("modality_dropout 0: ") for text in found["findings"]) == 3
    assert {row["filled by"] for row in curves} == {"nothing", "mean", "neighbour", "left out"}
    assert config_of(tmp_path, "modality_dropout 0.5", 0)["modality_dropout"] == 0.5 and len(found["charts"]) == 3
    mmrec(*options, *training, *own, "--set", "epochs=2").succeeded()
    assert len(list((tmp_path / "runs").iterdir())) == 4, "another setting trains beside what is there"
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
    assert found["split_rule"].endswith("30 test users (seed 0)")
    assert 1 <= found["facts"]["titles of a prompt"] <= found["facts"]["of a history's last"] <= 2
    assert found["facts"]["cells"]["both"]["rank"] == 2 and found["facts"]["cells"]["frozen"]["quantize"] == "nf4"
    again = mmrec(*options, *reading, *own).succeeded()
    assert ", seed " not in again.out and tables(written(tmp_path)) == rows
    other = mmrec(*options, *reading, *own, "--set", "steps=1").succeeded()
    assert other.out.count(", seed ") == 8, "what a config says decides, for the frozen model too"


def test_gap(mmrec: Mmrec, generated: Path, reading: tuple[str, ...], tmp_path: Path) -> None:
    own = ("--set", "rank=2", "--set", "soft_tokens=2", "--set", "examples=4,8")
    options = ("experiment", "gap", "--data", generated, "--out", tmp_path, "--seeds", "0", *reading, *own)
    mmrec(*options, "--set", "quantize=none").succeeded()
    found = written(tmp_path)
    assert {name: config["quantize"] for name, config in found["facts"]["cells"].items()} == dict.fromkeys(
        ("frozen, plain", "frozen, hard prompt", "soft prompt", "LoRA", "LoRA, hard prompt", "hybrid")
    )
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
    assert [point[0] for point in chart["series"]["LoRA"]] == [4.0, 8.0]
    mmrec(*options, "--set", "examples=9").failed("--set examples must be from 1 to 8", "2 steps of 4 see 8", "got 9")
    mmrec(*options, "--set", "examples=0,4").failed("--set examples must be from 1 to 8", "got 0")
    mmrec(*options, "--set", "steps=1000", "--set", "examples=4000").failed("--set examples must be", "got 4000")


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
    assert all(0 < values["p"] <= 1 for name, values in effects.items() if name != "between seeds")
    assert len(found["facts"]["cells"]) == 10
    one = ("--set", "ranks=1", "--set", "prompts=hybrid", "--set", "orders=joint", "--set", "placements=last")
    mmrec(*options, *reading, *one).failed(
        "levels must be distinct, and two at least of one factor", "prompt ['hybrid']"
    )
    mmrec(*options, *reading, "--set", "ranks=2,2").failed("levels must be distinct", "rank ['2', '2']")
    hard = mmrec(*options, *reading, "--set", "prompts=soft,hard")
    hard.failed("cell hard 2 attention prompt-first: order 'prompt-first' needs trained vectors")
    assert ", seed " not in hard.out, "nothing is trained before"


def test_factorial_of_one_seed(mmrec: Mmrec, generated: Path, reading: tuple[str, ...], tmp_path: Path) -> None:
    own = (
        "--set",
        "ranks=1,2",
        "--set",
        "placements=last",
        "--set",
        "last_layers=1",
        "--set",
        "orders=joint",
        "--set",
        "soft_tokens=2",
    )
    mmrec(
        "experiment", "prompt-adapter", "--data", generated, "--out", tmp_path, "--seeds", "0", *reading, *own
    ).succeeded()
    found = written(tmp_path)
    assert all(row["values"]["p"] is None for row in tables(found)["Effects on NDCG@10"])
    assert found["findings"][0] == "One seed per cell does not tell what the factors do from what seeds do."


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
    options = ("experiment", "latency", "--data", generated, "--out", tmp_path, "--seeds", "3,4")
    mmrec(*options, *training, *own).succeeded()
    found = written(tmp_path)
    assert found["seed"] == [3], "it measures one training"
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
    mmrec("experiment", "gap", *out, "--set", "steps=many").failed("--set steps cannot be 'many'; its default is 64")
    mmrec("experiment", "gap", *out, "--set", "examples=1,x").failed("--set examples cannot be", "'x'")
    mmrec("experiment", "gap", *out, "--set", "examples=").failed("--set examples cannot be ''; its default is 64")
    mmrec("experiment", "gap", *out, "--set", "steps=true").failed("--set steps cannot be True")
    mmrec("experiment", "gap", *out, "--seeds", "a").failed("--seeds", "'a'")
