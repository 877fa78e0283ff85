"""What users of a 4-bit linear layer with adapters have today: bitsandbytes, peft on it, torchao, eager torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..nf4 import NF4Weight
from .case import Call, Inputs, Provider, in_mode, leaf

SCALING = 2.0


def leaves_of(given: Inputs, dtype: torch.dtype | None = None) -> list[Tensor]:
    """x, a and b (not those of rank 0), in `dtype` or as they are."""
    return [leaf(given[name], dtype) for name in ("x", "a", "b") if given[name].numel()]


def peers(device: str, dtype: str, mode: str, shape: dict[str, int]) -> tuple[Provider, ...]:
    """All of them. Yardsticks have weights of another 4-bit format."""
    found = [
        Provider("torch dequantise + linear", partial(_with_adapters, _dequantised)),
        Provider("torch linear over a dense weight", partial(_with_adapters, _dense)),
        Provider("bitsandbytes matmul_4bit", partial(_with_adapters, _bitsandbytes), module="bitsandbytes"),
    ]
    single_or_served = shape["adapters"] == 1 or mode == "forward"  # peft: mixed batches are for inference
    if shape["rank"] and single_or_served:
        found.append(Provider("peft on bitsandbytes", partial(_peft, False), module="peft"))
    if device == "cpu" and dtype == "bfloat16" and mode == "forward":
        repacked = "bitsandbytes repacked for CPU inference"
        if shape["rank"]:
            found.append(Provider(f"peft on {repacked}", partial(_peft, True), module="peft"))
        else:
            found.append(Provider(repacked, partial(_with_adapters, _repacked), module="bitsandbytes"))
            found.append(Provider("torch int4pack (affine)", _int4pack, yardstick=True))
    if shape["rank"] == 0:
        found.append(Provider("torchao NF4 (its own codes)", _torchao, yardstick=True, module="torchao"))
    return tuple(found)


def with_adapters(base: Tensor, given: Inputs, leaves: list[Tensor]) -> Tensor:
    """base + scaling · (x aᵀ) bᵀ in the dtype of the adapters, gathered and scattered for each, the way peft does."""
    if len(leaves) == 1:
        return base
    x, a, b = leaves
    if len(a) == 1:
        return base + (linear(linear(x.to(a.dtype), a[0]), b[0]) * SCALING).to(base.dtype)
    for adapter in range(len(a)):
        rows = (given["adapter_ids"] == adapter).nonzero(as_tuple=True)[0]
        part = linear(linear(x[rows].to(a.dtype), a[adapter]), b[adapter]) * SCALING
        base = base.index_add(0, rows, part.to(base.dtype))
    return base


def _with_adapters(make_base: Callable[[Inputs], Callable[[Tensor], Tensor]], given: Inputs, mode: str) -> Call:
    base, leaves = make_base(given), leaves_of(given)
    return in_mode(lambda: with_adapters(base(leaves[0]), given, leaves), leaves, given["grad"], mode)


def _dequantised(given: Inputs) -> Callable[[Tensor], Tensor]:
    weight, dtype = given["weight"], given["x"].dtype
    return lambda x: linear(x, weight.dequantize(dtype))


def _dense(given: Inputs) -> Callable[[Tensor], Tensor]:
    dense = given["weight"].dequantize(given["x"].dtype)
    return lambda x: linear(x, dense)


def _quant_state(given: Inputs) -> tuple[Tensor, Any]:
    """bitsandbytes' view of a copy of the same bytes."""
    from bitsandbytes.functional import QuantState, get_4bit_type

    weight: NF4Weight = given["weight"]
    packed, absmax, nested_absmax, nested_code, offset = (None if t is None else t.clone() for t in weight.tensors())
    nested = QuantState(absmax=nested_absmax, code=nested_code, blocksize=256, dtype=torch.float32)
    state = QuantState(
        absmax=absmax, shape=torch.Size(weight.shape), code=get_4bit_type("nf4", device=weight.device),
        blocksize=weight.blocksize, quant_type="nf4", dtype=given["x"].dtype, offset=offset, state2=nested,
    )  # fmt: skip
    assert packed is not None
    return packed.view(-1, 1), state


def _bitsandbytes(given: Inputs) -> Callable[[Tensor], Tensor]:
    from bitsandbytes import matmul_4bit

    packed, state = _quant_state(given)
    return lambda x: matmul_4bit(x, packed, state)


def _check_repacking() -> None:
    from bitsandbytes import functional

    if not functional.has_avx512bf16():
        raise RuntimeError("this CPU has no AVX-512 BF16")


def _repacked(given: Inputs) -> Callable[[Tensor], Tensor]:
    """What `Linear4bit` does on its first forward in eval mode: rounds absmax to bfloat16, tiles the bytes anew."""
    from bitsandbytes import functional, matmul_4bit

    _check_repacking()
    packed, state = functional._convert_weight_packed_for_cpu(*_quant_state(given))
    return lambda x: matmul_4bit(x, packed, state)


def _peft(repack: bool, given: Inputs, mode: str) -> Call:
    """peft's own layer around bitsandbytes' own; adapters as it keeps them, in float32."""
    import bitsandbytes
    from peft import LoraConfig
    from peft.tuners.lora.bnb import Linear4bit

    if repack:
        _check_repacking()
    x, a, b = leaves_of(given)
    rows, width = given["weight"].shape
    base = bitsandbytes.nn.Linear4bit(width, rows, bias=False, compute_dtype=x.dtype, quant_type="nf4", device="meta")
    packed, state = _quant_state(given)
    base.weight = bitsandbytes.nn.Params4bit(
        packed, requires_grad=False, quant_state=state, blocksize=state.blocksize, quant_type="nf4", bnb_quantized=True
    )
    if not repack:
        base.support_avx512bf16_for_cpu = False
    rank, names = a.shape[1], [str(n) for n in range(len(a))]
    config = LoraConfig(r=rank, lora_alpha=int(SCALING * rank), lora_dropout=0.0)
    layer = Linear4bit(base, names[0], config=config, r=rank, lora_alpha=config.lora_alpha)
    for name in names[1:]:
        layer.update_layer(name, r=rank, lora_alpha=config.lora_alpha, config=config)
    for n, name in enumerate(names):
        layer.lora_A[name].weight = torch.nn.Parameter(a[n].detach().clone())
        layer.lora_B[name].weight = torch.nn.Parameter(b[n].detach().clone())
    layer.train(mode != "forward")
    if mode == "forward":
        x = x.detach()  # bitsandbytes repacks under an input without gradient only
    if len(names) > 1:
        chosen = [names[i] if i >= 0 else "__base__" for i in given["adapter_ids"].tolist()]
        return in_mode(lambda: layer(x, adapter_names=chosen), [x], given["grad"], mode)
    leaves = [x, layer.lora_A["0"].weight, layer.lora_B["0"].weight]
    return in_mode(lambda: layer(x), leaves, given["grad"], mode)


def _int4pack(given: Inputs, mode: str) -> Call:
    """ATen's affine 4-bit product, groups of 64, of some weight of the same size."""
    rows, width = given["weight"].shape
    codes = torch.randint(0, 16, (rows, width), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = torch.rand(width // 64, rows, 2).to(given["x"].dtype)
    x = given["x"]
    return lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 64, scales)


def _torchao(given: Inputs, mode: str) -> Call:
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import linear_nf4, to_nf4

    (x,) = leaves_of(given)
    weight = to_nf4(given["weight"].dequantize(x.dtype), 64, 256)
    return in_mode(lambda: linear_nf4(x, weight), [x], given["grad"], mode)
