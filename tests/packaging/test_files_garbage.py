"""Files of results, stores, adapters and images that were damaged: each reads as it should, or is refused by name."""

from __future__ import annotations

import dataclasses
import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, note
from hypothesis import strategies as st

from garbage import address_space, damaged, damaged_json
from strategies import examples

pytest.importorskip("safetensors")
pytest.importorskip("transformers")

ROOT = Path(__file__).parent.parent.parent
GIB = 2**30


class Reader(NamedTuple):
    """What writes files into a folder and what reads them."""

    write: Callable[[Path], Any]
    read: Callable[[Path], Any]


def _result(folder: Path) -> None:
    from mmrec.evaluation import Result
    from mmrec.evaluation.results import Row

    row = Row(np.arange(4), {"HR@10": np.array([0.0, 1.0, 0.5, 1.0])})
    made = Result("bpr", "S", "abc", "test", "train", "shop", "f1", 3, {"all": row}, {"coverage@10": 0.5})
    made.save(folder / "metrics.json")


def _read_result(folder: Path) -> Any:
    from mmrec.evaluation import Result

    return Result.load(folder / "metrics.json").metrics


def _tensors(folder: Path) -> None:
    from mmrec.recommender.training.storage import save_tensors

    save_tensors(folder, "run", {"a": torch.arange(6.0).view(2, 3)}, {"config": {"width": 4}})


def _read_tensors(folder: Path) -> Any:
    from mmrec.recommender.training.storage import load_tensors

    return load_tensors(folder, "run")


def _store(folder: Path) -> None:
    from mmrec.fusion import Tokens
    from mmrec.recommender.store import ItemRows, ItemStore, Meta

    tokens = Tokens(torch.ones(3, 4), torch.tensor([0, 1, 3]), torch.arange(3) % 2)
    rows = ItemRows(["a", "b"], torch.ones(2, 8), torch.ones(2, 1), torch.tensor([True, False]),
                    torch.zeros(2, 16, dtype=torch.uint8), ["A", "B"], {"text": tokens})  # fmt: skip
    with ItemStore(folder).writer() as writer:
        writer.create(Meta(8, "float32", ("text",), "m1", {"text": 4}), [rows])


def _read_store(folder: Path) -> Any:
    from mmrec.recommender.store import ItemStore

    return ItemStore(folder).current().rows(["a"]).tolist()


def _slots(folder: Path) -> None:
    from mmrec.llm.projectors import SlotSpec
    from mmrec.llm.slots import ModalitySlots

    ModalitySlots({"image": SlotSpec(3, 2, "mlp", True), "text": SlotSpec(5)}, 4).save(folder)


def _read_slots(folder: Path) -> Any:
    from mmrec.llm.slots import ModalitySlots

    return ModalitySlots.load(folder)


def _soft_prompt(folder: Path) -> None:
    from mmrec.llm.soft_prompt import SoftPrompt

    SoftPrompt({"user": (3, 2), "items": (1, 4)}, 6).save(folder)


def _read_soft_prompt(folder: Path) -> Any:
    from mmrec.llm.soft_prompt import SoftPrompt

    return SoftPrompt.load(folder)


def _bottleneck(folder: Path) -> None:
    from safetensors.torch import save

    from mmrec.llm import bottleneck

    metadata = {"format": "pt", bottleneck._METADATA: json.dumps(dataclasses.asdict(bottleneck.AdapterConfig()))}
    (folder / bottleneck.FILE).write_bytes(save({"a": torch.ones(3, 2)}, metadata=metadata))


def _read_bottleneck(folder: Path) -> Any:
    from mmrec.llm import bottleneck

    return bottleneck.load(folder)


def _lora(folder: Path, *, own: bool) -> None:
    """An adapter with our metadata, or as peft writes it."""
    from safetensors.torch import save

    from mmrec.llm import lora

    metadata = {"format": "pt"} | ({lora._METADATA: json.dumps(dataclasses.asdict(lora.LoRAConfig()))} if own else {})
    (folder / lora._WEIGHTS_FILE).write_bytes(save({"a": torch.ones(3, 2)}, metadata=metadata))
    peft = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q", "v"], "bias": "none"}
    (folder / lora._CONFIG_FILE).write_text(json.dumps(peft))


def _read_lora(folder: Path) -> Any:
    from mmrec.llm import lora

    return lora.load(folder)


def _semantic_ids(folder: Path) -> None:
    from mmrec.llm import SemanticIds

    SemanticIds(torch.tensor([[0, 1], [2, 0]]), (3, 2)).save_index(folder / "ids.json", ["a", "b"])


def _read_semantic_ids(folder: Path) -> Any:
    from mmrec.llm import SemanticIds

    return SemanticIds.load_index(folder / "ids.json")


def _costs(folder: Path) -> None:
    from mmrec.recommender import Costs, Plan
    from mmrec.recommender.planning import Times

    times = Times.of([1.0, 2.0])
    Costs({"dtype": "int8"}, {10: {1: times}}, {5: times}, {Plan(10, 5): 0.5}).save(folder / "costs.json")


def _read_costs(folder: Path) -> Any:
    from mmrec.recommender import Costs

    return Costs.load(folder / "costs.json")


def _kept(folder: Path) -> None:
    from mmrec.commands.kept import kept_result

    _result(folder)
    kept_result(folder / "metrics.json", {"a": [1, None]}, lambda: _loaded(folder))


def _loaded(folder: Path) -> Any:
    from mmrec.evaluation import Result

    return Result.load(folder / "metrics.json")


def _read_kept(folder: Path) -> Any:
    from mmrec.commands.kept import kept_result

    return kept_result(folder / "metrics.json", {"a": [1, None]}, lambda: _loaded(folder))


def _worth(folder: Path) -> None:
    rows = [{"model_id": "m", "dtype": "int8", "depth": 10, "rerank": 0, "worth": 0.5}]
    (folder / "latency.json").write_text(json.dumps({"frontier": rows}))


def _read_worth(folder: Path) -> Any:
    from mmrec.commands.serve import _worth as read

    return read(folder / "latency.json", "m")


def _image(folder: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (9, 7), (1, 2, 3)).save(folder / "image.jpg")


def _read_image(folder: Path) -> Any:
    from mmrec.llm.vision import read_image

    return read_image(folder / "image.jpg", 0)


READERS = {
    "result": Reader(_result, _read_result),
    "tensors": Reader(_tensors, _read_tensors),
    "store": Reader(_store, _read_store),
    "slots": Reader(_slots, _read_slots),
    "soft prompt": Reader(_soft_prompt, _read_soft_prompt),
    "bottleneck": Reader(_bottleneck, _read_bottleneck),
    "lora": Reader(functools.partial(_lora, own=True), _read_lora),
    "lora of peft": Reader(functools.partial(_lora, own=False), _read_lora),
    "semantic ids": Reader(_semantic_ids, _read_semantic_ids),
    "costs": Reader(_costs, _read_costs),
    "kept result": Reader(_kept, _read_kept),
    "worth of plans": Reader(_worth, _read_worth),
    "image": Reader(_image, _read_image),
}


@functools.cache
def files_of(name: str) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as made:
        READERS[name].write(Path(made))
        return {path.name: path.read_bytes() for path in sorted(Path(made).iterdir())}


def damaged_metadata(draw: Any, content: bytes) -> bytes:
    """A safetensors file whose metadata holds a value that nobody expects."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    own = [key for key in header["__metadata__"] if key != "format"]
    if not own:
        return draw(damaged(content))
    header["__metadata__"][own[0]] = draw(damaged_json(header["__metadata__"][own[0]].encode())).decode(
        "utf-8", "replace"
    )
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


@pytest.mark.parametrize("name", READERS)
def test_what_was_written_is_read(name: str, tmp_path: Path) -> None:
    READERS[name].write(tmp_path)
    READERS[name].read(tmp_path)


@pytest.mark.parametrize("name", READERS)
@examples(60)
@given(st.data())
def test_a_damaged_file_is_read_or_refused_by_name(name: str, data: Any) -> None:
    files = dict(files_of(name))
    victim = data.draw(st.sampled_from(sorted(n for n in files if n != "lock")))
    content = files[victim]
    if victim.endswith(".json"):
        content = data.draw(damaged_json(content))
    elif victim.endswith(".safetensors") and b"__metadata__" in content and data.draw(st.booleans()):
        content = damaged_metadata(data.draw, content)
    else:
        content = data.draw(damaged(content))
    note((victim, content[:600]))
    with tempfile.TemporaryDirectory() as made, address_space(3 * GIB):
        folder = Path(made)
        for file, whole in files.items():
            (folder / file).write_bytes(content if file == victim else whole)
        try:
            READERS[name].read(folder)
        except (ValueError, FileNotFoundError) as error:  # a file that a damaged one names may not be there
            assert made in str(error) or victim in str(error), error
