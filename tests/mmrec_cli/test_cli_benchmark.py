"""`mmrec benchmark`: every provider computes the same function, and the rows say so."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

import torch  # noqa: E402

from numerics import FLOORS  # noqa: E402


def test_a_tiny_backbone(mmrec, tmp_path):
    path = tmp_path / "rows.json"
    with torch.compiler.set_stance("force_eager"):  # bitsandbytes compiles its generic decode: half a minute, same bits
        mmrec("benchmark", "--model", "tiny", "--seconds", 0, "--lora", 4, "--json", path).succeeded()
    content = json.loads(path.read_text())
    assert content["complete"]
    assert {(*row["shape"].values(), row["mode"]) for row in content["rows"]} == {
        (2, 64, 2, 9, 9, 0, 4, "step"), (2, 64, 2, 9, 9, 0, 4, "forward"), (2, 64, 1, 1, 1, 5, 4, "forward"),
        (2, 64, 3, 4, 4, 5, 4, "forward"), (2, 64, 4, 4, 7, 0, 4, "forward"),
    }  # fmt: skip
    stock: dict[tuple, dict] = {}
    for row in content["rows"]:
        assert row["op"] == "backbone" and row["median_ms"] > 0 and row["flops"] > 0 and row["bytes"] > 0
        case = (*row["shape"].values(), row["dtype"], row["mode"])
        if row["provider"] == "bitsandbytes + peft":
            assert row["error_vs_fp64"]["l2"] < {"bfloat16": 0.1, "float32": 1e-5}[row["dtype"]]
            stock[case] = row["error_vs_fp64"]
    for row in content["rows"]:
        case = (*row["shape"].values(), row["dtype"], row["mode"])
        for name, error in row["error_vs_fp64"].items():  # the rule for kernels; a yardstick has none
            assert 0 < error <= 2 * stock[case][name] + FLOORS[getattr(torch, row["dtype"])], row
    providers = {row["provider"] for row in content["rows"]}
    assert {"bitsandbytes + peft", "dense + peft"} <= providers
    assert sum(name.startswith("mmrec (") for name in providers) == 2
    assert all(c["ours"].startswith("mmrec (") and c["best_peer"] for c in content["comparisons"])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--model", "gpt"], "--model must be of qwen2-0.5b, minilm, tiny, got 'gpt'"),
        (["--dtype", "float8"], "--dtype must be of bfloat16, float32, got 'float8'"),
        (["--mode", "backward"], "--mode must be of forward, step, got 'backward'"),
        (["--json", "a", "--json-dir", "b"], "--json and --json-dir are two ways"),
        (["--json", "no/such/folder/rows.json"], "--json no/such/folder/rows.json: there is no folder no/such/folder"),
        (["--json", "."], "--json .: this is a folder"),
        (["--mode", "step", "--lora", "0"], "--mode step needs an adapter to train, got --lora 0"),
        (["--device", "tpu"], "'tpu' is not one of"),
    ],
)
def test_wrong_arguments(mmrec, given, words):
    mmrec("benchmark", *given).failed(words, code=2 if "tpu" in given else 1)
