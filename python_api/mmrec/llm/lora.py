"""LoRA (Hu et al., 2021, arXiv:2106.09685) on a loaded backbone: configuration, attachment, adapter files."""

from __future__ import annotations

import dataclasses
import json
import re
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import parse_json, write_atomic
from .blocks import attention_names, last_blocks, linear_names, within
from .extras import require
from .quantize import dequantized, is_quantized
from .tuning import check_count, copied, put_back

ADAPTER = "default"
_INITS: dict[str, bool | str] = {"zero": True, "gaussian": "gaussian", "random": False}
_WEIGHTS_FILE, _CONFIG_FILE, _METADATA = "adapter_model.safetensors", "adapter_config.json", "mmrec_lora"
_UNSUPPORTED = (
    "use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern", "alora_invocation_tokens",
    "layers_to_transform",
)  # fmt: skip


@dataclass(frozen=True)
class LoRAConfig:
    """y = W x + (alpha / r) · B (A x) on the chosen Linear layers; W stays frozen.

    Attributes:
        r: rank, ≥ 1.
        alpha: numerator of the scaling; None means 2 · r.
        dropout: probability in [0, 1) on the input of A while training.
        targets: "all-linear" (QLoRA's choice), "attention" (Linear layers inside attention blocks), or names of
            layers, matched by suffix as in peft.
        init: "zero" (A Kaiming-uniform, B = 0: the start equals the base model), "gaussian" (A normal, B = 0), or
            "random" (B random too: an adapter that acts from the start, for tests and benchmarks).
        seed: seed of the initial A and B; the caller's random state is left as it was.
        last_layers: only layers of the last so many transformer blocks; None: wherever `targets` are.
    """

    r: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    targets: str | tuple[str, ...] = "all-linear"
    init: str = "zero"
    seed: int = 0
    last_layers: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise ValueError(f"lora.r must be an integer ≥ 1, got {self.r!r}")
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"lora.alpha must be > 0 or None, got {self.alpha!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout must be in [0, 1), got {self.dropout!r}")
        if isinstance(self.targets, list):
            object.__setattr__(self, "targets", tuple(self.targets))
        named = isinstance(self.targets, tuple) and self.targets and all(isinstance(t, str) for t in self.targets)
        if not named and self.targets not in ("all-linear", "attention"):
            raise ValueError(f"lora.targets must be 'all-linear', 'attention' or layer names, got {self.targets!r}")
        if self.init not in _INITS:
            raise ValueError(f"lora.init must be one of {sorted(_INITS)}, got {self.init!r}")
        check_count("lora.last_layers", self.last_layers)

    @property
    def scaling(self) -> float:
        """alpha / r, the factor on B A."""
        return (2.0 * self.r if self.alpha is None else self.alpha) / self.r

    @classmethod
    def coerce(cls, value: LoRAConfig | Mapping[str, Any] | int | None) -> LoRAConfig | None:
        """A LoRAConfig from what `Backbone.load(lora=…)` takes: itself, a mapping of its fields, a rank, or None."""
        if value is None or isinstance(value, cls):
            return value
        if isinstance(value, bool):
            raise TypeError("lora must be a LoRAConfig, a mapping, a rank or None, got a bool")
        if isinstance(value, int):
            return cls(r=value)
        if isinstance(value, Mapping):
            unknown = sorted(set(value) - {field.name for field in dataclasses.fields(cls)})
            if unknown:
                names = ", ".join(field.name for field in dataclasses.fields(cls))
                raise ValueError(f"lora has unknown fields {unknown}; it takes {names}")
            return cls(**value)
        raise TypeError(f"lora must be a LoRAConfig, a mapping, a rank or None, got {type(value).__name__}")


def attach(model: Any, config: LoRAConfig, name: str = ADAPTER) -> Any:
    """A peft model around `model`, or that itself where it is one, with a fresh adapter.

    Raises:
        ValueError: the layers that `config` names are not in the model.
    """
    peft = require("peft")
    targets = _targets(model, config)
    peft_config = peft.LoraConfig(
        r=config.r,
        lora_alpha=config.scaling * config.r,
        lora_dropout=config.dropout,
        target_modules=list(targets) if isinstance(targets, tuple) else targets,
        init_lora_weights=_INITS[config.init],
        bias="none",
    )
    # peft draws A and B from the global generator: fork it, so that loading a model leaves the caller's stream alone.
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 asks transformers 5 by a deprecated name
        warnings.filterwarnings("ignore", "Adapter name")  # "a" is in "lora_": only files written by peft would mind
        torch.manual_seed(config.seed)
        try:
            if not isinstance(model, peft.PeftModel):
                return peft.get_peft_model(model, peft_config, adapter_name=name)
            model.add_adapter(name, peft_config)
            return model
        except ValueError as error:
            raise ValueError(f"lora.targets={config.targets!r}: {str(error).splitlines()[0]}") from error


def _targets(model: Any, config: LoRAConfig) -> str | tuple[str, ...]:
    """What peft is told: `config.targets`, or full names where those do not say it."""
    if config.targets != "attention" and config.last_layers is None:
        return config.targets
    names = attention_names(model) if config.targets == "attention" else linear_names(model)
    if isinstance(config.targets, tuple):
        names = [name for name in names if any(f".{name}".endswith(f".{target}") for target in config.targets)]
    where = f"lora.targets={config.targets!r}"
    if config.last_layers is not None:
        blocks = last_blocks(model, config.last_layers, "lora.last_layers")
        names = [name for name in names if within(name, blocks)]
        where += f" in the last {len(blocks)} blocks"
    if not names:
        raise ValueError(f"{where}: the model has no such linear layer")
    return tuple(sorted(names))


def switch(model: Any, name: str | None) -> None:
    """Lets one adapter compute and train, or none."""
    if name is None:
        model.base_model.disable_adapter_layers()
    else:
        model.base_model.enable_adapter_layers()
        model.set_adapter(name)


def detach(model: Any, name: str) -> Any:
    """Takes an adapter out; with the last one, what peft has put around the model too."""
    others = [other for other in model.peft_config if other != name]
    if not others:
        return model.unload()
    model.set_adapter(others[0])  # or peft would choose one, layer by layer, and warn of it
    model.delete_adapter(name)
    return model


def adapter_parameters(model: Any, name: str = ADAPTER) -> dict[str, nn.Parameter]:
    """An adapter's A and B, under the names that they have in peft's files.

    Told by the place of the adapter's name: peft's own function takes any name that holds it for one of the adapter's.
    """
    own = re.compile(rf"(.*\.lora_\w+)\.{re.escape(name)}(\..*)?")
    found = ((own.fullmatch(key), parameter) for key, parameter in model.named_parameters())
    return {match[1] + (match[2] or ""): parameter for match, parameter in found if match is not None}


def adapter_state(model: Any, name: str = ADAPTER) -> dict[str, Tensor]:
    """A detached copy on the CPU of the adapter's tensors, under peft's names."""
    return copied(adapter_parameters(model, name))


def set_adapter_state(model: Any, state: Mapping[str, Tensor], name: str = ADAPTER) -> None:
    """Copy `state` into the adapter; names and shapes must agree exactly, else ValueError and nothing is changed."""
    put_back(adapter_parameters(model, name), state, "the adapter state")


def merged_linears(model: Any, dtype: torch.dtype, name: str = ADAPTER) -> dict[str, nn.Linear]:
    """Dense layers in place of the adapted 4-bit ones, by name: decoded weight + scaling · B A. Adapted dense layers
    are merged where they are."""
    from peft.tuners.lora import LoraLayer

    merged: dict[str, nn.Linear] = {}
    for place, layer in model.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        adapted: Any = layer
        if name not in adapted.lora_A:  # it had another one, which was taken out
            continue
        inner = adapted.get_base_layer()
        if not is_quantized(inner):
            adapted.merge(safe_merge=True)
            continue
        with torch.no_grad():
            weight = dequantized(inner).float() + adapted.get_delta_weight(name).float()
        linear = nn.Linear(inner.in_features, inner.out_features, inner.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        linear.bias = inner.bias
        merged[place] = linear
    return merged


def save(model: Any, config: LoRAConfig, folder: Path, base_name: str, name: str = ADAPTER) -> None:
    """Write peft's two adapter files, each atomically; `PeftModel.from_pretrained(base, folder)` reads them too.

    The weights file carries the LoRAConfig itself, so that it is complete whatever becomes of the second write.
    """
    from safetensors.torch import save as to_bytes

    with tempfile.TemporaryDirectory() as scratch:
        peft_config = model.peft_config[name]
        kept, peft_config.base_model_name_or_path = peft_config.base_model_name_or_path, base_name
        try:
            peft_config.save_pretrained(scratch)
        finally:
            peft_config.base_model_name_or_path = kept
        written = json.loads((Path(scratch) / _CONFIG_FILE).read_text())
    if isinstance(written.get("target_modules"), list):
        written["target_modules"].sort()
    written["inference_mode"] = True
    metadata = {"format": "pt", _METADATA: json.dumps(dataclasses.asdict(config), sort_keys=True)}
    write_atomic(folder / _WEIGHTS_FILE, to_bytes(adapter_state(model, name), metadata=metadata))
    write_atomic(folder / _CONFIG_FILE, (json.dumps(written, indent=2, sort_keys=True) + "\n").encode())


def load(folder: Path) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """Read what `save` wrote (the weights file is enough), or a plain LoRA adapter that peft wrote.

    Raises ValueError if a file is missing or damaged, or if the adapter is of another kind.
    """
    safetensors = require("safetensors")
    path = folder / _WEIGHTS_FILE
    if not path.is_file():
        raise ValueError(f"folder: no {_WEIGHTS_FILE} in {str(folder)!r}; save_adapter writes one")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            own = (file.metadata() or {}).get(_METADATA)
            state = {name: file.get_tensor(name) for name in file.keys()}
        written = parse_json(own if own is not None else (folder / _CONFIG_FILE).read_text())
        if not isinstance(written, dict):
            raise ValueError(f"its configuration must be an object, got {type(written).__name__}")
        config = LoRAConfig.coerce(written) if own is not None else _from_peft(written, folder)
    except (OSError, ValueError, KeyError, TypeError, OverflowError, safetensors.SafetensorError) as error:
        raise ValueError(f"folder: the adapter in {str(folder)!r} is damaged: {error}") from error
    assert config is not None
    return config, state


def _from_peft(written: Mapping[str, Any], folder: Path) -> LoRAConfig:
    special = [key for key in _UNSUPPORTED if written.get(key)]
    if written.get("peft_type") != "LORA" or special or written.get("bias", "none") != "none":
        raise ValueError(f"folder: {str(folder)!r} is not a plain LoRA adapter ({written.get('peft_type')}, {special})")
    targets = written["target_modules"]
    return LoRAConfig(
        r=written["r"],
        alpha=float(written["lora_alpha"]),
        dropout=float(written.get("lora_dropout", 0.0)),
        targets=targets if isinstance(targets, str) else tuple(sorted(targets)),
    )
