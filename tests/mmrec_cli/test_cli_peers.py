"""``mmrec peers``: published models beside the floors."""

from __future__ import annotations

from pathlib import Path

from cli_helpers import Mmrec, read_json

SHORT = ("--set", "epochs=2", "--set", "width=8", "--set", "layers=1")
FLOORS = ("most-popular", "item-knn", "item-knn-20")


def test_peers_are_trained_and_compared(mmrec: Mmrec, generated: Path, tmp_path: Path) -> None:
    written = tmp_path / "peers.json"
    line = mmrec("peers", "--data", generated, "--seeds", "0,1", *SHORT, "--json", written).succeeded()
    found = read_json(written)
    assert found["protocol"] == "G" and found["seed"] == [0, 1]
    assert set(found["models"]) == {"bpr", "lightgcn", "vbpr", "bm3", "freedom", *FLOORS}
    told = found["training"]["lightgcn"]
    assert [(one["seed"], one["width"], one["layers"], one["epochs"]) for one in told] == [(0, 8, 1, 2), (1, 8, 1, 2)]
    assert "layers" not in found["training"]["bpr"][0]
    assert found["models"]["bpr"]["Recall@20"]["seeds"] == 2 and "lightgcn, seed 1: epoch" in line.out
    again = tmp_path / "again.json"
    mmrec("peers", "--data", generated, "--model", "bpr", "--seeds", "0,1", *SHORT[:4], "--json", again).succeeded()
    assert read_json(again)["models"]["bpr"] == found["models"]["bpr"]


def test_peers_of_histories(mmrec: Mmrec, generated: Path, tmp_path: Path) -> None:
    """Under S all are there; identities alone leave out those that read content."""
    written = tmp_path / "peers.json"
    options = ("peers", "--data", generated, "--protocol", "S", *SHORT, "--json", written)
    mmrec(*options, "--modalities", "identity").succeeded()
    found = read_json(written)
    assert set(found["models"]) == {"bpr", "lightgcn", "sasrec", "esasrec", *FLOORS}
    told = {name: found["training"][name][0] for name in ("sasrec", "esasrec")}
    assert (told["sasrec"]["loss"], told["esasrec"]["loss"], told["esasrec"]["gated"]) == ("binary", "softmax", True)
    assert told["sasrec"]["metric"] == "NDCG@10" and told["sasrec"]["layers"] == 1


def test_peers_that_are_not_there(mmrec: Mmrec, generated: Path) -> None:
    options = ("peers", "--data", generated)
    mmrec(*options, "--model", "ngcf").failed("--model: there are bpr, lightgcn", "'ngcf'")
    mmrec(*options, "--model", "sasrec").failed("--model sasrec: histories have no order under protocol G; take S or T")
    mmrec(*options, "--model", "bm3", "--modalities", "identity").failed(
        "--model bm3", "has no text, images or feature"
    )
    mmrec(*options, "--set", "depth=3").failed(
        "--set needs NAME=VALUE with one of batch_size, content_weight", "'depth=3'"
    )
    mmrec(*options, "--model", "bpr", "--set", "layers=3").failed("one of batch_size", "for bpr", "'layers=3'")
    mmrec(*options, "--set", "width=wide").failed("--set width cannot be 'wide'; its default is 64")
    mmrec(*options, "--set", "epochs=1.5").failed("--set epochs cannot be 1.5; its default is 1000")
    mmrec(*options, "--set", "epochs=0").failed("epochs must be above 0, got 0")
    mmrec(*options, "--seeds", "a").failed("--seeds needs numbers")
