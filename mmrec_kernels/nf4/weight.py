"""A 4-bit NormalFloat weight in bitsandbytes' own format.

Format (QLoRA, Dettmers et al. 2023, arXiv:2305.14314): the weight `[N, K]` is flattened row by row; byte i holds the
code index of element 2i in its high nibble and of 2i + 1 in its low one. Every `blocksize` elements of the flat weight
share one absmax. Nested ("double") quantisation stores absmax as uint8 indices into a 256-entry dynamic code with one
float32 scale per 256 of them, after subtracting their mean, the offset.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import library, schemas
from ..validation import check_choice, check_tensor
from .reference import CODES, NESTED_BLOCKSIZE

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_TENSORS = ("packed", "absmax", "nested_absmax", "nested_code", "offset")
_DTYPE_NAMES = tuple(str(d).removeprefix("torch.") for d in _DTYPES)


@dataclass(frozen=True, eq=False, repr=False)
class NF4Weight:
    """A frozen `[N, K]` weight in NF4: the bytes, and what decodes them. Made by `from_bitsandbytes` or `quantize`.

    Attributes:
        packed: `[ceil(N·K / 2)]` uint8, two codes per byte, the high nibble first.
        absmax: one per block of `blocksize` elements of the flat weight: float32, or uint8 where nested.
        shape: `(N, K)`: out_features, in_features.
        blocksize: 32, 64, … or 4096.
        dtype: of the weight before it was quantised; the default of `dequantize`.
        nested_absmax: `[ceil(blocks / 256)]` float32, or None where absmax is float32. The next two go with it.
        nested_code: `[256]` float32, the dynamic code of the nested indices.
        offset: 0-d float32, added to each decoded absmax.

    `copy.deepcopy` and `pickle` copy the bytes; nothing else does.

    Raises:
        TypeError, ValueError: an attribute of a wrong dtype, shape or device, or not contiguous.
    """

    packed: Tensor
    absmax: Tensor
    shape: tuple[int, int]
    blocksize: int
    dtype: torch.dtype
    nested_absmax: Tensor | None = None
    nested_code: Tensor | None = None
    offset: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.blocksize, int) or self.blocksize not in BLOCKSIZES:
            raise ValueError(f"blocksize must be one of {', '.join(map(str, BLOCKSIZES))}, got {self.blocksize!r}")
        pair = isinstance(self.shape, tuple | list) and len(self.shape) == 2
        if not pair or any(not isinstance(n, int | torch.SymInt) or n < 0 for n in self.shape):
            raise ValueError(f"shape must be (N, K), two ints of at least 0, got {self.shape!r}")
        numel = math.prod(self.shape)
        blocks = -(-numel // self.blocksize)
        check_tensor("packed", self.packed, (-(-numel // 2),), (torch.uint8,))
        device = self.packed.device
        parts = (self.nested_absmax, self.nested_code, self.offset)
        if any((p is None) != (self.nested_absmax is None) for p in parts):
            raise ValueError("nested_absmax, nested_code and offset must be given together or not at all")
        check_tensor("absmax", self.absmax, (blocks,), (torch.uint8 if self.nested else torch.float32,), device=device)
        if self.nested:
            nested_shape = (-(-blocks // NESTED_BLOCKSIZE),)
            check_tensor("nested_absmax", self.nested_absmax, nested_shape, (torch.float32,), device=device)
            check_tensor("nested_code", self.nested_code, (256,), (torch.float32,), device=device)
            check_tensor("offset", self.offset, (), (torch.float32,), device=device)
        for name, tensor in zip(_TENSORS, self.tensors(), strict=True):
            if tensor is not None and not tensor.is_contiguous():
                raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")

    @property
    def nested(self) -> bool:
        """Whether absmax is itself quantised."""
        return self.nested_absmax is not None

    @property
    def device(self) -> torch.device:
        """Where the bytes are."""
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of the codes, the absmax and what decodes it."""
        return sum(t.nbytes for t in self.tensors() if t is not None)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """packed, absmax, nested_absmax, nested_code, offset: as the raw ops take them."""
        return self.packed, self.absmax, self.nested_absmax, self.nested_code, self.offset

    def __repr__(self) -> str:
        n, k = self.shape
        return (
            f"NF4Weight(out_features={n}, in_features={k}, blocksize={self.blocksize}, nested={self.nested}, "
            f"dtype={self.dtype}, device={self.device})"
        )

    @classmethod
    def from_bitsandbytes(cls, param: Tensor) -> NF4Weight:
        """A view of a quantised `bitsandbytes.nn.Params4bit` (`layer.weight`): its bytes are shared, never copied.

        bitsandbytes itself is not imported: `param.quant_state` is read by its attributes. Any `quant_storage` works.
        The shape is that of the quant state, also where the bytes are handed over transposed. A 0-d offset that was
        loaded in another dtype is widened to float32, as bitsandbytes' own sum does. Where the layer's bytes are
        replaced later (`.to()`, a merge, deepcopy of the model), make the view again.

        Raises:
            TypeError: not a tensor.
            ValueError: not quantised yet, not NF4, not a matrix, nested with blocks other than 256; or repacked by
                bitsandbytes' CPU inference path, which rounds absmax to bfloat16 and re-tiles the bytes in place.
        """
        if not isinstance(param, Tensor):
            raise TypeError(f"param must be a bitsandbytes Params4bit (layer.weight), got {type(param).__name__}")
        state = getattr(param, "quant_state", None)
        if state is None:
            raise ValueError("param must be quantised, got one without quant_state: move the layer to its device first")
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                "param must be in bitsandbytes' stored format, got one that its CPU inference path has repacked in "
                "place (quant_state.packing_format_for_cpu), which rounds absmax to bfloat16: reload the layer and set "
                "layer.support_avx512bf16_for_cpu = False before its first forward in eval mode"
            )
        if state.quant_type != "nf4":
            raise ValueError(f"param must have quant_type 'nf4', got {state.quant_type!r}")
        if len(state.shape) != 2:
            raise ValueError(f"param must be a weight of shape [N, K], got {list(state.shape)}")
        nested: dict[str, Tensor] = {}
        if state.state2 is not None:
            if state.state2.blocksize != NESTED_BLOCKSIZE:
                raise ValueError(f"param must have nested blocks of {NESTED_BLOCKSIZE}, got {state.state2.blocksize}")
            nested = {
                "nested_absmax": _plain(state.state2.absmax),
                "nested_code": _plain(state.state2.code),
                "offset": _plain(state.offset).to(torch.float32),
            }
        if not param.is_contiguous():
            raise ValueError(f"param must be contiguous, got strides {param.stride()}")
        packed = _plain(param).view(-1).view(torch.uint8)
        n, k = state.shape
        return cls(packed, _plain(state.absmax), (int(n), int(k)), state.blocksize, state.dtype, **nested)

    @classmethod
    def quantize(cls, tensor: Tensor, blocksize: int = 64, nested: bool = True) -> NF4Weight:
        """`tensor [N, K]` (float32, bfloat16, float16; float64 is rounded to float32 first) in bitsandbytes' format.

        Each element goes to the code nearest to `element / absmax of its block`, ties to the lower one. A block of
        zeros decodes to zeros.

        Raises:
            TypeError, ValueError: a wrong dtype, shape, blocksize, or an element that is not finite.
        """
        check_tensor("tensor", tensor, ("N", "K"), _DTYPES)
        if blocksize not in BLOCKSIZES:
            raise ValueError(f"blocksize must be one of {', '.join(map(str, BLOCKSIZES))}, got {blocksize!r}")
        shape, dtype = (tensor.shape[0], tensor.shape[1]), tensor.dtype
        flat = tensor.detach().reshape(-1).to(torch.float32)
        index, absmax = _quantize_blocks(flat, torch.tensor(CODES, device=flat.device), blocksize)
        if not bool(absmax.isfinite().all()):
            raise ValueError("tensor must be finite, got an infinity or a NaN")
        index = index[: flat.numel() + flat.numel() % 2]
        packed = (index[::2] << 4) | index[1::2]
        if not nested:
            return cls(packed, absmax, shape, blocksize, dtype)
        offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
        code = dynamic_code().to(flat.device)
        nested_index, nested_absmax = _quantize_blocks(absmax - offset, code, NESTED_BLOCKSIZE)
        nested_index = nested_index[: absmax.numel()].clone()
        return cls(packed, nested_index, shape, blocksize, dtype, nested_absmax, code, offset)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """W `[N, K]` in `dtype` (default: `self.dtype`): float32 code · absmax, rounded once to nearest even.

        Bit-equal to `bitsandbytes.functional.dequantize_4bit` where that follows its own format: the AVX-512 decode of
        0.50.2 does not where K is a multiple of 32 but not of the block size. float64 widens the float32 value.
        """
        name = str(self.dtype if dtype is None else dtype).removeprefix("torch.")
        check_choice("dtype", name, _DTYPE_NAMES)
        return library.call(schemas.nf4_dequantize, *self.tensors(), *self.shape, self.blocksize, name)

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> NF4Weight:
        """The same weight on `device`; itself where it is there already. It has no dtype to change."""
        if isinstance(device, torch.dtype):
            raise TypeError(f"device must be a device, got {device}: a 4-bit weight takes the dtype of the input")
        moved = [None if t is None else t.to(device, non_blocking=non_blocking) for t in self.tensors()]
        if moved[0] is self.packed:
            return self
        parts: dict[str, Any] = dict(zip(_TENSORS, moved, strict=True))
        return dataclasses.replace(self, **parts)


def _plain(tensor: Tensor) -> Tensor:
    """The same memory as a plain tensor without gradient: not a Parameter, nor a subclass of it."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.detach().as_subclass(Tensor)


def _quantize_blocks(flat: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """uint8 index of the nearest of the sorted `code` for each element over its block's absmax, and the absmax.

    The indices are those of whole blocks: the last one is filled up with zeros.
    """
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % blocksize)).view(-1, blocksize)
    absmax = blocks.abs().amax(1)
    # The reciprocal of a smaller absmax than this is not finite in float32.
    scaled = blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]
    index = torch.bucketize(scaled.clamp_(-1, 1), (code[:-1] + code[1:]) / 2, out_int32=True)
    return index.to(torch.uint8).view(-1), absmax


def dynamic_code() -> Tensor:
    """`[256]` float32, sorted: the signed dynamic 8-bit code (Dettmers, 2016, arXiv:1511.04561) with 7 exponent bits.

    For each exponent i of 0 to 6 the 2^i midpoints of an even grid on [0.1, 1] times 10^(i−6), with both signs; 0; 1.
    """
    parts = [torch.tensor([0.0, 1.0])]
    for exponent in range(7):
        grid = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        values = 10.0 ** (exponent - 6) * ((grid[:-1] + grid[1:]) / 2)
        parts += [values, -values]
    return torch.cat(parts).sort().values
