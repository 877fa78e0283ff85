"""`python -m mmrec.llm.tuning_cost`: every way to train takes a step on the same texts; rows say how much trains."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("mmrec_kernels.benchmarks")

from mmrec.llm import tuning_cost  # noqa: E402

pytestmark = pytest.mark.usefixtures("eager_bitsandbytes")


def test_rows(qwen2, tmp_path, capsys, monkeypatch):
    path = tmp_path / "rows.json"
    seen = []
    made = tuning_cost._texts
    monkeypatch.setattr(tuning_cost, "_texts", lambda *given: seen.append(made(*given)) or seen[-1])
    arguments = ["--model", str(qwen2), "--texts", "3", "--tokens", "5", "--layers", "2", "--seconds", "0"]
    assert tuning_cost.main([*arguments, "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert (found["texts"], found["tokens"], found["environment"]["threads"]) == (3, 5, torch.get_num_threads())
    assert len(seen) == 1 and len(set(seen[0])) == 3
    rows = {row["way"]: row for row in found["rows"]}
    adapters = {"q": (64, 64), "k": (32, 64), "v": (32, 64), "o": (64, 64), "g": (128, 64), "u": (128, 64)} | {
        "d": (64, 128)
    }
    lora = 16 * sum(map(sum, adapters.values()))
    block = sum(n * k for n, k in adapters.values()) + 128 + 2 * 64  # biases of q, k and v; two norms
    inserted = 2 * (2 * 64 + 8 * 64 + 8 + 64 * 8 + 64)
    side = 2 * (64 * 64 + 64 + 2 * 64 + 8 * 64 + 8 + 64 * 8 + 64) + 1
    assert {way: row["trainable"] for way, row in rows.items()} == {
        "all weights, dense": 2 * block + 64 + 384 * 64, "last two blocks, dense": 2 * block + 64,
        "LoRA, NF4": 2 * lora, "LoRA on the last two blocks, NF4": 2 * lora, "bottleneck adapters, NF4": 2 * inserted,
        "side network on 2 layers": side, "hidden states of 2 layers, once, NF4": 0,
    }  # fmt: skip
    assert all(0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] for row in rows.values())
    assert all(row["peak_bytes"] is None or row["peak_bytes"] >= 0 for row in rows.values())
    printed = capsys.readouterr().out
    assert all(way in printed for way in rows) and str(path) in printed


def test_texts_have_as_many_tokens_as_asked(bert):
    from mmrec.llm import Backbone

    backbone = Backbone.load(bert, quantize=None, max_length=7)
    texts = tuning_cost._texts(backbone, 4, 7)
    assert [len(row) for row in backbone.tokenizer(texts, truncation=True, max_length=7)["input_ids"]] == [7] * 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--layers", "3"], "layers must be 1 to 2"), (["--tokens", "99"], "max_length must be an integer from 1 to 64")],
)
def test_wrong_arguments(qwen2, capsys, arguments, words):
    with pytest.raises(SystemExit) as stop:
        tuning_cost.main(["--model", str(qwen2), "--tokens", "5", *arguments])
    assert stop.value.code == 2 and words in capsys.readouterr().err
