"""The NF4 linear on GPU: the launchers of forward, backward and decoding."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ...schemas import statistics_dtype
from ...triton_common import FUSED, interpreted, next_power_of_two, product_flags, type_of
from .. import reference
from . import decode, kernels

# Programs that a product is split into along its depth where its tiles are fewer.
_PROGRAMS = 256
_FLAT = 1024
# Of the launch whose product is rounded before it is added to: no FMA.
APART = {"enable_fp_fusion": False}


def block_sizes(kernel: str, tokens: int, dtype: torch.dtype) -> dict[str, int]:
    """Sizes of the tiles of a kernel, by shapes and dtype alone. Chosen not to spill, measured on no GPU."""
    wide = dtype in (torch.float32, torch.float64)
    m = min(max(next_power_of_two(tokens), 16), 32 if wide else 64)
    if kernel == "low_rank":
        return {"BLOCK_M": min(m, 16 if wide else 32), "BLOCK_C": 32 if wide else 64, "num_warps": 4, "num_stages": 3}
    if kernel == "adapter_gradient":
        return {"BLOCK_M": min(m, 32), "BLOCK_C": 64, "num_warps": 4, "num_stages": 2}
    o, c = (32, 32) if wide else (64 if m < 64 else 128, 64)
    return {"BLOCK_M": m, "BLOCK_O": o, "BLOCK_C": c, "num_warps": 8 if o == 128 else 4, "num_stages": 3}


def launch_sizes(kernel: str, tokens: int, rank: int, dtype: torch.dtype) -> dict[str, int]:
    sizes = block_sizes(kernel, tokens, dtype)
    if interpreted():  # tiles small enough that small tests have several
        sizes |= {name: 16 if name == "BLOCK_M" else 32 for name in sizes if name.startswith("BLOCK")}
    most = 64 if kernel == "adapter_gradient" and not interpreted() else 16
    return {**sizes, "BLOCK_R": min(max(next_power_of_two(rank), 16), most), **FUSED}


def split(extent: int, programs: int, step: int) -> tuple[int, int]:
    """How many programs share `extent` where there are `programs` tiles of the rest, and the part of each, of whole
    steps."""
    steps = triton.cdiv(extent, step)
    splits = 2 if interpreted() else max(_PROGRAMS // programs, 1)
    each = triton.cdiv(steps, max(min(splits, steps if interpreted() else steps // 4), 1))
    return triton.cdiv(steps, each), each * step


def group_of(columns: int, blocksize: int, most: int) -> int:
    """The largest power of two, `most` at the most, such that groups of so many columns share a block in every row."""
    return min(columns & -columns, blocksize, most)


class _Layer:
    """The weight of a call, its adapters and the ids of the rows: what the passes share."""

    def __init__(
        self, rows: Tensor, packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_code: Tensor | None,
        offset: Tensor | None, columns: int, blocksize: int, scaling: float, scalings: Tensor | None,
        adapter_ids: Tensor | None, count: int,
    ) -> None:  # fmt: skip
        self.rows, self.packed, self.columns, self.blocksize = rows, packed, columns, blocksize
        self.absmax = (absmax, nested_absmax, nested_code, offset)
        if adapter_ids is not None:
            reference.check_adapter_ids(adapter_ids, count)
        self.ids, self.scaling = adapter_ids, scaling
        if scalings is None and rows.dtype == torch.float64:  # a kernel takes numbers as float32
            scalings = rows.new_full((count,), scaling)
        self.scalings = scalings
        self.flags = {**product_flags(rows.dtype), "LOW_PRECISION": low_precision(rows.dtype)}

    def low_rank(self, matrix: Tensor, of_b: bool) -> Tensor:
        """P [splits, M, r]: x aᵀ of `a [A, r, K]`, or dy b of `b [A, N, r]`."""
        tokens, depth = self.rows.shape
        rank = matrix.shape[2 if of_b else 1]
        sizes = launch_sizes("low_rank", tokens, rank, self.rows.dtype)
        grid = (triton.cdiv(tokens, sizes["BLOCK_M"]), triton.cdiv(rank, sizes["BLOCK_R"]))
        splits, each = split(depth, grid[0] * grid[1], sizes["BLOCK_C"])
        low = self.rows.new_empty((splits, tokens, rank), dtype=statistics_dtype(self.rows.dtype))
        kernels.low_rank_kernel[grid + (splits,)](
            self.rows, matrix, self.ids, low, tokens, depth, rank, matrix.shape[0], each, matrix.stride(0),
            *_strides(rank, depth, of_b), **self.flags, **sizes,
        )  # fmt: skip
        return low

    def product(
        self, width: int, low: Tensor | None, matrix: Tensor | None, bias: Tensor | None, saved: Tensor | None,
        forward: bool,
    ) -> Tensor:  # fmt: skip
        """out [M, width]. Of `matrix [A, N, r]` in the forward, `[A, r, K]` in the backward."""
        tokens, depth = self.rows.shape
        rank = 0 if low is None else low.shape[2]
        sizes = launch_sizes("linear", tokens, rank, self.rows.dtype)
        grid = (triton.cdiv(tokens, sizes["BLOCK_M"]), triton.cdiv(width, sizes["BLOCK_O"]))
        splits, each = split(depth, grid[0] * grid[1], sizes["BLOCK_C"])
        out = self.rows.new_empty((tokens, width))
        wide = statistics_dtype(self.rows.dtype)
        parts = out if splits == 1 else out.new_empty((splits, tokens, width), dtype=wide)
        group = group_of(self.columns, self.blocksize, sizes["BLOCK_C" if forward else "BLOCK_O"])
        count, stride = (0, 0) if matrix is None else (matrix.shape[0], matrix.stride(0))
        kernels.linear_kernel[grid + (splits,)](
            self.rows, self.packed, float_absmax(*self.absmax), low, matrix, bias, self.ids, self.scalings, saved,
            parts, tokens, depth, width, self.columns, rank, count, 1 if low is None else low.shape[0], each, stride,
            *_strides(rank, width, forward), self.scaling, FORWARD=forward, GROUP=group, BLOCKSIZE=self.blocksize,
            **self.flags, **sizes,
        )  # fmt: skip
        if splits > 1:
            kernels.sum_kernel[(triton.cdiv(out.numel(), _FLAT),)](
                parts, out, out.numel(), splits, BLOCK=_FLAT, UPCAST=self.flags["UPCAST"]
            )
        return out

    def adapter_gradient(self, low: Tensor, rows: Tensor, like: Tensor, of_a: bool) -> Tensor:
        """(s P)ᵀ rows of each adapter, laid out as `like`: `[A, r, K]` of a, `[A, N, r]` of b."""
        (tokens, width), (count, rank) = rows.shape, (like.shape[0], low.shape[2])
        sizes = launch_sizes("adapter_gradient", tokens, rank, rows.dtype)
        grid = (triton.cdiv(width, sizes["BLOCK_C"]), triton.cdiv(rank, sizes["BLOCK_R"]))
        splits, each = split(tokens, grid[0] * grid[1] * count, sizes["BLOCK_M"])
        out = rows.new_empty((splits, *like.shape), dtype=statistics_dtype(rows.dtype))
        flags = {name: self.flags[name] for name in ("LOW_PRECISION", "UPCAST", "WIDE")}
        kernels.adapter_gradient_kernel[grid + (splits * count,)](
            low, rows, self.ids, self.scalings, out, tokens, width, rank, count, low.shape[0], each,
            *_strides(rank, width, not of_a), self.scaling, **flags, **sizes,
        )  # fmt: skip
        return out.sum(0).to(like.dtype)


def _strides(rank: int, width: int, of_b: bool) -> tuple[int, int]:
    """Along the rank and the width, of b `[width, rank]` or of a `[rank, width]`."""
    return (1, rank) if of_b else (width, 1)


def low_precision(dtype: torch.dtype) -> str:
    """Of the products with P, which stays in float32 beside 16-bit rows too: three tf32 products are near that."""
    return "tf32x3" if dtype in (torch.bfloat16, torch.float16) else str(product_flags(dtype)["PRECISION"])


def float_absmax(
    absmax: Tensor, nested_absmax: Tensor | None, nested_code: Tensor | None, offset: Tensor | None
) -> Tensor:
    """float32 absmax of every block."""
    if nested_absmax is None:
        return absmax
    found = absmax.new_empty(absmax.shape, dtype=torch.float32)
    decode.absmax_kernel[(triton.cdiv(absmax.numel(), _FLAT),)](
        absmax, nested_absmax, nested_code, offset, found, absmax.numel(), BLOCK=_FLAT, **APART
    )
    return found


def forward(
    x: Tensor, packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_code: Tensor | None,
    offset: Tensor | None, out_features: int, blocksize: int, bias: Tensor | None, lora_a: Tensor | None,
    lora_b: Tensor | None, scaling: float, scalings: Tensor | None, adapter_ids: Tensor | None, save_lora_x: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launcher of `_nf4_forward`."""
    if not all((*x.shape, out_features)):  # nothing is multiplied
        return reference.forward(
            x, packed, absmax, nested_absmax, nested_code, offset, out_features, blocksize, bias, lora_a, lora_b,
            scaling, scalings, adapter_ids, save_lora_x,
        )  # fmt: skip
    wide = statistics_dtype(x.dtype)
    if lora_a is not None and not lora_a.numel():  # a stack of none, or rank 0
        if adapter_ids is not None:
            reference.check_adapter_ids(adapter_ids, lora_a.shape[0])
        y, lora_x = forward(x, packed, absmax, nested_absmax, nested_code, offset, out_features, blocksize, bias, None,
                            None, 1.0, None, None, False)  # fmt: skip
        return y, x.new_zeros((x.shape[0], lora_a.shape[1]), dtype=wide) if save_lora_x else lora_x
    count = 0 if lora_a is None else lora_a.shape[0]
    layer = _Layer(x, packed, absmax, nested_absmax, nested_code, offset, x.shape[1], blocksize, scaling, scalings,
                   adapter_ids, count)  # fmt: skip
    low, saved = None, None
    if lora_a is not None:
        low = layer.low_rank(lora_a, False)
        if save_lora_x:
            saved = low[0] if low.shape[0] == 1 else low.new_empty(low.shape[1:])
    y = layer.product(out_features, low, lora_b, bias, None if low is None or low.shape[0] == 1 else saved, True)
    return y, x.new_empty(0, dtype=wide) if saved is None else saved


def backward(
    dy: Tensor, x: Tensor | None, packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None,
    nested_code: Tensor | None, offset: Tensor | None, in_features: int, blocksize: int, lora_a: Tensor | None,
    lora_b: Tensor | None, scaling: float, scalings: Tensor | None, adapter_ids: Tensor | None, lora_x: Tensor | None,
    need_x: bool, need_a: bool, need_b: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launcher of `_nf4_backward`."""
    if not all((*dy.shape, in_features)):  # nothing is multiplied
        return reference.backward(
            dy, x, packed, absmax, nested_absmax, nested_code, offset, in_features, blocksize, lora_a, lora_b, scaling,
            scalings, adapter_ids, lora_x, need_x, need_a, need_b, need_bias,
        )  # fmt: skip
    if lora_a is not None and lora_b is not None and not lora_a.numel():
        dx, _, _, dbias = backward(dy, None, packed, absmax, nested_absmax, nested_code, offset, in_features, blocksize,
                                   None, None, 1.0, None, None, None, need_x, False, False, need_bias)  # fmt: skip
        return dx, torch.empty_like(lora_a), torch.empty_like(lora_b), dbias
    count = 0 if lora_a is None else lora_a.shape[0]
    layer = _Layer(dy, packed, absmax, nested_absmax, nested_code, offset, in_features, blocksize, scaling, scalings,
                   adapter_ids, count)  # fmt: skip
    wide = statistics_dtype(dy.dtype)
    dx, dbias = dy.new_empty(0), dy.new_empty(0, dtype=wide)
    da, db = (dy.new_empty(0) if t is None else t.new_empty(0) for t in (lora_a, lora_b))
    low = None
    if lora_a is not None and lora_b is not None:
        if need_x or need_a:
            low = layer.low_rank(lora_b, True)
        if need_a:
            assert low is not None and x is not None
            da = layer.adapter_gradient(low, x, lora_a, True)
        if need_b:
            assert lora_x is not None
            db = layer.adapter_gradient(lora_x[None], dy, lora_b, False)
    if need_x:
        dx = layer.product(in_features, low, lora_a, None, None, False)
    if need_bias:
        dbias = dy.sum(0, dtype=wide)
    return dx, da, db, dbias


def dequantize(
    packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_code: Tensor | None, offset: Tensor | None,
    out_features: int, in_features: int, blocksize: int, dtype: str,
) -> Tensor:  # fmt: skip
    """Launcher of `_nf4_dequantize`."""
    out = packed.new_empty((out_features, in_features), dtype=getattr(torch, dtype))
    if out.numel() == 0:
        return out
    scales = float_absmax(absmax, nested_absmax, nested_code, offset)
    decode.dequantize_kernel[(triton.cdiv(out.numel(), _FLAT),)](
        packed, scales, out, out.numel(), BLOCK=_FLAT, BLOCKSIZE=blocksize, DTYPE=type_of(out.dtype),
        UPCAST=interpreted(), **FUSED,
    )  # fmt: skip
    return out
