"""Hidden states of several layers of a frozen backbone, computed once: what a network beside it trains on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from .encode import encode_texts
from .encoded import Encoded

if TYPE_CHECKING:
    from .backbone import Backbone
    from .cache import EmbeddingCache


class _SeveralLayers:
    """A backbone whose rows hold several layers side by side; `encode_texts` pools them as it pools one."""

    def __init__(self, backbone: Backbone, layers: tuple[int, ...]) -> None:
        self._backbone, self._layers = backbone, layers
        self.hidden_size = len(layers) * backbone.hidden_size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backbone, name)

    def forward_rows(self, offsets: Tensor, **given: Any) -> Tensor:
        """`[T, L · d]`, see `Backbone.forward_rows`."""
        return self._backbone.forward_rows(offsets, **given, layers=self._layers)


def encode_layers(
    backbone: Backbone,
    texts: Sequence[str],
    layers: int | Sequence[int],
    *,
    pooling: str = "mean",
    batch_tokens: int = 4096,
    progress: bool = True,
    cache: EmbeddingCache | None = None,
    template_version: str = "",
) -> Tensor:
    """Hidden states of some layers, pooled per text, with the weights and the adapter of now; no graph.

    One pass over the texts gives all layers; it holds those of every block for `batch_tokens` tokens.

    Args:
        texts, pooling, batch_tokens, progress: see `encode_texts`; every pooling but "tokens".
        layers: how many, evenly spaced with the last one among them, or which: 0 is what the first block reads, i what
            block i gives. The last one is behind the model's final norm, where it has one.
        cache: vectors in it are read, others computed and stored, under `Backbone.cache_context` and the layers;
            `template_version` then names the version of whatever made the texts.

    Returns:
        float32 `[n, L, d]` on the CPU; zeros for a text without any token.

    Raises:
        TypeError, ValueError: an argument out of range.
    """
    if pooling == "tokens":
        raise ValueError("pooling must give one vector per text and layer, got 'tokens'")
    chosen = layers_of(backbone, layers)
    view = cast("Backbone", _SeveralLayers(backbone, chosen))

    def compute(part: Sequence[str]) -> Encoded:
        return encode_texts(view, part, pooling=pooling, batch_tokens=batch_tokens, progress=progress)

    if cache is None:
        found = compute(texts)
    else:
        context = backbone.cache_context(pooling=pooling, template_version=template_version)
        found = cache.get_or_compute(texts, compute, context=context | {"layers": ",".join(map(str, chosen))})
    assert found.pooled is not None
    return found.pooled.view(len(texts), len(chosen), backbone.hidden_size)


def layers_of(backbone: Backbone, layers: int | Sequence[int]) -> tuple[int, ...]:
    """The layers by number; see `encode_layers`."""
    blocks = int(backbone.model.config.get_text_config().num_hidden_layers)
    if isinstance(layers, int) and not isinstance(layers, bool):
        if not 1 <= layers <= blocks:
            raise ValueError(f"layers must be 1 to {blocks}, the blocks of the model, got {layers}")
        return tuple(blocks * (i + 1) // layers for i in range(layers))
    chosen = tuple(layers) if isinstance(layers, Sequence) and not isinstance(layers, str) else ()
    fit = all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i <= blocks for i in chosen)
    if not chosen or not fit or len(set(chosen)) < len(chosen):
        raise ValueError(f"layers must be a number of layers or distinct numbers from 0 to {blocks}, got {layers!r}")
    return chosen
