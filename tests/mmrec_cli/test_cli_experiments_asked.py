"""``mmrec experiment prompting`` and ``evaluator``: a causal model that is asked, and what is refused before it is."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cli_helpers import Mmrec, read_json
from test_cli_experiments import tables, written

from mmrec.commands.data import load_data
from mmrec.commands.experiments import evaluator, prompting
from mmrec.evaluation import Split
from mmrec.evaluation.ragged import Ragged
from mmrec.prompting import HardPrompt

LESS, LIKELY = "text, likelihood less that without history", "text, likelihood"


def sets(*entries: str) -> tuple[str, ...]:
    return tuple(part for entry in entries for part in ("--set", entry))


def rewritten(folder: Path, table: str, **columns: Any) -> Path:
    """The catalogue with other columns in ``items`` or ``interactions``, each a polars expression."""
    import polars as pl

    path = folder / f"{table}.parquet"
    pl.read_parquet(path).with_columns(**columns).write_parquet(path)
    return folder


def test_prompting(
    mmrec: Mmrec, generated: Path, tiny_causal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = ("users=6", "negatives=5", "history=3", "shots=2", "neighbours=2", "max_length=1500")
    options = ("experiment", "prompting", "--data", generated, "--out", tmp_path, "--seeds", "7,8")
    options += sets(f"backbone={tiny_causal}", *own)  # type: ignore[assignment]
    mmrec(*options).succeeded()
    found = written(tmp_path)
    rows = tables(found)
    (title,) = (name for name in rows if name.startswith("6 users, 6 candidates"))
    assert found["protocol"] == "C" and found["split"].startswith("C-") and found["seed"] == [7]
    assert found["split_rule"].endswith("; 6 users, 5 drawn items beside the target")
    ways = {row["way"]: row["values"] for row in rows[title]}
    assert {
        "text, yes or no",
        "JSON, yes or no",
        LIKELY,
        LESS,
        "most-popular",
        "item-knn-20",
        "by chance",
    } <= set(ways)
    assert ways["by chance"]["HR@1"] == pytest.approx(1 / 6) and 0 <= ways["text, yes or no"]["AUC"]["mean"] <= 1
    costs = {row["way"]: row["values"] for row in rows["What it takes"]}
    cost = {way: values["tokens of a prompt"] for way, values in costs.items()}
    assert cost["text, examples, yes or no"] > cost["text, yes or no"] < cost["text, retrieved items, yes or no"]
    asked = HardPrompt(intro="Someone chose these items, one after another:", question="The next item:")
    assert cost[LESS] == cost[LIKELY] + len(asked.build([]).text), "a token is a byte"
    assert costs[LESS]["tokens of its candidates"] == 2 * costs[LIKELY]["tokens of its candidates"]
    prior = read_json(tmp_path / "cells" / "likelihood without history.json")["cost"]["seconds per user"]
    assert costs[LESS]["seconds per user"] == pytest.approx(costs[LIKELY]["seconds per user"] + prior)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr("mmrec.llm.YesNoScorer.__call__", never)
    mmrec(*options).succeeded()
    assert tables(written(tmp_path)) == rows


def test_answers_belong_to_the_data(
    mmrec: Mmrec, own_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import polars as pl

    asked: list[str] = []

    def answer(asker: Any, way: Any) -> tuple[np.ndarray, dict[str, float]]:
        asked.append(way.answer)
        return np.random.default_rng(len(asked)).random(asker.sets.items.shape), {"seconds per user": 1.0}

    monkeypatch.setattr(prompting._Asker, "__call__", answer)
    monkeypatch.setattr(prompting, "_without_model", lambda data, sets: {"none": np.zeros(sets.items.shape)})
    options = ("experiment", "prompting", "--data", own_copy, "--out", tmp_path, *sets("users=6", "negatives=4"))
    mmrec(*options).succeeded()
    mmrec(*options).succeeded()
    assert len(asked) == 7
    rewritten(own_copy, "items", title=pl.col("title").str.to_uppercase())
    mmrec(*options).succeeded()
    assert len(asked) == 14, "the same users and candidates, other titles"


def test_examples_of_no_were_never_chosen() -> None:
    parts = [[(user + step) % 6 for step in range(1, 6)] for user in range(6)]  # each user all items but one
    parts.append([0, 1, 2, 3, 4, 5])  # who has chosen everything says no to nothing
    cut = [[part[:3] for part in parts], [part[3:4] for part in parts], [part[4:] for part in parts]]
    train, valid, test = map(Ragged.from_lists, cut)
    split = Split("S", 7, 6, train, valid, test, "by hand")
    never = {tuple(map(str, part[:2])): str(user) for user, part in enumerate(parts[:6])}
    data: Any = SimpleNamespace(split=split, catalogue=SimpleNamespace(item_titles=list("012345")))
    for seed in range(5):
        asked: Any = SimpleNamespace(users=np.array([2]), seed=seed)
        shots = prompting._Asker(prompting.PromptingSettings(), data, asked)._shots(9)
        assert len(shots) == 5 and [shot.answer for shot in shots] == ["Yes", "No", "Yes", "No", "Yes"]
        for shot in shots:
            own = never[tuple(shot.history)]
            assert own != "2", "who is asked is no example"
            assert shot.item == own if shot.answer == "No" else shot.item != own


@pytest.mark.parametrize("name", ["prompting", "evaluator"])
def test_settings_are_checked_before_data_are_read(mmrec: Mmrec, tmp_path: Path, name: str) -> None:
    wrong = {
        "prompting": (("users", 1, 2), ("negatives", 3, 4), ("history", 0, 1), ("shots", -1, 0), ("neighbours", 0, 1)),
        "evaluator": (("users", 1, 2), ("rows", 1, 2), ("history", 0, 1), ("pairs", 0, 1), ("text_chars", -1, 0)),
    }[name]
    options = ("experiment", name, "--data", tmp_path / "nowhere", "--out", tmp_path / "out")
    for setting, given, least in (*wrong, ("max_length", 127, 128)):
        mmrec(*options, *sets(f"{setting}={given}")).failed(f"--set {setting} must be at least {least}, got {given}")
        mmrec(*options, *sets(f"{setting}={least}")).failed("nowhere")
    mmrec(*options, *sets("quantize=int3")).failed("--set quantize must be nf4 or none, got 'int3'")
    mmrec(*options, *sets("quantize=none")).failed("nowhere")
    if name == "evaluator":
        for noise in ("0", "-1", "NaN", "Infinity"):
            mmrec(*options, *sets(f"noise={noise}")).failed("--set noise must be above 0 and finite, got")


def test_one_user_has_no_interval(mmrec: Mmrec, own_copy: Path, tmp_path: Path) -> None:
    import polars as pl

    path = own_copy / "interactions.parquet"
    events = pl.read_parquet(path)
    busiest = events["user_id"].value_counts(sort=True)["user_id"][0]
    events.filter(pl.col("user_id") == busiest).write_parquet(path)
    options = ("--data", own_copy, "--out", tmp_path)
    mmrec("experiment", "prompting", *options).failed("has one test user", "two at least")
    needed = mmrec("experiment", "evaluator", *options, *sets("rows=2"))
    needed.failed("two users with 6 rated items", "has 1: lower --set rows")


def test_evaluator(mmrec: Mmrec, generated: Path, tiny_causal: Path, tmp_path: Path) -> None:
    own = ("users=12", "rows=3", "history=3", "pairs=2", "text_chars=40", "max_length=1500")
    options = ("experiment", "evaluator", "--data", generated, "--out", tmp_path)
    mmrec(*options, *sets(f"backbone={tiny_causal}", *own)).succeeded()
    found = written(tmp_path)
    rows = tables(found)
    assert found["seed"] == [0] and found["split_rule"] == "3 rated items of each of 12 users, drawn"
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
    hits = [row["within the interval"] for row in planted].count("yes")
    assert found["findings"][-1] == f"{hits} of 12 planted values lie within the 95 % interval of what is found."


class Indifferent:
    """A judge to whom everything is the same."""

    def score(self, histories: Any, items: Any) -> np.ndarray:
        return np.zeros(len(items))

    def prefer(self, histories: Any, first: Any, second: Any) -> np.ndarray:
        return np.full(len(first), 0.5)


def test_what_cannot_be_computed_is_no_finding(
    mmrec: Mmrec, own_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A constant judge, texts of one length, and a single user whose stars differ."""
    import polars as pl

    monkeypatch.setattr(evaluator, "_judge", lambda settings: Indifferent())
    one = pl.read_parquet(own_copy / "interactions.parquet")["user_id"].value_counts(sort=True)["user_id"][0]
    alternate = 4 + pl.int_range(pl.len()).mod(2)
    rewritten(own_copy, "items", title=pl.lit("A thing"))
    rewritten(own_copy, "interactions", rating=pl.when(pl.col("user_id") == one).then(alternate).otherwise(4.0))
    options = ("experiment", "evaluator", "--data", own_copy, "--out", tmp_path, "--seeds", "1")
    outcome = mmrec(*options, *sets("users=60", "rows=4", "text_chars=0")).succeeded()
    found = written(tmp_path)
    rows = tables(found)
    model = rows["Agreement with stars"][0]["values"]
    assert model["τ"] is None and model["τ within users"] is None and model["ρ"] is None
    assert model["pairs right"] == 0.5, "of one user: a mean without an interval"
    assert rows["Biases"][0]["values"]["length"] is None and rows["Biases"][0]["values"]["first place"] == 0
    planted = {(row["judge"], row["fault"]): row for row in rows["Planted faults, and what is found of them"]}
    assert planted["planted: long texts", "verbosity_bias"]["within the interval"] == "–"
    assert planted["planted: long texts", "verbosity_bias"]["values"]["found"] is None
    unknown = [row for row in planted.values() if row["within the interval"] == "–"]
    assert {row["fault"] for row in unknown} == {"position_bias", "verbosity_bias"} and len(unknown) == 8
    for what in ("the order of a user's items", "which of two items it names", "a bias for or against the first place",
                 "a bias for or against long texts", "a bias for or against popular items"):  # fmt: skip
        assert f"These rows give nothing to say about {what}." in found["findings"]
    assert re.search(r"[0-4] of 4 planted values lie .*; 8 more cannot be found on these rows", found["findings"][-1])
    pages = [(tmp_path / name).read_text(encoding="utf-8") for name in ("results.md", "report.html")]
    assert not any(re.search(r"\bnan\b", text, re.IGNORECASE) for text in (outcome.out, *pages))


@pytest.mark.parametrize(
    ("kind", "words"), [("by user", ("no order", "--set rows")), ("low", ("reach 3 stars", "from 4 on"))]
)
def test_stars_that_say_nothing_are_refused_before_asking(
    mmrec: Mmrec, own_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, words: tuple[str, ...]
) -> None:
    import polars as pl

    def never(settings: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(evaluator, "_judge", never)
    by_user = pl.col("user_id").rank("dense").mod(5).cast(pl.Float64) + 1
    ratings = by_user if kind == "by user" else pl.col("rating").clip(1, 3)
    rewritten(own_copy, "interactions", rating=ratings)
    options = ("experiment", "evaluator", "--data", own_copy, "--out", tmp_path, *sets("rows=4", "users=20"))
    mmrec(*options).failed("4 ratings drawn of each of 20 users", *words)


def test_the_last_rating_of_an_item_counts(own_copy: Path) -> None:
    import polars as pl

    path = own_copy / "interactions.parquet"
    events = pl.read_parquet(path)
    earlier = events.with_columns(rating=6 - pl.col("rating"), timestamp=pl.col("timestamp") - 10**9)
    pl.concat([events, earlier]).write_parquet(path)
    data = load_data(own_copy, "S")
    log, titles = data.catalogue.interactions, data.catalogue.item_titles
    assert log.rating is not None and len(set(titles)) == len(titles)
    last: dict[int, dict[int, float]] = {}
    for user, item, stars in zip(log.user.tolist(), log.item.tolist(), log.rating.tolist(), strict=True):
        last.setdefault(user, {})[item] = stars
    rows = evaluator._rows(data, evaluator.EvaluatorSettings(users=1000, rows=3, history=99), 0)
    able = {user for user, rated in last.items() if len(rated) >= 7}
    assert set(rows.users.tolist()) == able and len(able) < len(last)
    for user in able:
        own = np.flatnonzero(rows.users == user)
        items = rows.items[own].tolist()
        assert len(set(items)) == 3 and rows.stars[own].tolist() == [last[user][item] for item in items]
        liked = {titles[item] for item, stars in last[user].items() if stars >= 4 and item not in items}
        for row in own:
            assert len(rows.histories[row]) == len(liked) and set(rows.histories[row]) == liked
