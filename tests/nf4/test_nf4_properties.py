"""NF4Weight and nf4_linear on whatever may be drawn: shapes, dtypes, strides, adapters, nonsense as arguments."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear

from mmrec_kernels import library, schemas
from mmrec_kernels.nf4 import LoRA, NF4Weight, nf4_linear
from mmrec_kernels.nf4.reference import CODES
from mmrec_kernels.nf4.weight import BLOCKSIZES
from strategies import (
    Memory,
    Problem,
    assert_deterministic,
    bad_integers,
    examples,
    in_memory,
    integers,
    judge,
    layouts,
    misfits,
    normal,
    refuses,
    same_bits,
    seeds,
    sizes,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
LEAVES = ("x", "bias", "a", "b")
FIELDS = ("packed", "absmax", "nested_absmax", "nested_code", "offset")


def decoded(weight: NF4Weight) -> Tensor:
    """float32 W, one element at a time: code · absmax of its block, absmax itself a product and a sum where nested."""
    n, k = weight.shape
    scales = weight.absmax.tolist()
    if weight.nested:
        nested, code, offset = weight.nested_absmax, weight.nested_code, weight.offset
        scales = [code[int(q)] * nested[i // 256] + offset for i, q in enumerate(scales)]
    flat = []
    for i in range(n * k):
        byte = int(weight.packed[i // 2])
        index = byte >> 4 if i % 2 == 0 else byte & 15
        flat.append(float(torch.tensor(CODES[index]) * torch.as_tensor(scales[i // weight.blocksize])))
    return torch.tensor(flat, dtype=torch.float32).view(n, k)


def decode(weight: NF4Weight, dtype: torch.dtype) -> list[Tensor]:
    return [weight.dequantize(dtype)]


@examples(25)
@given(
    sizes(16), sizes(32, 64), st.sampled_from(BLOCKSIZES[:4]), st.booleans(), st.sampled_from(DTYPES), seeds, st.data()
)
def test_quantised_weights_decode_to_the_code_nearest_to_them(
    n: int, k: int, blocksize: int, nested: bool, dtype: torch.dtype, seed: int, data: Any
) -> None:
    memory = Memory()
    tensor = memory.place(normal(seed, n, k).to(dtype), data.draw(layouts(2, expanded=True)))
    weight = NF4Weight.quantize(tensor, blocksize, nested)
    again = NF4Weight.quantize(tensor.contiguous().clone(), blocksize, nested)
    memory.assert_untouched()
    for one, other in zip(weight.tensors(), again.tensors(), strict=True):
        assert (one is None and other is None) or same_bits(one, other)
    w = decoded(weight)
    for target in (*DTYPES, torch.float16):
        assert_deterministic(functools.partial(decode, weight, target), functools.partial(decode, again, target))
        assert same_bits(weight.dequantize(target), w.to(target))
    if nested or not n * k:
        return
    flat = tensor.float().reshape(-1)
    absmax = weight.absmax.repeat_interleave(blocksize)[: n * k]
    nearest = (flat[:, None] - torch.tensor(CODES) * absmax[:, None]).abs().amin(1)
    assert bool(((flat - w.view(-1)).abs() <= nearest * (1 + 1e-5) + absmax * 1e-6).all())


@st.composite
def problems(draw: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Few tokens and panels of them; whole and odd columns; one adapter, a stack of them, or none; bias or none."""
    tokens, out, width, seed = draw(sizes(12, 32)), draw(sizes(16)), draw(sizes(32, 64)), draw(seeds)
    made: dict[str, Any] = {
        "x": normal(seed, tokens, width).to(dtype),
        "weight": NF4Weight.quantize(
            normal(seed + 1, out, width), draw(st.sampled_from([32, 64, 4096])), draw(st.booleans())
        ),
    }
    parameters = draw(st.sampled_from([dtype, torch.float32])) if dtype != torch.float32 else dtype
    if draw(st.booleans()):
        made["bias"] = normal(seed + 2, out).to(parameters)
    adapters, rank = draw(st.integers(0, 3)), draw(st.sampled_from([0, 1, 3, 8, 17]))
    if adapters:
        made["a"] = normal(seed + 3, adapters, rank, width).to(parameters)
        made["b"] = normal(seed + 4, adapters, out, rank).to(parameters)
        made["scaling"] = draw(st.sampled_from([0.5, torch.linspace(0.5, 2, adapters), torch.zeros(adapters)]))
        made["adapter_ids"] = integers(seed + 5, -1, adapters, tokens)
    return Problem(made)


def run(given_: dict[str, Any], upstream: Tensor) -> list[Tensor]:
    """y and the gradients of what is there of x, bias, a and b."""
    leaves = {n: given_[n].detach().requires_grad_() for n in LEAVES if n in given_}
    lora = LoRA(leaves["a"], leaves["b"], given_["scaling"]) if "a" in leaves else None
    y = nf4_linear(leaves["x"], given_["weight"], leaves.get("bias"), lora=lora, adapter_ids=given_.get("adapter_ids"))
    return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), upstream)]


def dense(given_: dict[str, Any], upstream: Tensor, dtype: torch.dtype, columns: Tensor) -> list[Tensor]:
    """The same in plain torch in `dtype`, on W as x's dtype has it, with the columns of x in another order."""
    w = given_["weight"].dequantize(given_["x"].dtype).to(dtype)[:, columns]
    there = [n for n in LEAVES if n in given_]
    leaves = {
        n: given_[n].detach().to(dtype)[..., columns] if n in ("x", "a") else given_[n].detach().to(dtype)
        for n in there
    }
    leaves = {n: x.requires_grad_() for n, x in leaves.items()}
    y = linear(leaves["x"], w, leaves.get("bias"))
    if "a" in leaves:
        count = len(leaves["a"])
        scalings = torch.as_tensor(given_["scaling"], dtype=torch.float64).expand(count).tolist()
        for e, scaling in enumerate(scalings):
            share = linear(linear(leaves["x"], leaves["a"][e]), leaves["b"][e]) * scaling
            y = y + torch.where((given_["adapter_ids"] == e)[:, None], share, 0)
    grads = torch.autograd.grad(y, list(leaves.values()), upstream.to(dtype))
    back = columns.argsort()
    return [y.detach(), *(g[..., back] if n in ("x", "a") else g for n, g in zip(there, grads, strict=True))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@examples(25)
@given(st.data())
def test_products_and_gradients_are_those_of_the_decoded_weight(dtype: torch.dtype, data: Any) -> None:
    given_, memory = data.draw(problems(dtype)), Memory()
    upstream = normal(0, len(given_["x"]), given_["weight"].shape[0]).to(dtype)
    strided = in_memory(given_, memory, data.draw)
    ours = run(strided, upstream)
    memory.assert_untouched()
    assert_deterministic(lambda: run(strided, upstream), lambda: run(given_, upstream))
    width = given_["x"].shape[1]
    exact = dense(given_, upstream, torch.float64, torch.arange(width))
    names = ["y", *(f"d{n}" for n in LEAVES if n in given_)]
    judge(names, ours, exact, lambda n: dense(given_, upstream, dtype, normal(n, width).argsort()), dtype)


TOKENS, ADAPTERS = 5, 3


def small(ids: Any, **changes: Any) -> dict[str, Any]:
    return {"x": normal(0, TOKENS, 6).float(), "weight": NF4Weight.quantize(normal(1, 4, 6).float()),
            "lora": LoRA(normal(2, ADAPTERS, 2, 6).float(), normal(3, ADAPTERS, 4, 2).float()),
            "adapter_ids": ids} | changes  # fmt: skip


def with_gradients(**p: Any) -> Tensor:
    return nf4_linear(**(p | {"x": p["x"].requires_grad_()}))


def raw(x: Tensor, weight: NF4Weight, lora: LoRA, adapter_ids: Tensor) -> Any:
    """The raw op, its complaints as the public function gives them."""
    return library.call(schemas.nf4_forward, x, *weight.tensors(), weight.shape[0], weight.blocksize, None,
                        lora.a, lora.b, 1.0, None, adapter_ids, False)  # fmt: skip


@examples(40)
@given(bad_integers(TOKENS, -1, ADAPTERS))
def test_adapters_that_there_are_not_are_refused(ids: list[int]) -> None:
    for function in (nf4_linear, with_gradients, raw):
        refuses("adapter_ids", lambda function=function: function(**small(torch.tensor(ids))))


@examples(40)
@given(st.data())
def test_adapter_ids_of_another_kind_are_refused(data: Any) -> None:
    how, bad = data.draw(misfits(torch.tensor([0, 1, 2, -1, 0])))
    refuses("adapter_ids", lambda: nf4_linear(**small(bad)))


@examples(60)
@given(st.sampled_from(FIELDS), st.data())
def test_parts_of_a_weight_of_another_kind_are_refused(name: str, data: Any) -> None:
    """Bytes from a file that do not fit: `NF4Weight` itself says so, before any kernel reads them."""
    weight = NF4Weight.quantize(normal(0, 9, 70), 32)
    part = getattr(weight, name)
    change = data.draw(st.sampled_from(["dtype", "shape", "device", "strides"]))
    if part.ndim == 0 and change == "strides":
        change = "shape"
    bad = {
        "dtype": lambda: part.to(torch.int16),
        "shape": lambda: torch.cat([part.reshape(-1), part.reshape(-1)]),
        "device": lambda: part.to("meta"),
        "strides": lambda: part.repeat_interleave(2)[::2],
    }[change]()
    if change == "strides" and part.numel() == 1:  # one number has every stride
        return
    # Where the bytes are decides where all else must be.
    refuses(
        "absmax" if (name, change) == ("packed", "device") else name, lambda: dataclasses.replace(weight, **{name: bad})
    )


@examples(30)
@given(
    st.sampled_from([0, -1, 33, 2**31, 2**63, 64.0, None, "64"]),
    st.sampled_from([(-4, -6), (4.0, 6), (24,), (4, 6, 1), None, 24, (2**62, 2**62), (4, 7), ("4", 6)]),
)
def test_sizes_that_there_are_not_are_refused(blocksize: Any, shape: Any) -> None:
    weight = NF4Weight.quantize(normal(0, 4, 6).float(), nested=False)
    refuses("blocksize", lambda: dataclasses.replace(weight, blocksize=blocksize))
    refuses(
        "packed" if shape in [(4, 7), (2**62, 2**62)] else "shape", lambda: dataclasses.replace(weight, shape=shape)
    )


@examples(30)
@given(seeds, st.sampled_from([torch.nan, torch.inf]))
def test_what_is_no_number_stays_with_its_tokens(seed: int, bad: float) -> None:
    ids = integers(seed, -1, ADAPTERS, TOKENS)
    given_ = small(ids)
    clean = nf4_linear(**given_)
    given_["lora"].a[0, 0, 0] = bad
    found = nf4_linear(**given_)
    assert torch.equal(found[ids != 0], clean[ids != 0]) and not found[ids == 0].isfinite().any()
    with pytest.raises(ValueError, match="^tensor must be finite"):
        NF4Weight.quantize(torch.tensor([[1.0, bad]]))


def test_a_stride_of_more_than_two_to_the_31_bytes() -> None:
    """In memory that nobody touches, so that only the pages of the rows are there."""
    stride = 2**30 + 8
    x = torch.empty(stride + 8, dtype=torch.bfloat16).as_strided((2, 8), (stride, 1))
    x.copy_(normal(0, 2, 8))
    weight = NF4Weight.quantize(normal(1, 3, 8))
    assert torch.equal(nf4_linear(x, weight), nf4_linear(x.contiguous(), weight))


def test_more_than_two_to_the_31_elements_of_a_weight() -> None:
    """Zeros but for the last bytes of 2³¹ elements, 1 GiB. What the last row gives is what it gives alone."""
    n, k, blocksize = 2**18 + 1, 2**13, 4096
    weight = NF4Weight(
        torch.zeros(n * k // 2, dtype=torch.uint8), torch.ones(n * k // blocksize), (n, k), blocksize, torch.float32
    )
    weight.packed[-k // 2 :] = integers(0, 0, 256, k // 2).to(torch.uint8)
    last = NF4Weight(weight.packed[-k // 2 :], weight.absmax[-2:], (1, k), blocksize, torch.float32)
    x = normal(1, 1, k).float()
    assert n * k > 2**31
    assert torch.equal(nf4_linear(x, weight)[:, -1:], nf4_linear(x, last))


def test_shapes_of_meta_tensors_do_not_overflow() -> None:
    packed = torch.empty(2**33, dtype=torch.uint8, device="meta")
    weight = NF4Weight(packed, torch.empty(2**28, device="meta"), (2**17, 2**17), 64, torch.bfloat16)
    assert nf4_linear(torch.empty(2**20, 2**17, device="meta"), weight).shape == (2**20, 2**17)
    assert weight.dequantize().shape == (2**17, 2**17)
