"""What trains of a backbone: its adapters by name, which one is in use, their files, and what weights train instead."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import bottleneck, swap_linear
from . import lora as lora_module
from .bottleneck import AdapterConfig
from .fingerprint import combine
from .lora import ADAPTER, LoRAConfig
from .quantize import keep_unpacked
from .swap import Swap, swap_kernels
from .tuning import chosen, copied, put_back

if TYPE_CHECKING:
    from typing_extensions import Self

Config = LoRAConfig | AdapterConfig


class AdapterSets:
    """The adapters of a `Backbone`, and its weights that train."""

    model: Any
    name: str
    quantize: str | None
    dtype: torch.dtype
    swap: Swap | None
    trainable: str | None
    _configs: dict[str, Config]
    _in_use: str | None

    if TYPE_CHECKING:

        @property
        def training(self) -> bool: ...
        def train(self, mode: bool = True) -> Self: ...

    @property
    def adapters(self) -> dict[str, Config]:
        """The configs of all adapters, by name."""
        return dict(self._configs)

    @property
    def adapter(self) -> str | None:
        """Name of the adapter in use, or None."""
        return self._in_use

    @property
    def lora(self) -> LoRAConfig | None:
        """The LoRAConfig of the adapter in use, or None."""
        config = None if self._in_use is None else self._configs[self._in_use]
        return config if isinstance(config, LoRAConfig) else None

    def add_adapter(self, name: str, lora: LoRAConfig | Mapping[str, Any] | int) -> None:
        """Add a fresh LoRA adapter beside those that are there. The first one is in use at once, others wait for
        `use_adapter`.

        Raises:
            ValueError: a name that is taken or cannot be one, a config that the model does not fit, or a backbone whose
                own weights or bottleneck adapters train.
        """
        config = LoRAConfig.coerce(lora)
        if config is None:
            raise TypeError("lora must be a LoRAConfig, a mapping or a rank, got None")
        self._attach(name, config)

    def use_adapter(self, name: str | None) -> None:
        """Let the adapter `name` compute and train, and no other; None: none does."""
        self._check_names([name])
        self._switch(name)

    def remove_adapter(self, name: str) -> None:
        """Take an adapter out, with its weights; if it was in use, none is."""
        self._check_names([name])
        training, used = self.training, None if self._in_use == name else self._in_use
        if isinstance(self._configs.pop(name), LoRAConfig):
            self._replace_model(lora_module.detach(self.model, name))
        else:
            bottleneck.detach(self.model)
        self._switch(used)
        self.train(training)

    @contextmanager
    def under(self, name: str | None) -> Iterator[None]:
        """Inside, `name` is in use (None: no adapter); what trains stays what it is, and all is as before behind it."""
        self._check_names([name])
        if name == self._in_use:
            yield
            return
        before, needs = self._in_use, [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        try:
            self._switch(name, needs)
            yield
        finally:
            self._switch(before, needs)

    def why_not_together(self, names: Sequence[str | None]) -> str | None:
        """Why texts under these adapters (None: under none) cannot share a packed row, or None. Such a row is for
        inference: `encode` keeps the adapters of texts apart with `requires_grad`, and where this names a reason."""
        self._check_names(names)
        several = [name for name in dict.fromkeys(names) if name is not None]
        if any(not isinstance(self._configs[name], LoRAConfig) for name in several):
            return "bottleneck adapters act on all tokens"
        return swap_linear.why_not_by_token(self.model, several) if several else None

    def adapters_of(self, names: Sequence[str | None] | None, count: int) -> list[str | None]:
        """One name, or None, for each of `count` texts: those given, checked, or that of the adapter in use."""
        if names is None:
            return [self._in_use] * count
        if isinstance(names, str):
            raise TypeError(f"adapters must be a sequence of names or None, got one str {names!r}")
        if len(names) != count:
            raise ValueError(f"adapters must be {count} names or None, one for each text, got {len(names)}")
        self._check_names(names)
        return list(names)

    def by_adapter(self, names: Sequence[str | None] | None, count: int) -> dict[str | None, list[int]]:
        """The places of `adapters_of`, by name; the one in use, without places, where there are none."""
        found: dict[str | None, list[int]] = {} if count else {self._in_use: []}
        for place, name in enumerate(self.adapters_of(names, count)):
            found.setdefault(name, []).append(place)
        return found

    def rows_under(
        self, names: Sequence[str | None] | None, offsets: Tensor, *, packed: bool
    ) -> AbstractContextManager[None]:
        """Inside, text i, rows `offsets[i]:offsets[i + 1]` of the next forward, is computed under `names[i]`.

        Raises:
            ValueError: another number of names than of texts, an unknown one, or several where `why_not_together`.
        """
        if names is None:
            return nullcontext()
        names = self.adapters_of(names, len(offsets) - 1)
        distinct = list(dict.fromkeys(names))
        if len(distinct) == 1:
            return self.under(distinct[0])
        reason = self.why_not_together(distinct) if packed else "the texts are not packed"
        if reason is not None:
            raise ValueError(f"adapters: these texts cannot be computed together: {reason}")
        return self._by_token(names, offsets.diff())

    @contextmanager
    def _by_token(self, names: Sequence[str | None], lengths: Tensor) -> Iterator[None]:
        several = [name for name in dict.fromkeys(names) if name is not None]
        ids = torch.tensor([-1 if name is None else several.index(name) for name in names])
        device = next(self.model.parameters()).device
        with self.under(several[0]), swap_linear.by_token(several, ids.repeat_interleave(lengths).to(device)):
            yield

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters an optimizer should get: of the adapter in use, or the weights that `trainable` names."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def trainable_state_dict(self) -> dict[str, Tensor]:
        """A copy on the CPU of what trains: `adapter_state_dict()`, or the weights that `trainable` names."""
        if self.trainable is None:
            return self.adapter_state_dict()
        return copied(chosen(self.model, self.trainable))

    def load_trainable_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `trainable_state_dict` gave, bit for bit; names and shapes must match."""
        if self.trainable is None:
            self.load_adapter_state_dict(state)
        else:
            put_back(chosen(self.model, self.trainable), state, "the state")

    def adapter_state_dict(self, name: str | None = None) -> dict[str, Tensor]:
        """A copy on the CPU of an adapter's tensors, under peft's names. None: of the one in use."""
        return copied(self._tensors(self._one("adapter_state_dict", name)))

    def load_adapter_state_dict(self, state: Mapping[str, Tensor], name: str | None = None) -> None:
        """Restore what `adapter_state_dict` gave, bit for bit; names and shapes must match."""
        put_back(self._tensors(self._one("load_adapter_state_dict", name)), state, "the adapter state")

    def save_adapter(self, folder: str | Path, name: str | None = None) -> None:
        """Write `adapter_model.safetensors` and `adapter_config.json` (peft's format), or, of bottleneck adapters,
        `bottleneck_adapter.safetensors`, each atomically. None: the adapter in use."""
        name = self._one("save_adapter", name)
        config = self._configs[name]
        if isinstance(config, LoRAConfig):
            lora_module.save(self.model, config, Path(folder), self.name, name)
        else:
            bottleneck.save(self.model, config, Path(folder))

    def load_adapter(self, folder: str | Path, name: str | None = None) -> None:
        """Load an adapter from `folder` into the one called `name`, adding that if there is none (see `add_adapter`).
        None: the one in use, else "default". Raises ValueError if it does not fit."""
        folder = Path(folder)
        name = name or self._in_use or ADAPTER
        inserted = (folder / bottleneck.FILE).is_file()
        config: Config
        config, state = bottleneck.load(folder) if inserted else lora_module.load(folder)
        own = self._configs.get(name)
        if own is None:
            self._attach(name, config)
        elif _shape(own) != _shape(config):
            raise ValueError(f"folder: the adapter has {_shape(config)}; this backbone's {name!r} has {_shape(own)}")
        try:
            put_back(self._tensors(name), state, "the adapter state")
        except ValueError:
            if own is None:
                self.remove_adapter(name)
            raise

    def merge(self, *, requantize: bool = False) -> None:
        """Fold the only adapter, which must be LoRA and in use, into the base weights and drop it.

        Adapted 4-bit layers become dense (dequantised weight + scaling · B A), so outputs change only by rounding.
        `requantize=True` keeps them NF4: a quarter to an eighth of the memory, with a new quantisation error of the
        size of the first one.
        """
        name = self._one("merge", self._in_use)
        if self.lora is None:
            raise ValueError("merge: bottleneck adapters cannot be folded into weights")
        if len(self._configs) > 1:
            raise ValueError(f"merge: other adapters rest on these weights, remove them first: {list(self._configs)}")
        training = self.training
        dense = {} if requantize else lora_module.merged_linears(self.model, self.dtype, name)
        model = self.model.merge_and_unload() if requantize else self.model.unload()
        for place, layer in dense.items():
            model.set_submodule(place, layer)
        self._replace_model(model)
        self._configs.clear()
        self._switch(None)
        self.train(training)

    def _adapter_hash(self) -> str:
        """Of the adapter in use: what of it decides a vector."""
        if self._in_use is None:
            return ""
        word = "bottleneck" if self.lora is None else str(self.lora.scaling)
        return combine(self._tensors(self._in_use), word)

    def _attach(self, name: str, config: Config) -> None:
        if not isinstance(name, str):
            raise TypeError(f"name must be a str, got {type(name).__name__}")
        # It becomes a key of ModuleDicts, which has attributes of its own; peft's "__base__" means none.
        if not re.fullmatch(r"[A-Za-z][\w-]*", name) or hasattr(nn.ModuleDict(), name):
            raise ValueError(f"name must be letters, digits, _ and -, and no attribute of ModuleDict, got {name!r}")
        if name in self._configs:
            raise ValueError(f"name: there is an adapter {name!r} already")
        if self.trainable is not None:
            raise ValueError(f"adapters do not go with trainable, which is {self.trainable!r} here")
        lora = isinstance(config, LoRAConfig)
        if self._configs and not (lora and all(isinstance(c, LoRAConfig) for c in self._configs.values())):
            raise ValueError(f"bottleneck adapters go with no other adapter, there is {list(self._configs)}")
        training, used = self.training, self._in_use if self._configs else name
        if isinstance(config, LoRAConfig):
            self.model = lora_module.attach(self.model, config, name)
        else:
            bottleneck.attach(self.model, config)
        self._configs[name] = config
        if self.swap is not None and lora:
            self.swap = swap_kernels(self.model, linear=bool(self.quantize))  # with the layers that peft has put around
        self._switch(used)
        self.train(training)

    def _switch(self, name: str | None, needs: Sequence[tuple[nn.Parameter, bool]] | None = None) -> None:
        """Puts an adapter in use; `needs` says what trains then, None: what is in use."""
        if any(isinstance(config, LoRAConfig) for config in self._configs.values()):
            lora_module.switch(self.model, name)
        elif self._configs:
            bottleneck.switch(self.model, name is not None)
        elif self.trainable is None:
            self.model.requires_grad_(False)
        self._in_use = name
        for parameter, needed in needs or ():
            parameter.requires_grad_(needed)

    def _replace_model(self, model: Any) -> None:
        """`model` is what is left once an adapter is out."""
        self.model = model
        if self.quantize:
            keep_unpacked(model)
        if self.swap is not None:
            self.swap = swap_kernels(model, linear=bool(self.quantize))

    def _tensors(self, name: str) -> dict[str, nn.Parameter]:
        lora = isinstance(self._configs[name], LoRAConfig)
        return lora_module.adapter_parameters(self.model, name) if lora else bottleneck.parameters(self.model)

    def _check_names(self, names: Sequence[str | None]) -> None:
        for name in names:
            if name is not None and name not in self._configs:
                raise ValueError(f"adapters: there is no adapter {name!r}; there are {list(self._configs)}")

    def _one(self, method: str, name: str | None) -> str:
        """`name`, or that of the adapter in use."""
        self._check_names([name])
        name = self._in_use if name is None else name
        if name is None:
            raise ValueError(
                f"{method}: this backbone has no LoRA adapter or other adapter in use; "
                f"load it with lora=… or adapter=…, or use one of {list(self._configs)}"
            )
        return name


def _shape(config: Config) -> str:
    """What of a config decides whether the tensors of one fit those of another, but for where they are."""
    if isinstance(config, LoRAConfig):
        return f"r={config.r}, scaling={config.scaling}"
    return f"inner={config.inner}, reduction={config.reduction}"
