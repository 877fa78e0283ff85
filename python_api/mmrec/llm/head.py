"""A causal model's output layer, or single rows of it, for a backbone that was loaded without it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmrec_kernels import info_nce

from ..files import parse_json
from .extras import quiet_transformers, require
from .loading import first_line
from .packed import without_cache

__all__ = ["WORKSPACE_BYTES", "OutputLayer", "causal_model", "output_layer", "output_rows"]

_ONE, _INDEX = "model.safetensors", "model.safetensors.index.json"
WORKSPACE_BYTES = 64 << 20


@dataclass(frozen=True, eq=False)
class OutputLayer:
    """Last hidden states to logits, `bend(scale · (W h + bias))`, in float32 whatever the dtype of W.

    Attributes:
        weight: `[V, d]`.
        bias: `[V]` or None.
        scale: of the logits (Cohere, Granite): part of what a model says, though it does not change their order.
        cap: logits bend to cap · tanh(logit / cap) (Gemma), which changes differences between texts; None: they do not.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits float32 `[n, V]` of `hidden [n, d]`, all in memory at once: for few rows, here or there."""
        return self._logits(hidden.to(self.weight.device), slice(None))

    def chosen(self, hidden: Tensor, row: Tensor, token: Tensor) -> Tensor:
        """Single logits float32 `[m]`: of `token[j]` after the state `hidden[row[j]]`.

        Args:
            hidden: `[n, d]`.
            row, token: int64 `[m]`. `2 · m · d` numbers are gathered, `WORKSPACE_BYTES` at a time.
        """
        step = max(1, WORKSPACE_BYTES // (8 * hidden.shape[1]))
        parts = [hidden.new_zeros(0, dtype=torch.float32)]
        for start in range(0, len(row), step):
            tokens = token[start : start + step]
            found = (hidden[row[start : start + step]].float() * self.weight[tokens].float()).sum(1)
            parts.append(self._bent(found if self.bias is None else found + self.bias[tokens].float()))
        return torch.cat(parts)

    def log_sum_exp(self, hidden: Tensor, *, workspace_bytes: int = WORKSPACE_BYTES) -> Tensor:
        """float32 `[n]`: the log-sum-exp of all V logits of each row of `hidden [n, d]`.

        Args:
            workspace_bytes: most bytes of a matrix of logits, and of one of weights made float32; `[n, V]` is never
                held beyond it.
        """
        if workspace_bytes < 4:
            raise ValueError(f"workspace_bytes must be at least 4, got {workspace_bytes}")
        if not len(hidden):
            return hidden.new_zeros(0, dtype=torch.float32)
        if self.cap is None:
            log_q = None if self.bias is None else -self.scale * self.bias.float()
            target = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
            stats = info_nce(
                hidden, self.weight, scale=self.scale, symmetric=False, target=target, log_q=log_q, reduction="none",
                workspace_bytes=workspace_bytes, return_stats=True,
            )[1]  # fmt: skip
            return stats.lse
        rows = max(1, min(len(hidden), workspace_bytes // (4 * 1024)))
        width = max(1, workspace_bytes // (4 * max(rows, hidden.shape[1])))
        found = [
            torch.logsumexp(
                torch.stack([
                    torch.logsumexp(self._logits(part, slice(first, first + width)), 1)
                    for first in range(0, len(self.weight), width)
                ]),
                0,
            )
            for part in hidden.split(rows)
        ]  # fmt: skip
        return torch.cat(found)

    def log_prob(self, hidden: Tensor, row: Tensor, token: Tensor) -> Tensor:
        """float32 `[m]`: log-probability over the whole vocabulary of `token[j]` after the state `hidden[row[j]]`."""
        total = self.log_sum_exp(hidden)
        # The two are summed in different orders: rounding must not make a probability of more than 1.
        return (self.chosen(hidden, row, token) - total[row]).clamp_max(0)

    def _logits(self, hidden: Tensor, tokens: slice) -> Tensor:
        bias = None if self.bias is None else self.bias[tokens].float()
        return self._bent(F.linear(hidden.float(), self.weight[tokens].float(), bias))

    def _bent(self, found: Tensor) -> Tensor:
        found = self.scale * found
        return found if self.cap is None else self.cap * torch.tanh(found / self.cap)


def output_rows(source: str, model: Any, tokens: Sequence[int]) -> OutputLayer:
    """The rows of some tokens, float32 on the CPU; nothing else of the layer is read.

    Args:
        source: folder or name that the headless `model` was loaded from.
        model: knows its configuration, and holds the rows where they are those of its input embeddings (tied).
        tokens: whose rows, in this order.

    Raises:
        ValueError: no causal model of this kind, or a checkpoint without its output layer.
    """
    causal = _skeleton(source, model.config)
    rows = torch.tensor(list(tokens))
    weight, bias = _weights(source, causal, model, rows)
    return OutputLayer(weight.float().cpu(), None if bias is None else bias.float(), *_shape_of(model.config))


def output_layer(source: str, model: Any) -> OutputLayer:
    """The whole output layer of a causal model, in the dtype and on the device of its input embeddings.

    Where it is tied to them it is those embeddings, and takes no memory; else it takes V · d numbers, read from the
    checkpoint. It is tried on a few tokens against the logits of transformers' own model.

    Args:
        source, model: as in `output_rows`.

    Raises:
        ValueError: no causal model of this kind, a checkpoint without its output layer, or a model that makes its
            logits in another way than `OutputLayer` does.
    """
    causal = causal_model(source, model)
    head = causal.get_output_embeddings()
    bias = getattr(head, "bias", None)
    layer = OutputLayer(head.weight.detach(), None if bias is None else bias.detach(), *_shape_of(model.config))
    ids = torch.arange(4, device=layer.weight.device).unsqueeze(0) + len(layer.weight) // 2
    training = causal.training
    causal.eval()
    try:
        with torch.no_grad():
            wanted = causal(input_ids=ids, **without_cache(model)).logits[0].float()
            found = layer(model(input_ids=ids, **without_cache(model)).last_hidden_state[0])
    finally:
        causal.train(training)
    tolerance = 1e-4 if layer.weight.dtype == torch.float32 else 2e-2  # some roundings of the largest
    if not bool((found - wanted).abs().max() <= tolerance * wanted.abs().max()):
        raise ValueError(f"name_or_path: {source!r} makes its logits in a way that is not known here")
    return layer


def causal_model(source: str, model: Any) -> Any:
    """transformers' causal model around the headless `model`: it holds that very model, adapter included, and the
    output layer as `output_layer` says.

    Raises:
        ValueError: no causal model of this kind, or a checkpoint without its output layer.
    """
    causal = _skeleton(source, model.config)
    weight, bias = _weights(source, causal, model, None)
    head = causal.get_output_embeddings()
    like = model.get_input_embeddings().weight
    head.weight = nn.Parameter(weight.to(like), requires_grad=False)  # of the tied one no copy
    if bias is not None:
        head.bias = nn.Parameter(bias.to(like), requires_grad=False)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    setattr(causal, causal.base_model_prefix, base)
    rest = [n for n, value in (*causal.named_parameters(), *causal.named_buffers()) if value.is_meta]
    if rest:
        raise ValueError(f"name_or_path: the causal model of {source!r} has more weights than its body: {rest[0]!r}")
    causal.config = base.config  # one for both, so that they agree about their attention
    return causal.train(bool(model.training))


def _skeleton(source: str, config: Any) -> Any:
    """The causal model of a configuration, without weights."""
    with quiet_transformers(), torch.device("meta"):
        try:
            causal = require("transformers").AutoModelForCausalLM.from_config(config)
        except ValueError as error:
            raise ValueError(f"name_or_path: no causal model of {source!r}: {first_line(error)}") from error
    causal.tie_weights()
    return causal


def _weights(source: str, causal: Any, model: Any, rows: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The output layer's weight and bias: the model's own input embeddings where they are tied, else from the
    checkpoint, `rows` of them or all."""
    head = causal.get_output_embeddings()
    names = {id(value): name for name, value in causal.named_parameters(remove_duplicate=False)}
    bias = None if getattr(head, "bias", None) is None else _read(source, names[id(head.bias)], rows)
    if head.weight is causal.get_input_embeddings().weight:
        weight = model.get_input_embeddings().weight
        return weight if rows is None else weight.detach()[rows.to(weight.device)], bias
    return _read(source, names[id(head.weight)], rows), bias


def _shape_of(config: Any) -> tuple[float, float | None]:
    """The scale and the cap of a model's logits."""
    scale = float(getattr(config, "logit_scale", None) or 1) / float(getattr(config, "logits_scaling", None) or 1)
    return scale, getattr(config, "final_logit_softcapping", None)


def _read(source: str, name: str, rows: Tensor | None) -> Tensor:
    """Rows of a tensor of the checkpoint, or all; nothing else of it is read."""
    safetensors = require("safetensors")
    try:
        path = _file_of(source, name)
        with safetensors.safe_open(path, framework="pt") as file:
            if rows is None:
                whole: Tensor = file.get_tensor(name)
                return whole
            part = file.get_slice(name)
            return torch.cat([torch.as_tensor(part[int(row) : int(row) + 1]) for row in rows])
    except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"name_or_path: the checkpoint {source!r} has no {name!r} to answer with: {first_line(error)}"
        ) from error


def _file_of(source: str, name: str) -> str:
    cached_file = require("transformers").utils.cached_file
    with quiet_transformers():
        index = cached_file(source, _INDEX, _raise_exceptions_for_missing_entries=False)
        if index is None:
            return str(cached_file(source, _ONE))
        return str(cached_file(source, parse_json(Path(index).read_text(encoding="utf-8"))["weight_map"][name]))
