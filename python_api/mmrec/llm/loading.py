"""Finding and loading the pieces of a backbone: source folder, tokenizer, model, usable length."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch

from .extras import quiet_transformers, require
from .minilm import MINILM, minilm_path
from .quantize import config_nf4, skipped_layers
from .smollm2 import SMOLLM2, smollm2_path

DEFAULT_MAX_LENGTH = 512


def resolve_source(name_or_path: str | Path | None) -> tuple[str, str]:
    """(name for keys and files, what transformers shall load). A path that does not exist is a ValueError."""
    if name_or_path is None or name_or_path == MINILM:
        return MINILM, str(minilm_path())
    if name_or_path == SMOLLM2:
        return SMOLLM2, str(smollm2_path())
    if not isinstance(name_or_path, (str, Path)):
        raise TypeError(f"name_or_path must be a str, a Path or None, got {type(name_or_path).__name__}")
    text = str(name_or_path)
    looks_like_path = isinstance(name_or_path, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1
    path = Path(text).expanduser()
    if path.is_dir():
        return text, str(path)
    if looks_like_path:
        raise ValueError(f"name_or_path: no folder {text!r}")
    return text, text


def load_config(source: str) -> Any:
    """The transformers configuration of `source`; ValueError with one line if there is none."""
    try:
        return require("transformers").AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"name_or_path: no model configuration for {source!r}: {first_line(error)}") from error


def load_tokenizer(source: str) -> Any:
    """The tokenizer of `source`; ValueError with one line if there is none."""
    try:
        with quiet_transformers():
            return require("transformers").AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"name_or_path: no tokenizer for {source!r}: {first_line(error)}") from error


def load_model(source: str, config: Any, *, quantize: str | None, dtype: torch.dtype, device: torch.device) -> Any:
    """The headless model of `source`; every weight it has must come from the checkpoint."""
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"name_or_path: {source!r} is an encoder-decoder; use an encoder or a causal LM")
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"name_or_path: {source!r} is quantised already; give the original checkpoint")
    kwargs = model_kwargs(config)
    if quantize:
        require("bitsandbytes")
        with quiet_transformers():
            skip = skipped_layers(config, kwargs, device)
        kwargs |= {"quantization_config": config_nf4(dtype, skip), "device_map": {"": str(device)}}
    return load_checked("AutoModel", source, config, dtype=dtype, **kwargs).to(device)


def load_checked(auto_class: str, source: str, config: Any, **kwargs: Any) -> Any:
    """`from_pretrained`, refusing a checkpoint that would leave weights random."""
    loader = getattr(require("transformers"), auto_class)
    try:
        with quiet_transformers():
            model, info = loader.from_pretrained(source, config=config, output_loading_info=True, **kwargs)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"name_or_path: cannot load the weights of {source!r}: {first_line(error)}") from error
    absent = sorted(map(str, list(info["missing_keys"]) + list(info["mismatched_keys"])))
    if absent:
        raise ValueError(
            f"name_or_path: the checkpoint {source!r} lacks {len(absent)} weights of the model, first {absent[0]!r}"
        )
    return model


def model_kwargs(config: Any) -> dict[str, Any]:
    """`add_pooling_layer=False` where the architecture has that switch: no pooling used here reads the pooler."""
    mapping = require("transformers").MODEL_MAPPING
    if type(config) not in mapping:
        raise ValueError(f"name_or_path: transformers has no base model for configuration {type(config).__name__}")
    classes = mapping[type(config)]
    model_class = classes[0] if isinstance(classes, (tuple, list)) else classes
    has_pooler = "add_pooling_layer" in inspect.signature(model_class.__init__).parameters
    return {"add_pooling_layer": False} if has_pooler else {}


def usable_length(source: str, config: Any, tokenizer: Any, asked: int | None) -> int:
    """Tokens per text: `asked` if the model can take it, else what the model states, at most 512."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    limit = min(int(positions or 1 << 30), int(min(tokenizer.model_max_length, 1 << 30)))
    if asked is not None:
        if isinstance(asked, bool) or not isinstance(asked, int) or not 1 <= asked <= limit:
            raise ValueError(f"max_length must be an integer from 1 to {limit} (the model's limit), got {asked!r}")
        return asked
    stated = Path(source) / "sentence_bert_config.json"
    trained = json.loads(stated.read_text()).get("max_seq_length") if stated.is_file() else None
    return min(limit, int(trained or DEFAULT_MAX_LENGTH))


def first_line(error: BaseException) -> str:
    """The first non-empty line of an error's message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
