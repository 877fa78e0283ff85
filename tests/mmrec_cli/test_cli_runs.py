"""``train``, ``evaluate`` of a run, ``recommend``, ``info --run``."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from cli_helpers import Mmrec, read_json

from mmrec.adaptation import Catalogue
from mmrec.commands.runs import open_run
from mmrec.evaluation import Result, compare, split
from mmrec.evaluation.protocols import hold_out_items
from mmrec.recommender.training import loop
from mmrec.recommender.training.storage import load_tensors


def test_a_run_folder_holds_everything(trained: Path, generated: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert {"config.json", "run.json", "metrics.json", "curves.json", "report.html", "identity-only"} <= names
    assert not any(name.startswith("checkpoint") for name in names)
    config = read_json(trained / "config.json")
    assert config["fingerprint"] == Catalogue.load(generated).fingerprint() and config["seed"] == 0
    assert len(read_json(trained / "curves.json")["epochs"]) == 3
    page = (trained / "report.html").read_text(encoding="utf-8")
    assert "identity-only" in page and "item-knn-20" in page and "Attention mass" in page and "Expert" in page
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page


def test_train_json_has_metrics_floors_and_intervals(trained: Path) -> None:
    found = read_json(trained.parent / "train.json")
    result = Result.load(trained / "metrics.json")
    assert found["metrics"] == result.metrics and {"HR@10", "NDCG@10", "Recall@20"} <= set(found["metrics"])
    assert (found["protocol"], found["seed"], found["model"]) == ("S", 0, "identity+text+image+table")
    assert set(found["beside"]) == {"identity-only", "most-popular", "item-knn", "item-knn-20"}
    plain = Result.load(trained / "identity-only" / "metrics.json")
    assert found["differences"]["identity-only"]["HR@10"]["mean"] == compare(result, plain, "HR@10").mean


def test_evaluating_a_run_gives_the_figures_of_its_training(mmrec: Mmrec, trained: Path, tmp_path: Path) -> None:
    written = tmp_path / "again.json"
    line = mmrec("evaluate", "--model", trained, "--against", trained / "identity-only", "--json", written).succeeded()
    found = read_json(written)
    assert found["metrics"] == Result.load(trained / "metrics.json").metrics
    assert str(trained / "identity-only") in found["differences"]
    assert "identity+text+image+table − identity-only" in line.out
    assert math.isfinite(found["rows"]["cold-among-cold"]["metrics"]["HR@10"])


def test_a_run_keeps_its_protocol_and_its_data(mmrec: Mmrec, trained: Path, own_copy: Path) -> None:
    mmrec("evaluate", "--model", trained, "--protocol", "G").failed("--protocol G", "trained under S")
    image = next((own_copy / "images").iterdir())
    image.unlink()
    mmrec("evaluate", "--model", trained, "--data", own_copy).failed("other data")


def test_same_seed_same_bits_and_no_overwriting(
    mmrec: Mmrec, trained: Path, generated: Path, tiny: tuple[str, ...], tmp_path: Path
) -> None:
    again = tmp_path / "again"
    options = ("--data", generated, *tiny, "--no-floors", "--no-identity")
    mmrec("train", "--out", again, *options).succeeded()
    first, second = load_tensors(trained, "run")[0], load_tensors(again, "run")[0]
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name].numpy(), second[name].numpy()) for name in first)
    mmrec("train", "--out", again, *options).failed("finished run")
    mmrec("train", "--out", again, *options, "--resume").succeeded()
    mmrec("train", "--out", again, *options, "--resume", "--seed", 1).failed("config")


@pytest.mark.parametrize("extra", [(), ("--tune-backbone", "--set", "tune_items=4")], ids=["frozen", "tuned"])
def test_ctrl_c_saves_and_resume_gives_the_same_bits(
    mmrec: Mmrec,
    generated: Path,
    tiny: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    extra: tuple[str, ...],
) -> None:
    options = ("--data", generated, *tiny, *extra, "--modalities", "identity,text", "--no-floors", "--no-identity")
    options += ("--set", "router_bias_rate=0.01", "--set", "router_score=sigmoid")
    mmrec("train", "--out", tmp_path / "whole", *options).succeeded()
    step = loop._Loop._step
    done = []

    def interrupted_step(self: loop._Loop, batch: loop.Batch) -> float:
        done.append(1)
        if len(done) == 5:
            signal.raise_signal(signal.SIGINT)
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Loop, "_step", interrupted_step)
        line = mmrec("train", "--out", tmp_path / "halves", *options)
    assert line.code == 130 and "interrupted" in line.err and "--resume" in line.err and "Traceback" not in line.err
    assert len(done) == 5 and (tmp_path / "halves" / "checkpoint.json").is_file()
    mmrec("train", "--out", tmp_path / "halves", *options).failed("--resume")
    mmrec("evaluate", "--model", tmp_path / "halves").failed("interrupted run")
    mmrec("train", "--out", tmp_path / "halves", *options, "--resume").succeeded()
    whole, halves = (load_tensors(tmp_path / name, "run")[0] for name in ("whole", "halves"))
    assert all(np.array_equal(whole[name].numpy(), halves[name].numpy()) for name in whole)
    assert whole["model.item_tower.experts.bias"].any()
    assert (
        Result.load(tmp_path / "whole" / "metrics.json").metrics
        == Result.load(tmp_path / "halves" / "metrics.json").metrics
    )


def test_training_under_g(mmrec: Mmrec, generated: Path, tiny: tuple[str, ...], tmp_path: Path) -> None:
    written = tmp_path / "g.json"
    mmrec(
        "train", "--data", generated, "--protocol", "G", "--modalities", "identity,table", "--out", tmp_path / "g",
        *tiny, "--no-floors", "--no-identity", "--json", written, "--hold-out", 0.1, "--split-seed", 2,
    ).succeeded()  # fmt: skip
    found = read_json(written)
    assert (found["protocol"], found["mask"]) == ("G", "train")
    assert found["split"] == hold_out_items(split(Catalogue.load(generated), "G", seed=2), 0.1, seed=2).id
    again = tmp_path / "again.json"
    mmrec("evaluate", "--model", tmp_path / "g", "--no-floors", "--json", again).succeeded()
    assert read_json(again)["metrics"] == found["metrics"]
    mmrec("evaluate", "--model", tmp_path / "g", "--hold-out", 0.3).failed("--hold-out 0.3", "0.1")


def test_a_finished_run_of_before_a_hyper_parameter_is_used(
    mmrec: Mmrec, generated: Path, tiny: tuple[str, ...], tmp_path: Path
) -> None:
    options = ("train", "--data", generated, "--modalities", "identity,table", "--no-identity", "--no-floors", *tiny)
    mmrec(*options, "--out", tmp_path / "run").succeeded()
    facts = read_json(tmp_path / "run" / "run.json")
    assert facts["config"].pop("disentangle") is None and facts["config"].pop("align") == "infonce"
    (tmp_path / "run" / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    assert "finished already" in mmrec(*options, "--out", tmp_path / "run", "--resume").succeeded().out
    mmrec(*options, "--out", tmp_path / "run", "--resume", "--set", "align=bootstrap").failed("another config")


def test_token_vectors_of_texts(mmrec: Mmrec, generated: Path, tiny: tuple[str, ...], tmp_path: Path) -> None:
    """The finest level from end to end: tokens are cached, trained on, and read alike of new items."""
    options = ("--data", generated, "--modalities", "identity,text", *tiny, "--no-identity", "--no-floors")
    level = ("--set", "text_level=tokens", "--set", "tokens_per_text=4")
    mmrec("train", *options, *level, "--out", tmp_path / "tokens").succeeded()
    tensors, facts = load_tensors(tmp_path / "tokens", "run")
    assert facts["config"]["text_level"] == "tokens" and facts["spec"]["tokens"]["text"] == [64, 1]
    rows = open_run(tmp_path / "tokens").item_encoder().encode_part(Catalogue.load(generated), 0, 5)
    np.testing.assert_allclose(rows.vectors.numpy(), tensors["items.vectors"][:5].numpy(), atol=1e-5)
    assert all(int(count) <= 4 for count in rows.tokens["text"].offsets.diff())


def test_training_under_t(mmrec: Mmrec, generated: Path, tiny: tuple[str, ...], tmp_path: Path) -> None:
    """Global time: what training sees was before everything that is predicted, users without a past are not asked."""
    written = tmp_path / "t.json"
    options = ("--data", generated, "--protocol", "T", "--modalities", "identity,table", *tiny, "--no-identity")
    mmrec("train", *options, "--out", tmp_path / "t", "--json", written).succeeded()
    found, expected = read_json(written), split(Catalogue.load(generated), "T")
    assert (found["protocol"], found["split"]) == ("T", expected.id)
    result = Result.load(tmp_path / "t" / "metrics.json")
    assert result.rows["all"].users.tolist() == expected.users("test").tolist()
    tensors = load_tensors(tmp_path / "t", "run")[0]
    assert np.array_equal(tensors["model.trained"].numpy(), expected.popularity > 0)
    without = tmp_path / "untimed"
    catalogue = Catalogue.load(generated)
    dataclasses.replace(catalogue, interactions=dataclasses.replace(catalogue.interactions, timestamp=None)).save(
        without
    )
    options = ("--data", without, *options[2:])
    mmrec("train", *options, "--out", tmp_path / "no").failed("protocol 'T' needs timestamps")


def test_titles_can_be_masked(mmrec: Mmrec, generated: Path, tiny: tuple[str, ...], tmp_path: Path) -> None:
    """The same items under other titles have the same vectors, where they are masked and the identity is not read."""
    renamed = tmp_path / "renamed"
    catalogue = Catalogue.load(generated)
    title = catalogue.schema.title
    items = catalogue.items.with_columns((pl.col(title) + " of Elsewhere").alias(title))
    dataclasses.replace(catalogue, items=items).save(renamed)
    vectors = {}
    for name, folder in {"own": generated, "other": renamed}.items():
        for masked in ("true", "false"):
            out = tmp_path / f"{name}-{masked}"
            mmrec(
                "train", "--data", folder, "--modalities", "text", "--out", out, *tiny, "--set", f"mask_title={masked}",
                "--no-identity", "--no-floors",
            ).succeeded()  # fmt: skip
            vectors[name, masked] = load_tensors(out, "run")[0]["items.vectors"].numpy()
    assert np.array_equal(vectors["own", "true"], vectors["other", "true"])
    assert not np.allclose(vectors["own", "false"], vectors["other", "false"])
    assert not np.allclose(vectors["own", "true"], vectors["own", "false"])


def test_recommend_for_a_user(mmrec: Mmrec, trained: Path, generated: Path, tmp_path: Path) -> None:
    catalogue = Catalogue.load(generated)
    user = catalogue.user_ids[7]
    written = tmp_path / "answer.json"
    line = mmrec("recommend", "--run", trained, "--user", user, "-k", 5, "--json", written).succeeded()
    found = read_json(written)
    history = [catalogue.item_ids[row] for row in catalogue.history(7)]
    assert [entry["item"] for entry in found["history"]] == history
    answers = found["answers"]
    assert [a["rank"] for a in answers] == [1, 2, 3, 4, 5] and not {a["item"] for a in answers} & set(history)
    scores = [a["score"] for a in answers]
    assert scores == sorted(scores, reverse=True)
    for a in answers:
        assert a["title"] == catalogue.item_titles[catalogue.item_row(a["item"])] and a["title"] in line.out
        assert set(a["mass"]) == {"identity", "text", "image", "table"}
        assert sum(a["mass"].values()) == pytest.approx(1, abs=1e-5)


def test_recommend_for_a_pasted_history_with_unseen_items(
    mmrec: Mmrec, trained: Path, generated: Path, tmp_path: Path
) -> None:
    catalogue = Catalogue.load(generated)
    cold = np.flatnonzero(split(catalogue, "S").cold_items)
    assert len(cold)
    new, known = catalogue.item_ids[cold[0]], catalogue.item_ids[int(catalogue.history(0)[0])]
    written = tmp_path / "pasted.json"
    line = mmrec("recommend", "--run", trained, "--history", f"{known}, {new}", "-k", 3, "--json", written).succeeded()
    found = read_json(written)
    assert [entry["seen_in_training"] for entry in found["history"]] == [True, False]
    assert len(found["answers"]) == 3 and "(new)" in line.out
    # The unseen item alone is understood by its content; a model of identities alone knows nothing about it.
    mmrec("recommend", "--run", trained, "--history", new).succeeded()
    mmrec("recommend", "--run", trained / "identity-only", "--history", new).failed("none of its 1 item(s)")


def test_info_of_a_run(mmrec: Mmrec, trained: Path, tmp_path: Path) -> None:
    written = tmp_path / "info.json"
    line = mmrec("info", "--run", trained, "--json", written).succeeded()
    facts = read_json(written)["run"]
    assert facts["metrics"]["HR@10"] == Result.load(trained / "metrics.json").metrics["HR@10"]
    assert facts["config"]["lora_rank"] == 2 and "identity+text+image+table" in line.out
