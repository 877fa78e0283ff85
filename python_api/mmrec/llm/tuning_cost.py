"""`python -m mmrec.llm.tuning_cost`: what a training step costs, by what of a backbone trains; the same texts for all.

A step is forward, backward and AdamW, in training mode and float32. The side network's step reads hidden states that
were computed before; what that takes, once for all epochs, is a row of its own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import write_atomic
from .backbone import Backbone
from .layers import layers_of
from .side_network import SideNetwork

Call = Callable[[], Any]

_SIDE = 64  # width of the network beside the backbone: the recommender's default
_WAYS: dict[str, dict[str, Any]] = {
    "all weights, dense": {"quantize": None, "trainable": "all"},
    "last two blocks, dense": {"quantize": None, "trainable": "last:2"},
    "LoRA, NF4": {"lora": 16},
    "LoRA on the last two blocks, NF4": {"lora": {"r": 16, "last_layers": 2}},
    "bottleneck adapters, NF4": {"adapter": {}},
}


def measure(name_or_path: str | None, *, texts: int, tokens: int, layers: int, seconds: float) -> list[dict[str, Any]]:
    """A row per way to train.

    Args:
        name_or_path: the backbone, as in `Backbone.load`.
        texts, tokens: `texts` texts of `tokens` tokens in each step.
        layers: whose hidden states the side network reads.
        seconds: of calls for each way, which take turns.

    Returns:
        `way`, `trainable` (numbers that train), `median_ms`, `p20_ms`, `p80_ms`, and `peak_bytes`: what a step holds
        beyond the model, the optimizer's moments and what was there before; None where the system cannot tell.
    """
    from mmrec_kernels.benchmarks.clock import clock
    from mmrec_kernels.benchmarks.runner import interleave

    backbones = {way: Backbone.load(name_or_path, max_length=tokens, **given) for way, given in _WAYS.items()}
    frozen = Backbone.load(name_or_path, max_length=tokens)
    batch = _texts(frozen, texts, tokens)
    calls: dict[str, Call] = {way: _step(backbone, batch) for way, backbone in backbones.items()}
    sizes = {way: sum(p.numel() for p in backbone.trainable_parameters()) for way, backbone in backbones.items()}
    way = f"side network on {layers} layers"
    network = SideNetwork(frozen.hidden_size, layers, side=_SIDE)
    calls[way] = _side_step(network, frozen.encode_layers(batch, layers, progress=False))
    sizes[way] = sum(p.numel() for p in network.parameters())
    once = f"hidden states of {len(layers_of(frozen, layers))} layers, once, NF4"
    calls[once] = lambda: frozen.encode_layers(batch, layers, progress=False)
    sizes[once] = 0
    timer = clock("cpu")
    for call in calls.values():
        call()  # makes the optimizer's moments
    peaks = {way: timer.peak_bytes(call) for way, call in calls.items()}
    found = []
    for way, times in interleave(calls, timer, seconds * len(calls)).items():
        p20, median, p80 = (1e3 * float(q) for q in torch.tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8])))
        found.append(
            {"way": way, "trainable": sizes[way], "median_ms": median, "p20_ms": p20, "p80_ms": p80}
            | {"peak_bytes": peaks[way]}
        )
    return found


def _texts(backbone: Backbone, texts: int, tokens: int) -> list[str]:
    """Of words that are a token each, more than are read: cut, each text has `tokens` tokens."""
    vocabulary = sorted(word for word in backbone.tokenizer.get_vocab() if word.isascii() and word.isalpha())
    drawn = torch.randint(len(vocabulary), (texts, tokens), generator=torch.Generator().manual_seed(0))
    return [" ".join(vocabulary[i] for i in row) for row in drawn.tolist()]


def _step(backbone: Backbone, batch: list[str]) -> Call:
    backbone.train()
    optimizer = torch.optim.AdamW(backbone.trainable_parameters(), lr=0.0)  # all of its work, and no drift

    def step() -> None:
        optimizer.zero_grad()
        pooled = backbone.encode(batch, requires_grad=True, progress=False).pooled
        assert pooled is not None
        pooled.square().mean().backward()
        optimizer.step()

    return step


def _side_step(network: SideNetwork, hidden: Tensor) -> Call:
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.0)

    def step() -> None:
        optimizer.zero_grad()
        network(hidden).square().mean().backward()
        optimizer.step()

    return step


def _table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [f"{'what trains':36}{'numbers':>12}{'ms a step':>12}{'p20 – p80':>18}{'peak MiB':>10}"]
    for row in rows:
        spread = f"{row['p20_ms']:.2f} – {row['p80_ms']:.2f}"
        peak = "?" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.1f}"
        lines.append(f"{row['way']:36}{row['trainable']:12,}{row['median_ms']:12.2f}{spread:>18}{peak:>10}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 2 where an argument is wrong."""
    parser = argparse.ArgumentParser(prog="python -m mmrec.llm.tuning_cost", description=__doc__.splitlines()[0])
    parser.add_argument("--model", metavar="NAME", help="a folder or name; default: MiniLM")
    parser.add_argument("--texts", type=int, default=32, metavar="N", help="texts per step; default: 32")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="tokens of each; default: 64")
    parser.add_argument("--layers", type=int, default=3, metavar="N", help="of the side network; default: 3")
    parser.add_argument("--threads", type=int, metavar="N", help="default: torch's own choice")
    parser.add_argument("--seconds", type=float, default=4.0, help="of calls for each way; default: 4")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    target.add_argument("--json-dir", type=Path, metavar="DIR", help="write them to DIR/<device>/tuning.json")
    given = parser.parse_args(arguments)
    from mmrec_kernels.benchmarks.measure import path_in
    from mmrec_kernels.benchmarks.rows import environment

    if given.threads is not None:
        torch.set_num_threads(given.threads)
    found = {"environment": environment("cpu"), "model": given.model or "minilm"}  # before measuring raises the load
    found |= {"texts": given.texts, "tokens": given.tokens}
    try:
        rows = measure(given.model, texts=given.texts, tokens=given.tokens, layers=given.layers, seconds=given.seconds)
    except ValueError as error:
        parser.error(str(error))
    print(_table(rows))
    path = given.json if given.json_dir is None else path_in(given.json_dir, "tuning", "cpu")
    if path is not None:
        write_atomic(path, (json.dumps(found | {"rows": rows}, indent=1) + "\n").encode())
        print(f"rows: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
