"""`mmrec index`: a trained run as a store that answers the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars
import pytest
from cli_helpers import Mmrec, read_json

from mmrec.adaptation import Catalogue
from mmrec.adaptation.fingerprint import item_fingerprints
from mmrec.commands.runs import open_run
from mmrec.recommender import ItemStore, OnlineRecommender


def rename(folder: Path, row: int) -> None:
    """Gives an item another title."""
    path, column = folder / "items.parquet", Catalogue.load(folder).schema.title
    items = polars.read_parquet(path)
    titles = items[column].to_list()
    titles[row] = "Another title"
    items.with_columns(polars.Series(column, titles)).write_parquet(path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_store_answers_as_the_run(mmrec: Mmrec, trained: Path, tmp_path: Path, dtype: str) -> None:
    folder, told = tmp_path / "store", tmp_path / "index.json"
    outcome = mmrec("index", "--run", trained, "--out", folder, "--dtype", dtype, "--json", told).succeeded()
    assert f"version 1, 48 items of width 16 in {dtype}" in outcome.out
    run, store = open_run(trained), ItemStore(folder)
    content = read_json(told)
    assert content["items"] == 48 and content["model"] == run.model_id and content["version"] == 1
    assert content["bytes"] == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    catalogue, version = Catalogue.load(run.data), store.current()
    assert version.ids(np.arange(48)) == catalogue.item_ids and version.titles(np.arange(48)) == catalogue.item_titles
    assert np.array_equal(version.known(np.arange(48)).numpy(), run.trained_items)
    assert np.array_equal(version.content(np.arange(48)).numpy(), item_fingerprints(catalogue))
    online = OnlineRecommender(run.model, store, model_id=run.model_id)
    history = [catalogue.item_ids[n] for n in (3, 9, 4)]
    (found,) = online.recommend([history], 8)
    answer = tmp_path / "answer.json"
    mmrec("recommend", "--run", trained, "--history", ",".join(history), "-k", 8, "--json", answer).succeeded()
    wanted = read_json(answer)["answers"]
    if dtype == "float32":
        assert found.items == [one["item"] for one in wanted] and found.titles == [one["title"] for one in wanted]
        np.testing.assert_allclose(found.scores, [one["score"] for one in wanted], rtol=1e-4)
        assert found.known == [one["seen_in_training"] for one in wanted]
    assert len({*found.items} & {one["item"] for one in wanted}) >= 7
    assert mmrec("index", "--run", trained, "--out", folder).code == 0
    assert online.reload() and store.current().number == 2 and store.current().meta.dtype == "float32"


def test_what_cannot_be_indexed(mmrec: Mmrec, trained: Path, own_copy: Path, tmp_path: Path) -> None:
    mmrec("index", "--run", tmp_path, "--out", tmp_path / "store").failed("no run there")
    rename(own_copy, 0)
    store = tmp_path / "store"
    mmrec("index", "--run", trained, "--out", store, "--data", own_copy).failed("is other data")
    assert not store.exists()
    mmrec("index", "--run", trained, "--out", store, "--dtype", "int4").failed("int4", code=2)
    (tmp_path / "file").write_text("")
    mmrec("index", "--run", trained, "--out", tmp_path / "file").failed(str(tmp_path / "file"))


def test_a_hash_of_an_items_content_changes_with_that_item_only(own_copy: Path) -> None:
    catalogue = Catalogue.load(own_copy)
    before = item_fingerprints(catalogue)
    assert len(np.unique(before, axis=0)) == catalogue.num_items
    image = next(path for path in catalogue.images if path is not None)
    image.write_bytes(image.read_bytes() + b"\\0")
    rename(own_copy, 5)
    changed = (item_fingerprints(Catalogue.load(own_copy)) != before).any(1)
    assert np.flatnonzero(changed).tolist() == sorted({5, catalogue.images.index(image)})
