"""Every op's schema and fake (shape, dtype and device of its results), on one page.

The raw ops are private: names start with an underscore and arguments are flat, so that one schema serves the C++,
Triton and reference providers. The public functions of each op's folder validate, choose the path and call them.
Every result is contiguous, whatever the strides of the inputs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _namespace() -> torch.library.Library:
    """The ops' namespace, which torch lets one copy of this package define."""
    try:
        return torch.library.Library("mmrec", "DEF")
    except RuntimeError as error:
        others = (m for name, m in sys.modules.items() if name.endswith("mmrec_kernels.schemas") and name != __name__)
        where = getattr(next(others, None), "__file__", "another extension")
        raise ImportError(
            f"a process holds one copy of mmrec_kernels, and {where} has defined its ops: import this one first, and a"
            " kernel of the same version that is loaded later takes its place"
        ) from error


_LIBRARY = _namespace()


def _define(signature: str) -> Callable[[Callable[..., Any]], Any]:
    """Define `mmrec::signature`, register the decorated function as its fake, and return the op's handle."""

    def register(fake: Callable[..., Any]) -> Any:
        name = signature.split("(", 1)[0]
        _LIBRARY.define(signature, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"mmrec::{name}", fake, lib=_LIBRARY)
        return getattr(torch.ops.mmrec, name).default

    return register


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of scores, losses, log-sum-exps and weights for inputs of `dtype`: float64 stays, all else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def terms_dtype(device: torch.device) -> torch.dtype:
    """dtype of log-sum-exps and of what they are compared with: float64 (float32 on mps, which has none).

    A float32 log-sum-exp of 100 is off by up to 4e-6, and so would every probability be.
    """
    return torch.float32 if device.type == "mps" else torch.float64


# ---- build ----------------------------------------------------------------------------------------------------------

ISA_NAMES = ("base", "avx2", "avx512", "avx512_bf16")


@_define("_cpu_isa(Tensor any) -> int")
def cpu_isa(any: Tensor) -> int:
    return 0


@_define("_multiply(Tensor any, int loops, bool pairs) -> int")
def multiply(any: Tensor, loops: int, pairs: bool) -> int:
    """Multiply-adds in registers, in float32 or bfloat16 pairs, on every thread: the flops done."""
    return 0


# ---- retrieval -------------------------------------------------------------------------------------------------------


_TOPK_SIGNATURE = (
    "(Tensor query, Tensor items, SymInt k, Tensor? item_scales, Tensor? bias, Tensor? exclude_offsets,"
    " Tensor? exclude_ids, Tensor? candidate_offsets, Tensor? candidate_ids, bool quantize_query) -> (Tensor, Tensor)"
)


def _topk_fake(
    query: Tensor,
    items: Tensor,
    k: int,
    item_scales: Tensor | None,
    bias: Tensor | None,
    exclude_offsets: Tensor | None,
    exclude_ids: Tensor | None,
    candidate_offsets: Tensor | None,
    candidate_ids: Tensor | None,
    quantize_query: bool,
) -> tuple[Tensor, Tensor]:
    shape = (query.shape[0], k)
    scores = query.new_empty(shape, dtype=statistics_dtype(query.dtype))
    return scores, query.new_empty(shape, dtype=torch.int64)


retrieval_topk = _define("_retrieval_topk" + _TOPK_SIGNATURE)(_topk_fake)
# CUDA C++ for few queries: the same op by another kernel, for the benchmark until a GPU run shows where it is faster.
retrieval_topk_stream = _define("_retrieval_topk_stream" + _TOPK_SIGNATURE)(_topk_fake)


# ---- infonce ---------------------------------------------------------------------------------------------------------

_INFONCE_PROBLEM = (
    "Tensor query, Tensor key, Tensor scale, Tensor? target, Tensor? query_mask, Tensor? key_mask,"
    " Tensor? query_ids, Tensor? key_ids, Tensor? exclude_offsets, Tensor? exclude_positions, Tensor? log_q,"
    " bool symmetric, bool normalize, bool positives_elsewhere"
)


INFONCE_TILE = (96, 192)  # queries and keys of a tile of logits
_INFONCE_COLUMNS = 32  # a row's exponentials are padded to a multiple of this


def infonce_saved_bytes(rows: int, columns: int, dtype: torch.dtype, workspace_bytes: int) -> int:
    """Bytes that an InfoNCE forward keeps for the backward; 0 if the exponentials would exceed the workspace.

    One exponential per pair in the dtype of the inputs, one reference per row and tile of keys, and one mark per tile.
    """
    padded = (columns + _INFONCE_COLUMNS - 1) // _INFONCE_COLUMNS * _INFONCE_COLUMNS
    row_tiles, column_tiles = ((n + t - 1) // t for n, t in zip((rows, columns), INFONCE_TILE, strict=True))
    size = rows * padded * dtype.itemsize
    marks = (rows + row_tiles) * column_tiles * statistics_dtype(dtype).itemsize
    return size + marks if size <= workspace_bytes else 0


@_define(
    f"_infonce_forward({_INFONCE_PROBLEM}, Tensor? rank_reference, bool need_total, bool need_rank, bool save,"
    " SymInt workspace_bytes) -> (Tensor positive, Tensor row_lse, Tensor column_lse, Tensor total, Tensor kept,"
    " Tensor rank, Tensor reference, Tensor saved)"
)
def infonce_forward(
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    target: Tensor | None,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    exclude_offsets: Tensor | None,
    exclude_positions: Tensor | None,
    log_q: Tensor | None,
    symmetric: bool,
    normalize: bool,
    positives_elsewhere: bool,
    rank_reference: Tensor | None,
    need_total: bool,
    need_rank: bool,
    save: bool,
    workspace_bytes: int,
) -> tuple[Tensor, ...]:
    """positive, row_lse, total, kept, rank, reference `[Nq]`, column_lse `[Nk]` (`[0]` if not asked for), saved.

    With `positives_elsewhere` no key here is a positive, and every row that is read has a term: what it sums here is a
    part of it. Ranks then count against `rank_reference`, the `reference` of the rows' forward over their positives:
    each positive's logit as the kernel's own products make it, in the kernel's own units.
    """
    rows, columns = query.shape[0], key.shape[0]
    dtype = terms_dtype(query.device)
    saved_bytes = infonce_saved_bytes(rows, columns, query.dtype, workspace_bytes) if save else 0
    return (
        query.new_empty(rows, dtype=dtype),
        query.new_empty(rows, dtype=dtype),
        query.new_empty(columns if symmetric else 0, dtype=dtype),
        query.new_empty(rows if need_total else 0, dtype=dtype),
        query.new_empty(rows if need_total else 0, dtype=torch.int64),
        query.new_empty(rows if need_rank else 0, dtype=torch.int64),
        query.new_empty(rows if need_rank else 0, dtype=statistics_dtype(query.dtype)),
        query.new_empty(saved_bytes, dtype=torch.uint8),
    )


@_define(
    "_infonce_backward(Tensor? grad_positive, Tensor? grad_row_lse, Tensor? grad_column_lse, Tensor? grad_total,"
    f" {_INFONCE_PROBLEM}, Tensor row_lse, Tensor column_lse, Tensor saved, bool need_query, bool need_key,"
    " bool need_scale, bool need_log_q, SymInt workspace_bytes)"
    " -> (Tensor grad_query, Tensor grad_key, Tensor grad_scale, Tensor grad_log_q)"
)
def infonce_backward(
    grad_positive: Tensor | None,
    grad_row_lse: Tensor | None,
    grad_column_lse: Tensor | None,
    grad_total: Tensor | None,
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    target: Tensor | None,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    exclude_offsets: Tensor | None,
    exclude_positions: Tensor | None,
    log_q: Tensor | None,
    symmetric: bool,
    normalize: bool,
    positives_elsewhere: bool,
    row_lse: Tensor,
    column_lse: Tensor,
    saved: Tensor,
    need_query: bool,
    need_key: bool,
    need_scale: bool,
    need_log_q: bool,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = statistics_dtype(query.dtype)
    return (
        query.new_empty(query.shape if need_query else (0,)),
        key.new_empty(key.shape if need_key else (0,)),
        query.new_empty(scale.shape if need_scale else (0,), dtype=dtype),
        query.new_empty(key.shape[:1] if need_log_q else (0,), dtype=dtype),
    )


# ---- nf4 -------------------------------------------------------------------------------------------------------------
# The weight of the three ops is packed [ceil(N·K/2)] uint8 and the absmax of its blocks: float32, or uint8 with the
# three nested tensors. x is [M, K], adapters are stacks [A, r, K] and [A, N, r], adapter_ids is int64 [M]; all of them
# are contiguous. scalings [A], where given, replaces scaling. lora_x, the forward's second result, is x aᵀ [M, r] with
# the a of each row's adapter.


_NF4_FORWARD = (
    "(Tensor x, Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_code, Tensor? offset,"
    " SymInt out_features, int blocksize, Tensor? bias, Tensor? lora_a, Tensor? lora_b, float scaling,"
    " Tensor? scalings, Tensor? adapter_ids, bool save_lora_x) -> (Tensor, Tensor)"
)


def _nf4_forward_fake(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    out_features: int,
    blocksize: int,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    scalings: Tensor | None,
    adapter_ids: Tensor | None,
    save_lora_x: bool,
) -> tuple[Tensor, Tensor]:
    saved = (x.shape[0], lora_a.shape[1]) if save_lora_x and lora_a is not None else (0,)
    return x.new_empty((x.shape[0], out_features)), x.new_empty(saved, dtype=statistics_dtype(x.dtype))


nf4_forward = _define("_nf4_forward" + _NF4_FORWARD)(_nf4_forward_fake)
# CUDA C++ for up to 64 tokens: the same op by another kernel, for the benchmark until a GPU run shows it faster. It has
# no MMREC_CHECK and wants aligned inputs: who lets it serve checks ids, and passes on what it refuses.
nf4_forward_small = _define("_nf4_forward_small" + _NF4_FORWARD)(_nf4_forward_fake)


@_define(
    "_nf4_backward(Tensor dy, Tensor? x, Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_code,"
    " Tensor? offset, SymInt in_features, int blocksize, Tensor? lora_a, Tensor? lora_b, float scaling,"
    " Tensor? scalings, Tensor? adapter_ids, Tensor? lora_x, bool need_x, bool need_a, bool need_b, bool need_bias)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
def nf4_backward(
    dy: Tensor,
    x: Tensor | None,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    in_features: int,
    blocksize: int,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    scalings: Tensor | None,
    adapter_ids: Tensor | None,
    lora_x: Tensor | None,
    need_x: bool,
    need_a: bool,
    need_b: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx = dy.new_empty((dy.shape[0], in_features) if need_x else (0,))
    da, db = (
        dy.new_empty((0,)) if t is None else t.new_empty(t.shape if need else (0,))
        for t, need in ((lora_a, need_a), (lora_b, need_b))
    )
    dbias = dy.new_empty((dy.shape[1],) if need_bias else (0,), dtype=statistics_dtype(dy.dtype))
    return dx, da, db, dbias


@_define(
    "_nf4_dequantize(Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_code, Tensor? offset,"
    " SymInt out_features, SymInt in_features, int blocksize, str dtype) -> Tensor"
)
def nf4_dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    out_features: int,
    in_features: int,
    blocksize: int,
    dtype: str,
) -> Tensor:
    return packed.new_empty((out_features, in_features), dtype=getattr(torch, dtype))


# ---- routing ---------------------------------------------------------------------------------------------------------


_ROUTING_INPUTS = (
    "Tensor x, Tensor gate_weight, Tensor? modality, Tensor? allowed, Tensor? bias, Tensor? valid,"
    " SymInt k, SymInt num_modalities, str score, bool renormalize"
)


@_define(f"_routing_forward({_ROUTING_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)")
def routing_forward(
    x: Tensor,
    gate_weight: Tensor,
    modality: Tensor | None,
    allowed: Tensor | None,
    bias: Tensor | None,
    valid: Tensor | None,
    k: int,
    num_modalities: int,
    score: str,
    renormalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """weights [T, k], experts i32 [T, k], stats [M, E, 3], losses [4, M] in the order of `RouterLosses`."""
    dtype, shape = statistics_dtype(x.dtype), (x.shape[0], k)
    return (
        x.new_empty(shape, dtype=dtype),
        x.new_empty(shape, dtype=torch.int32),
        x.new_empty((num_modalities, gate_weight.shape[0], 3), dtype=dtype),
        x.new_empty((4, num_modalities), dtype=dtype),
    )


# CUDA C++ for few tokens: the same op in one launch, and the experts' plan; for the benchmark until a GPU run shows it
# faster.
@_define(f"_routing_forward_small({_ROUTING_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
def routing_forward_small(*arguments: Any) -> tuple[Tensor, ...]:
    """What `_routing_forward` gives, and of the (expert, token) pairs, by expert, then by token, int64: where each
    expert's begin [E + 1], their tokens [T·k], the rest of which is not written, and the pair of each slot [T, k], −1
    without."""
    weights, *_ = found = routing_forward(*arguments)
    experts = arguments[1].shape[0]
    sizes = (experts + 1, weights.shape[0] * weights.shape[1], weights.shape)
    return (*found, *(weights.new_empty(size, dtype=torch.int64) for size in sizes))


@_define(
    "_routing_backward(Tensor? grad_weights, Tensor? grad_losses, Tensor x, Tensor gate_weight, Tensor? modality,"
    " Tensor? allowed, Tensor? valid, Tensor weights, Tensor experts, Tensor stats, str score, bool renormalize,"
    " bool need_x, bool need_gate_weight) -> (Tensor, Tensor)"
)
def routing_backward(
    grad_weights: Tensor | None,
    grad_losses: Tensor | None,
    x: Tensor,
    gate_weight: Tensor,
    modality: Tensor | None,
    allowed: Tensor | None,
    valid: Tensor | None,
    weights: Tensor,
    experts: Tensor,
    stats: Tensor,
    score: str,
    renormalize: bool,
    need_x: bool,
    need_gate_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and gate_weight, [0] where not needed. Nothing of size T·E is kept: the logits are recomputed."""
    return x.new_empty(x.shape if need_x else 0), gate_weight.new_empty(gate_weight.shape if need_gate_weight else 0)


@_define(
    "_experts_forward(Tensor x, Tensor weights, Tensor experts, Tensor w_in, Tensor w_out, Tensor? b_in, Tensor? b_out,"
    " Tensor? shared_w_in, Tensor? shared_w_out, Tensor? shared_gate, str activation, bool save_hidden)"
    " -> (Tensor, Tensor, Tensor)"
)
def experts_forward(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    shared_w_in: Tensor | None,
    shared_w_out: Tensor | None,
    shared_gate: Tensor | None,
    activation: str,
    save_hidden: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [G, T, d] for weights and experts [G, T, k]; with `save_hidden` pre-activations in x's dtype too, else [0].

    hidden [T·min(G·k, E), w_in.shape[1]]: one row for each distinct (expert, token) that a slot names, in that order;
    the rows after them are never read. shared_hidden [T, shared_w_in.shape[0]]: in token order, tokens without a slot
    never read. One provider's forward writes them and another's backward may read them.
    """
    gates, tokens, k = weights.shape
    hidden = (tokens * torch.sym_min(gates * k, w_in.shape[0]), w_in.shape[1])
    shared = (tokens, shared_w_in.shape[0]) if shared_w_in is not None else None
    return (
        x.new_empty((gates, *x.shape)),
        x.new_empty(hidden if save_hidden else 0),
        x.new_empty(shared if save_hidden and shared is not None else 0),
    )


@_define(
    "_experts_backward(Tensor grad_out, Tensor x, Tensor weights, Tensor experts, Tensor w_in, Tensor w_out,"
    " Tensor? b_in, Tensor? b_out, Tensor? shared_w_in, Tensor? shared_w_out, Tensor? shared_gate, Tensor? hidden,"
    " Tensor? shared_hidden, str activation, int needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def experts_backward(
    grad_out: Tensor,
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    shared_w_in: Tensor | None,
    shared_w_out: Tensor | None,
    shared_gate: Tensor | None,
    hidden: Tensor | None,
    shared_hidden: Tensor | None,
    activation: str,
    needs: int,
) -> tuple[Tensor, ...]:
    """Gradients of x, weights, w_in, w_out, b_in, b_out, shared_w_in, shared_w_out, shared_gate.

    Bit i of `needs` asks for the i-th of them; the others are [0]. hidden and shared_hidden are what the forward saved;
    None means recompute.
    """
    inputs = (x, weights, w_in, w_out, b_in, b_out, shared_w_in, shared_w_out, shared_gate)
    return tuple(
        x.new_empty(0) if value is None or not needs >> i & 1 else value.new_empty(value.shape)
        for i, value in enumerate(inputs)
    )


# ---- attention -------------------------------------------------------------------------------------------------------

ATTENTION_NEEDS = ("query", "log_bias", "value_gate", "sink", "query_norm", "key_norm")

_ATTENTION_INPUTS = (
    "Tensor query, Tensor[] keys, Tensor[] values, Tensor offsets, Tensor[] index, Tensor? query_offsets,"
    " Tensor? log_bias, Tensor? value_gate, Tensor? sink, Tensor? query_norm, Tensor? key_norm, float scale,"
    " float norm_eps, int indexed, int causal"
)


_ATTENTION_FORWARD = f"({_ATTENTION_INPUTS}, bool return_mass) -> (Tensor, Tensor, Tensor)"


def _attention_forward_fake(
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    offsets: Tensor,
    index: list[Tensor],
    query_offsets: Tensor | None,
    log_bias: Tensor | None,
    value_gate: Tensor | None,
    sink: Tensor | None,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    scale: float,
    norm_eps: float,
    indexed: int,
    causal: int,
    return_mass: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`offsets [M, B+1]` int64; bit m of `indexed` and `causal` speaks of segment m, and `index` holds one int64 list
    per set bit of `indexed`; `log_bias` and `value_gate` have three axes. Results: out, lse, mass (`[0]` unasked)."""
    rows = query.shape[0] if query_offsets is not None else query.shape[0] * (offsets.shape[1] - 1)
    heads, dtype = query.shape[1], statistics_dtype(query.dtype)
    mass_shape = (rows, heads, len(keys)) if return_mass else (0,)
    return (
        query.new_empty((rows, heads, values[0].shape[2])),
        query.new_empty((rows, heads), dtype=terms_dtype(query.device)),
        query.new_empty(mass_shape, dtype=dtype),
    )


attention_forward = _define("_attention_forward" + _ATTENTION_FORWARD)(_attention_forward_fake)
# CUDA C++ for tiny sequences: the same op by another kernel, for the benchmark until a GPU run shows it faster.
attention_forward_warp = _define("_attention_forward_warp" + _ATTENTION_FORWARD)(_attention_forward_fake)


@_define(
    "_attention_backward(Tensor? grad_out, Tensor? grad_lse, Tensor? grad_mass, Tensor out, Tensor lse, Tensor mass,"
    f" {_ATTENTION_INPUTS}, int needs, int key_needs, int value_needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def attention_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    grad_mass: Tensor | None,
    out: Tensor,
    lse: Tensor,
    mass: Tensor,
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    offsets: Tensor,
    index: list[Tensor],
    query_offsets: Tensor | None,
    log_bias: Tensor | None,
    value_gate: Tensor | None,
    sink: Tensor | None,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    scale: float,
    norm_eps: float,
    indexed: int,
    causal: int,
    needs: int,
    key_needs: int,
    value_needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, keys, values, log_bias, value_gate, sink, query_norm and key_norm, each in its input's dtype;
    those of keys and values are one tensor, the rows of the segments whose bit of `key_needs` or `value_needs` is set,
    one after the other. `needs` has one bit per name of `ATTENTION_NEEDS`. What nobody needs is `[0]`."""

    def like(bit: int, x: Tensor | None) -> Tensor:
        return query.new_empty(0) if x is None or not needs >> bit & 1 else x.new_empty(x.shape)

    def packed(bits: int, tensors: list[Tensor]) -> Tensor:
        needed = [x for m, x in enumerate(tensors) if bits >> m & 1]
        return query.new_empty((sum(x.shape[0] for x in needed), *tensors[0].shape[1:]) if needed else (0,))

    return (
        like(0, query), packed(key_needs, keys), packed(value_needs, values), like(1, log_bias), like(2, value_gate),
        like(3, sink), like(4, query_norm), like(5, key_norm),
    )  # fmt: skip
