"""Options that several commands of ``mmrec`` have."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Protocol(str, Enum):
    """How interactions are split."""

    S = "S"
    G = "G"
    T = "T"


class Stage(str, Enum):
    """Which held-out part is predicted."""

    test = "test"
    valid = "valid"


class StoreDtype(str, Enum):
    """How an item store keeps vectors."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    int8 = "int8"


class Approximate(str, Enum):
    """Kinds of approximate retrieval."""

    ivf = "ivf"
    hnsw = "hnsw"


class Engine(str, Enum):
    """Who encodes items."""

    local = "local"
    ray = "ray"


class Mask(str, Enum):
    """Which seen items are left out of rankings."""

    none = "none"
    train = "train"
    train_valid = "train+valid"


class Quantize(str, Enum):
    """Precision of the backbone's frozen weights."""

    nf4 = "nf4"
    none = "none"


class Device(str, Enum):
    """What a benchmark runs on."""

    cpu = "cpu"
    cuda = "cuda"


def _set_debug(context: typer.Context, wanted: bool) -> bool:
    if wanted and isinstance(context.obj, dict):
        context.obj["debug"] = True
    return wanted


Debug = Annotated[bool, typer.Option("--debug", callback=_set_debug, help="Show the traceback of a failure.")]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here as JSON.")]
DataFolder = Annotated[Path, typer.Option("--data", metavar="FOLDER", help="A folder of any known layout.")]
OptionalData = Annotated[
    Path | None, typer.Option("--data", metavar="FOLDER", help="The data; a run remembers its own.")
]
Layout = Annotated[str, typer.Option(help="Layout of the folder; auto finds it out.")]
SplitSeed = Annotated[int, typer.Option(help="Seed of the random split (G without stored labels).", min=0)]
HoldOut = Annotated[
    float | None,
    typer.Option("--hold-out", metavar="SHARE", help="Make this share of the items cold: never seen in training."),
]
Modalities = Annotated[
    str,
    typer.Option(help="Comma-separated: identity, text, image, table, names of feature files; 'all' = all there are."),
]
BackboneName = Annotated[
    str | None, typer.Option("--backbone", metavar="NAME", help="Folder or Hugging Face name; default MiniLM.")
]
Quantized = Annotated[Quantize, typer.Option("--quantize", help="4-bit NF4 backbone, or none.")]
LoraRank = Annotated[int, typer.Option("--lora", metavar="R", min=0, help="Rank of the LoRA adapter; 0 = none.")]
TuneBackbone = Annotated[bool, typer.Option("--tune-backbone", help="Train the adapter too, or what --set tune= says.")]
Epochs = Annotated[int | None, typer.Option(min=1, help="Most epochs; stops earlier without improvement.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Any other hyper-parameter of RecommenderConfig; repeatable."),
]
