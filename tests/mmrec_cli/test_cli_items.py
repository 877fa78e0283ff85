"""Items that came after training: read as training read its own, by `mmrec index --items` and over HTTP."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_helpers import Mmrec
from torch.nn import functional as F

from mmrec.adaptation import Catalogue
from mmrec.adaptation.fingerprint import item_fingerprints
from mmrec.commands.runs import open_run
from mmrec.recommender import ItemStore, OnlineRecommender


def rows_of(catalogue: Catalogue, which: list[int]) -> list[dict]:
    return [{k: v for k, v in row.items() if v is not None} for row in catalogue.items[which].to_dicts()]


@pytest.fixture
def new_items(generated: Path, tmp_path: Path) -> Path:
    """Three items of the catalogue under new ids, one of them with next to nothing, in a folder of their own."""
    catalogue = Catalogue.load(generated)
    folder = tmp_path / "new"
    (folder / "images").mkdir(parents=True)
    which = [n for n, path in enumerate(catalogue.images) if path is not None][:2]
    rows = rows_of(catalogue, which)
    for n, (row, item) in enumerate(zip(rows, which, strict=True)):
        row["item_id"] = f"new {n}"
        image = catalogue.images[item]
        shutil.copy(image, folder / "images" / f"new {n}{image.suffix}")
    rows.append({"item_id": "bare", catalogue.schema.title: "Nothing else"})
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_catalogue_itself_comes_out_as_in_training(mmrec: Mmrec, trained: Path, tmp_path: Path) -> None:
    run, store = open_run(trained), ItemStore(tmp_path / "store")
    outcome = mmrec("index", "--run", trained, "--out", store.folder, "--items", run.data).succeeded()
    assert "version 1, 48 items of width 16 in float32" in outcome.out
    catalogue, version = Catalogue.load(run.data), store.current()
    every = version.rows(catalogue.item_ids)
    assert sorted(every) == list(range(48))
    torch.testing.assert_close(version.vectors(every), run.items.vectors, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(version.mass(every), run.items.mass, rtol=0, atol=1e-3)
    assert np.array_equal(version.known(every).numpy(), run.trained_items)
    assert np.array_equal(version.content(every).numpy(), item_fingerprints(catalogue))
    assert version.titles(every) == catalogue.item_titles


def test_new_items_are_their_content(mmrec: Mmrec, trained: Path, new_items: Path, tmp_path: Path) -> None:
    run, store = open_run(trained), ItemStore(tmp_path / "store")
    mmrec("index", "--run", trained, "--out", store.folder, "--dtype", "int8").succeeded()
    mmrec("index", "--run", trained, "--out", store.folder, "--items", new_items, "--update").succeeded()
    version = store.current()
    assert (version.number, len(version), version.meta.dtype) == (2, 51, "int8")
    rows = version.rows(["new 0", "new 1", "bare"])
    assert version.titles(rows)[2] == "Nothing else" and not version.known(rows).any()
    identity = run.modalities.index("identity")
    mass = version.mass(rows)
    assert (mass[:, identity] == 0).all() and torch.allclose(mass.sum(1), torch.ones(3), atol=2e-3)
    text = [n for n, name in enumerate(run.modalities) if name not in ("identity", "text")]
    assert (mass[2, text] == 0).all()
    # The same content without the identity gives what training's item tower gives for an untrained item.
    model = run.model
    model.trained[:] = False
    encoder = run.item_encoder()
    (wanted,) = encoder.encode(Catalogue.load_items(new_items, encoder.recipe.schema))
    found = version.vectors(rows)
    assert float((found - wanted.vectors).abs().max()) <= float(wanted.vectors.abs().max()) / 127
    online = OnlineRecommender(open_run(trained).model, store, model_id=run.model_id)
    (answer,) = online.recommend([["new 0", "bare"]], 5)
    assert len(answer.items) == 5 and answer.unknown == []


def test_token_rows_are_what_the_item_tower_fuses(mmrec: Mmrec, trained: Path, new_items: Path, tmp_path: Path) -> None:
    pytest.importorskip("fastapi")
    from fastapi.testclient import TestClient

    from mmrec.recommender.serving import create_app

    run, store = open_run(trained), ItemStore(tmp_path / "store")
    assert set(run.config.content) == {"text", "image", "table"}
    every = [word for name in run.config.content for word in ("--tokens", name)]
    mmrec("index", "--run", trained, "--out", store.folder, *every).succeeded()
    assert store.current().meta.tokens == dict.fromkeys(run.config.content, 16)
    mmrec("index", "--run", trained, "--out", store.folder, "--items", new_items, "--update").succeeded()
    mmrec(
        "index", "--run", trained, "--out", store.folder, "--items", new_items, "--update", "--tokens", "text"
    ).failed("--update keeps the tokens that the store has")
    mmrec("index", "--run", trained, "--out", tmp_path / "no", "--tokens", "identity").failed(
        "content is text, image, table, not 'identity'"
    )
    encoder = run.item_encoder()

    def check(ids: list[str], catalogue: Catalogue) -> None:
        (wanted,) = encoder.encode(catalogue)
        version = store.current()
        for name in run.config.content:
            found = version.tokens(name, version.rows(ids))
            torch.testing.assert_close(found.values, wanted.tokens[name].values, rtol=2**-7, atol=1e-4)
            assert torch.equal(found.offsets, wanted.tokens[name].offsets)
            assert torch.equal(found.kind, wanted.tokens[name].kind)

    catalogue = Catalogue.load(run.data)
    check(catalogue.item_ids, catalogue)
    check(["new 0", "new 1", "bare"], Catalogue.load_items(new_items, encoder.recipe.schema))
    # Fused again, they are the vector of an item without an identity.
    version, tower = store.current(), run.model.item_tower
    assert tower.fuse is not None
    rows = version.rows(["new 0", "new 1", "bare"])
    fused = tower.fuse({name: version.tokens(name, rows) for name in run.config.content}).values
    torch.testing.assert_close(F.normalize(fused), F.normalize(version.vectors(rows)), rtol=0, atol=0.02)
    online = OnlineRecommender(run.model, store, model_id=run.model_id)
    with TestClient(create_app(online, encode=encoder.encode_items)) as client:
        (first,) = rows_of(catalogue, [5])
        new, old, only = (catalogue.item_ids[n] for n in (5, 6, 7))
        content = {name: row for name, row in first.items() if name != "item_id"}
        given = [
            {"id": only, "title": "Another"}, {"id": "later", "content": content}, {"id": old, "content": content},
            {"id": "bare vector", "vector": [0.0] * 16, "mass": {"text": 1.0}}, {"id": new, "known": False},
        ]  # fmt: skip
        found = client.post("/items", json={"items": given})
        assert found.status_code == 200 and found.json()["new"] == 2, found.text
    wanted = Catalogue.from_items([first], encoder.recipe.schema)  # without its image
    check(["later"], wanted)
    check([old], wanted)
    check([only], catalogue.items_part(7, 8))
    check([new], catalogue.items_part(5, 6))
    version = store.current()
    assert len(version.tokens("text", version.rows(["bare vector"])).values) == 0


def test_items_are_removed(mmrec: Mmrec, trained: Path, new_items: Path, tmp_path: Path) -> None:
    store, ids, file = ItemStore(tmp_path / "store"), Catalogue.load(open_run(trained).data).item_ids, tmp_path / "gone"
    file.write_bytes(f"\ufeff{ids[3]}\r\nnobody\n\n{ids[5]}\n{ids[7]}\x1c{ids[8]}\n".encode())
    options = ("index", "--run", trained, "--out", store.folder)
    mmrec(*options, "--remove", file).failed("holds no item store")
    mmrec(*options).succeeded()
    outcome = mmrec(*options, "--remove", file).succeeded()
    assert "2 items removed, 2 of " in outcome.out and "not in the store: 'nobody', '" in outcome.out
    assert "version 2, 46 items" in outcome.out
    assert store.current().rows([ids[3], ids[5], ids[4]]).tolist() == [-1, -1, 4]
    mmrec(*options, "--remove", file, "--items", new_items).failed("--remove takes items out")
    mmrec(*options, "--remove", file, "--update").failed("--remove takes items out")
    mmrec(*options, "--remove", tmp_path / "none").failed("none")


def test_a_tuned_adapter_reads_new_items_too(
    mmrec: Mmrec, generated: Path, tiny_backbone: Path, tiny_options: tuple[str, ...], tmp_path: Path
) -> None:
    out = tmp_path / "tuned"
    mmrec(
        "train", "--data", generated, "--out", out, "--modalities", "identity,text", "--backbone", tiny_backbone,
        "--quantize", "none", "--lora", 4, "--tune-backbone", "--no-floors", "--no-identity", *tiny_options,
    ).succeeded()  # fmt: skip
    run = open_run(out)
    adapter = [value for name, value in run.tensors.items() if name.startswith("adapter.")]
    assert adapter and any(float(value.abs().max()) > 0 for value in adapter)
    store = ItemStore(tmp_path / "store")
    mmrec("index", "--run", out, "--out", store.folder, "--items", generated).succeeded()
    torch.testing.assert_close(store.current().vectors(range(48)), run.items.vectors, rtol=1e-3, atol=1e-4)


def test_what_cannot_be_read(mmrec: Mmrec, trained: Path, new_items: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    mmrec("index", "--run", trained, "--out", store, "--update").failed("--update needs --items")
    mmrec("index", "--run", trained, "--out", store, "--items", tmp_path / "none").failed("no items.csv")
    mmrec("index", "--run", trained, "--out", store, "--items", new_items, "--update").failed("holds no item store")
    table = new_items / "items.jsonl"
    schema = open_run(trained).item_encoder().recipe.schema
    good = table.read_text()
    table.write_text(good.replace("new 1", "new 0"))
    mmrec("index", "--run", trained, "--out", store, "--items", new_items).failed("'new 0' occurs more than once")
    table.write_text(json.dumps({"item_id": "a", schema.numeric[0]: "many"}) + "\n")
    mmrec("index", "--run", trained, "--out", store, "--items", new_items).failed(schema.numeric[0], "'many'")
    table.write_text(good)
    (new_items / "images" / "new 0.png").unlink(missing_ok=True)
    (new_items / "images" / "new 0.jpg").unlink(missing_ok=True)
    (new_items / "images" / "new 0.png").write_bytes(b"no image")
    mmrec("index", "--run", trained, "--out", store, "--items", new_items).failed("broken image")
    assert not list(store.glob("version-*"))


def test_a_run_of_an_earlier_version(mmrec: Mmrec, trained: Path, new_items: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "old"))
    facts = json.loads((run / "run.json").read_text())
    del facts["recipe"]
    (run / "run.json").write_text(json.dumps(facts))
    mmrec("index", "--run", run, "--out", tmp_path / "store", "--items", new_items).failed("train it anew")
    mmrec("index", "--run", run, "--out", tmp_path / "store").succeeded()


def test_parts_are_as_the_whole(trained: Path, new_items: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = open_run(trained).item_encoder()
    catalogue = Catalogue.load_items(new_items, encoder.recipe.schema)
    (whole,) = encoder.encode(catalogue)
    monkeypatch.setattr("mmrec.recommender.encoder._PART", 2)
    parts = list(encoder.encode(catalogue))
    assert [len(part) for part in parts] == [2, 1] and [i for part in parts for i in part.ids] == whole.ids
    torch.testing.assert_close(torch.cat([part.vectors for part in parts]), whole.vectors, rtol=1e-4, atol=1e-5)
    assert torch.equal(torch.cat([part.content for part in parts]), whole.content)
    with pytest.raises(ValueError, match="the schema that the model was trained with"):
        list(encoder.encode(Catalogue.from_items([{"item_id": "a"}], catalogue.schema.__class__())))


def test_content_over_http(trained: Path) -> None:
    pytest.importorskip("fastapi")
    import tempfile

    from fastapi.testclient import TestClient

    from mmrec.commands.index import write_store
    from mmrec.recommender.serving import create_app

    run = open_run(trained)
    catalogue = Catalogue.load(run.data)
    with tempfile.TemporaryDirectory() as folder:
        write_store(run, catalogue, Path(folder), "float32")
        online = OnlineRecommender(run.model, ItemStore(folder), model_id=run.model_id)
        encoder = run.item_encoder()
        with TestClient(create_app(online, encode=encoder.encode_items)) as client:
            (content,) = rows_of(catalogue, [5])
            item = content.pop("item_id")
            given = {"items": [{"id": "new", "content": content}, {"id": item, "content": content}]}
            assert client.post("/items", json=given).json() == {"version": 2, "items": 49, "new": 1}
            version = ItemStore(folder).current()
            rows = version.rows(["new", item])
            (wanted,) = encoder.encode(Catalogue.from_items([{"item_id": "new", **content}], encoder.recipe.schema))
            torch.testing.assert_close(version.vectors(rows[:1]), wanted.vectors, rtol=1e-4, atol=1e-5)
            assert version.titles(rows) == [catalogue.item_titles[5]] * 2
            assert version.known(rows).tolist() == [False, bool(run.trained_items[5])]
            numeric = encoder.recipe.schema.numeric[0]
            for bad, word in (
                ({"content": {numeric: "many"}}, "many"), ({"content": {"item_id": "x"}}, "the id stands beside it"),
                ({"content": {}, "vector": [0.0] * 16}, "content makes vector and mass"),
                ({"content": {numeric: {"a": 1}}}, "items.0.content"),
                ({"content": {"tilte": "x"}}, "no column 'tilte'"),
            ):  # fmt: skip
                found = client.post("/items", json={"items": [{"id": "other", **bad}]})
                assert found.status_code == 422 and word in found.json()["detail"], (bad, found.text)
            # Numbers stand for the words that they are written as.
            words = encoder.recipe.schema.categorical[0]
            client.post(
                "/items", json={"items": [{"id": "seven", "content": {words: 7, encoder.recipe.schema.title: 1984}}]}
            )
            version = ItemStore(folder).current()
            assert version.titles(version.rows(["seven"])) == ["1984"]
            (seven,) = encoder.encode(
                Catalogue.from_items(
                    [{"item_id": "seven", words: "7", encoder.recipe.schema.title: "1984"}], encoder.recipe.schema
                )
            )
            assert torch.equal(version.content(version.rows(["seven"])), seven.content)
        with TestClient(create_app(online)) as client:
            found = client.post("/items", json={"items": [{"id": "other", "content": content}]})
            assert found.status_code == 422 and "no model of items" in found.json()["detail"]
