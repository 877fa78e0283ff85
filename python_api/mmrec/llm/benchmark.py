"""Benchmarks of whole backbones under NF4 and LoRA: swapped, as bitsandbytes and peft compute them, and dense.

Cases for `mmrec_kernels.benchmarks`. `forward` is inference; `step` one training step: forward, backward and AdamW. A
case with `cached` tokens has read so many before, and reads `tokens` more with their keys and values at hand: one text
goes on from its own; several go on from the same ones, which stock transformers repeats for each of them at each call.
Where the `longest` has more than `tokens`, texts have 1 to `longest` tokens, in even steps: packed into one row, or,
where that cannot be, sorted by length and padded in batches of 1024 or 4096 tokens, whichever is faster.
All providers hold the same decoded weights and the same adapters, so all are judged by one oracle: the dense model in
float64 (but for what transformers itself computes in float32, its norms).
"""

from __future__ import annotations

import copy
import tempfile
import timeit
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from mmrec_kernels.benchmarks.case import Case, Inputs, Provider, Work, against, generator, our_name, torch_dtype
from torch import Tensor, nn

from . import lora as lora_module
from .encode import offsets_of, plan_batches
from .extras import KERNELS, quiet_transformers, require
from .loading import load_config, load_model, resolve_source
from .packed import Prefix, packed_forward, padded_forward, without_cache
from .quantize import dequantized, keep_unpacked, quantized_linears
from .swap import swap_kernels

Shape = dict[str, int]
Model = Any

MODES = ("forward", "step")
DTYPES = {"cpu": ("bfloat16", "float32"), "cuda": ("bfloat16", "float16")}
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_QWEN2 = {
    "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
    "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 32768, "rope_theta": 1e6,
}  # fmt: skip
_TINY = _QWEN2 | {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 99
}  # fmt: skip

# Texts, tokens of each (on average), of the longest, tokens read before: a user's prompt, the next token of an answer,
# items to rank for a user, a catalogue, a batch to learn from.
_SHAPES: dict[str, dict[str, list[tuple[int, int, int, int]]]] = {
    "qwen2-0.5b": {"forward": [(1, 512, 512, 0), (1, 1, 1, 512), (64, 20, 20, 512)], "step": [(4, 128, 128, 0)]},
    "minilm": {"forward": [(1, 64, 64, 0), (96, 64, 127, 0)], "step": [(32, 64, 64, 0)]},
    "tiny": {"forward": [(2, 9, 9, 0), (1, 1, 1, 5), (3, 4, 4, 5), (4, 4, 7, 0)], "step": [(2, 9, 9, 0)]},
}
MODELS = tuple(_SHAPES)


def cases(model: str, device: str, dtypes: Sequence[str], modes: Sequence[str], rank: int) -> list[Case]:
    """All cases of one of `MODELS`, with adapters of `rank` on every linear layer (0: none, and no training steps).

    Weights of qwen2-0.5b and tiny are random: the first has the shape of Qwen2-0.5B without its head.
    """
    return [
        _case(model, shape, device, dtype, mode, rank)
        for dtype in dtypes
        for mode in modes
        for shape in _SHAPES[model][mode]
        if rank or mode == "forward"
    ]


def _case(model: str, sizes: tuple[int, int, int, int], device: str, dtype: str, mode: str, rank: int) -> Case:
    config = _config(model)
    texts, tokens, longest, cached = sizes
    shape = {
        "layers": config.num_hidden_layers, "width": config.hidden_size, "texts": texts, "tokens": tokens,
        "longest": longest, "cached": cached, "rank": rank,
    }  # fmt: skip
    return Case(
        op="backbone", shape=shape, dtype=dtype, device=device, mode=mode,
        work=_work(config, shape, dtype, mode), providers=_providers(device, dtype, mode),
        inputs=lambda: _inputs(model, shape, dtype, device), judge=lambda given: against(_oracle(given, mode)),
        compute_dtype=torch_dtype(dtype),
    )  # fmt: skip


def _providers(device: str, dtype: str, mode: str) -> tuple[Provider, ...]:
    ours = our_name("_nf4_forward", device)
    found = [
        Provider(f"{ours}, swap_kernels", partial(_run, _swapped), _joined, ours=True),
        Provider(f"{ours}, swap_kernels with attention", partial(_run, _swapped_attention), _joined, ours=True),
        Provider("bitsandbytes + peft", partial(_run, _stock), _joined, module="peft"),
        Provider("dense + peft", partial(_run, _dense), _joined, module="peft"),
    ]
    if device == "cpu" and mode == "forward":
        # What bitsandbytes repacks is computed in bfloat16 whatever was asked for: for float32 that is something else.
        name = "bitsandbytes repacked for CPU inference + peft"
        found.append(Provider(name, partial(_run, _repacked), _joined, yardstick=dtype == "float32", module="peft"))
    return tuple(found)


def _config(model: str) -> Any:
    transformers = require("transformers")
    if model == "minilm":
        return load_config(resolve_source(None)[1])
    return transformers.Qwen2Config(**(_QWEN2 if model == "qwen2-0.5b" else _TINY))


def _work(config: Any, shape: Shape, dtype: str, mode: str) -> Work:
    """Linear layers, adapters and attention; weights in 4.127 bits and adapters in float32, read once a pass."""
    texts, tokens, cached = shape["texts"], shape["tokens"], shape["cached"]
    width, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    kv_width = width // heads * getattr(config, "num_key_value_heads", heads)
    mlp = [(inner, width)] * (2 if hasattr(config, "num_key_value_heads") else 1) + [(width, inner)]
    layers = [(width, width), (kv_width, width), (kv_width, width), (width, width), *mlp]
    weights = config.num_hidden_layers * sum(n * k for n, k in layers)
    adapters = config.num_hidden_layers * sum(shape["rank"] * (n + k) for n, k in layers)
    keys = tokens + cached if not hasattr(config, "num_key_value_heads") else cached + (tokens + 1) / 2
    keys *= _lengths(shape).double().square().mean().item() / tokens**2  # of long texts there are more
    attention = int(4 * config.num_hidden_layers * texts * tokens * keys * width)
    rows = texts * tokens
    read = int(weights * 4.127 / 8) + 4 * adapters
    read += 2 * config.num_hidden_layers * kv_width * cached * _BYTES[dtype]
    written = rows * width * _BYTES[dtype]
    forward = 2 * rows * (weights + adapters) + attention
    if mode == "forward":
        return Work(forward, read, written)
    # Backward: each layer's dx, both gradients of each adapter, twice attention's products. AdamW has two moments.
    backward = 2 * rows * (weights + 2 * adapters) + 2 * attention
    return Work(forward + backward, 2 * read + 12 * adapters, written + 12 * adapters)


def _lengths(shape: Shape) -> Tensor:
    """int64 `[texts]`, `tokens` on average."""
    if shape["longest"] == shape["tokens"]:
        return torch.full((shape["texts"],), shape["tokens"])
    lengths = torch.linspace(1, shape["longest"], shape["texts"]).round().long()
    return lengths[torch.randperm(len(lengths), generator=generator("cpu"))]


def _inputs(model: str, shape: Shape, dtype: str, device: str) -> Inputs:
    random = generator("cpu")
    with tempfile.TemporaryDirectory() as folder:
        if model == "minilm":
            source = resolve_source(None)[1]
        else:
            source = folder
            torch.manual_seed(0)
            with quiet_transformers():
                dense = require("transformers").AutoModel.from_config(_config(model), dtype=torch_dtype(dtype))
                dense.save_pretrained(folder)
            del dense
        base = load_model(
            source, load_config(source), quantize="nf4", dtype=torch_dtype(dtype), device=torch.device(device)
        )
    base.name_or_path = ""  # that folder is gone
    base.requires_grad_(False).eval()
    rows = shape["texts"], shape["cached"] + shape["longest"]
    ids = torch.randint(0, base.config.vocab_size, rows, generator=random).to(device)
    ids[:, : shape["cached"]] = ids[:1, : shape["cached"]]
    grad = torch.randn(shape["texts"], shape["tokens"], shape["width"], generator=random).to(device)
    found = {"base": base, "ids": ids, "cached": shape["cached"], "rank": shape["rank"], "grad": grad}
    return found | {"lengths": _lengths(shape)}


def _adapted(base: Model, rank: int) -> Model:
    if not rank:
        return base
    return lora_module.attach(base, lora_module.LoRAConfig(r=rank, init="random"))


def _stock(given: Inputs) -> Model:
    """bitsandbytes and peft as they come, but that weights are never repacked."""
    base = copy.deepcopy(given["base"])
    keep_unpacked(base)
    return _adapted(base, given["rank"])


def _repacked(given: Inputs) -> Model:
    """As they come: on a processor with AVX512-BF16 the first forward in eval mode repacks the weights."""
    from bitsandbytes import functional

    if not functional.has_avx512bf16():
        raise RuntimeError("this CPU has no AVX-512 BF16")
    return _adapted(copy.deepcopy(given["base"]), given["rank"])


def _swapped(given: Inputs) -> Model:
    model = _stock(given)
    swap_kernels(model)
    return model


def _swapped_attention(given: Inputs) -> Model:
    model = _stock(given)
    swap_kernels(model, attention=True)
    return model


def _dense(given: Inputs) -> Model:
    """Decoded weights in the dtype of the arithmetic, and the very adapters of the others."""
    base = copy.deepcopy(given["base"])
    for name, layer in quantized_linears(base).items():
        linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        linear.weight = nn.Parameter(dequantized(layer).to(layer.compute_dtype), requires_grad=False)
        linear.bias = layer.bias
        base.set_submodule(name, linear)
    model = _adapted(base, given["rank"])
    if given["rank"]:
        lora_module.set_adapter_state(model, lora_module.adapter_state(_stock(given)))
    return model


def _run(make: Callable[[Inputs], Model], given: Inputs, mode: str) -> Callable[[], list[Tensor]]:
    return _call(make(given), given, mode)


def _call(model: Model, given: Inputs, mode: str) -> Callable[[], list[Tensor]]:
    """The last hidden states, or the gradients of the adapters."""
    if mode == "step":
        return _step(model.train(), given)
    ids, cached, lengths = given["ids"], given["cached"], given["lengths"]
    if int(lengths.min()) < ids.shape[1] - cached:
        return _ragged(model, ids[torch.arange(ids.shape[1]) < lengths.unsqueeze(1)], offsets_of(lengths.tolist()))
    if not cached:
        return _inference(lambda: model(input_ids=ids, **without_cache(model))[0])
    if len(ids) == 1:
        return _next_token(model, ids, cached)
    if model.config._attn_implementation == KERNELS:
        return _behind_a_prefix(model, ids, cached)
    return _with_repeated_cache(model, ids, cached)


def _inference(function: Callable[[], Tensor]) -> Callable[[], list[Tensor]]:
    def call() -> list[Tensor]:
        with torch.no_grad():
            return [function()]

    return call


def _ragged(model: Model, ids: Tensor, offsets: Tensor) -> Callable[[], list[Tensor]]:
    if model.config._attn_implementation == KERNELS:
        return _inference(lambda: packed_forward(model, offsets, input_ids=ids))
    texts = ids.split(offsets.diff().tolist())
    plans = [_padded(model, texts, budget) for budget in (1024, 4096)]
    return min(plans, key=lambda call: min(timeit.repeat(call, number=1, repeat=2)))


def _padded(model: Model, texts: tuple[Tensor, ...], budget: int) -> Callable[[], list[Tensor]]:
    """In batches of up to `budget` tokens, padding included; the plan is not timed."""
    plan = plan_batches([len(text) for text in texts], budget, "padded")
    batches = [(offsets_of([len(texts[i]) for i in batch]), torch.cat([texts[i] for i in batch])) for batch in plan]
    rows = torch.arange(len(torch.cat(texts))).split([len(text) for text in texts])
    back = torch.argsort(torch.cat([rows[i] for batch in plan for i in batch]))

    def forward() -> Tensor:
        return torch.cat([padded_forward(model, offsets, input_ids=ids) for offsets, ids in batches])[back]

    return _inference(forward)


def _cache_of(model: Model, ids: Tensor) -> Any:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=True).past_key_values


def _next_token(model: Model, ids: Tensor, cached: int) -> Callable[[], list[Tensor]]:
    cache = _cache_of(model, ids[:, :cached])

    def forward() -> Tensor:
        out: Tensor = model(input_ids=ids[:, cached:], past_key_values=cache, use_cache=True)[0]
        cache.crop(cached - ids.shape[1])  # a negative number: so many tokens less
        return out

    return _inference(forward)


def _with_repeated_cache(model: Model, ids: Tensor, cached: int) -> Callable[[], list[Tensor]]:
    once = _cache_of(model, ids[:1, :cached])

    def forward() -> Tensor:
        cache = require("transformers").DynamicCache(config=model.config)
        for layer, kept in enumerate(once.layers):  # a view for each text; what comes behind it makes the copies
            cache.update(*(x.expand(len(ids), -1, -1, -1) for x in (kept.keys, kept.values)), layer)
        return model(input_ids=ids[:, cached:], past_key_values=cache, use_cache=True)[0]  # type: ignore[no-any-return]

    return _inference(forward)


def _behind_a_prefix(model: Model, ids: Tensor, cached: int) -> Callable[[], list[Tensor]]:
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    with torch.no_grad():
        packed_forward(model, torch.tensor([0, cached]), input_ids=ids[0, :cached], kept=kept)
    prefix = Prefix(kept, torch.tensor([0, cached], device=ids.device))
    own = ids[:, cached:]
    offsets, counts = torch.arange(len(ids) + 1) * own.shape[1], torch.tensor([len(ids)])
    return _inference(
        lambda: packed_forward(model, offsets, input_ids=own.flatten(), prefix=prefix, counts=counts).view(
            *own.shape, -1
        )
    )


def _step(model: Model, given: Inputs) -> Callable[[], list[Tensor]]:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # or no two providers would compute the same
    leaves = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(leaves, lr=0.0)  # all of its work, and the next call finds the same adapters

    def step() -> list[Tensor]:
        optimizer.zero_grad()
        hidden = model(input_ids=given["ids"])[0]
        hidden.backward(given["grad"].to(hidden.dtype))
        optimizer.step()
        return [p.grad for p in leaves if p.grad is not None]

    return step


def _oracle(given: Inputs, mode: str) -> list[Tensor]:
    wide = given | {"grad": given["grad"].double()}
    return _joined(given, _call(_dense(given).double(), wide, mode)())


def _joined(given: Inputs, result: list[Tensor]) -> list[Tensor]:
    """All gradients as one vector: by themselves those of some layers (of keys) are hardly more than what cancels."""
    return [torch.cat([tensor.flatten() for tensor in result])]
