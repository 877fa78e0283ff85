"""The 4-bit format: decoding bit for bit, quantising, and the weight as an object."""

import copy
import io
import math
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from nf4_providers import use_reference

from mmrec_kernels import nf4
from mmrec_kernels.nf4 import NF4Weight, reference

pytestmark = pytest.mark.usefixtures("provider")

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], dtype=np.float32,
)  # fmt: skip


def random_weight(n, k, blocksize, nested, seed=0):
    """Random bytes, not quantised ones: every byte value occurs."""
    g = torch.Generator().manual_seed(seed)
    numel = n * k
    blocks = -(-numel // blocksize)
    packed = torch.randint(0, 256, (-(-numel // 2),), generator=g, dtype=torch.uint8)
    if not nested:
        return NF4Weight(packed, torch.rand(blocks, generator=g) + 0.01, (n, k), blocksize, torch.float32)
    absmax = torch.randint(0, 256, (blocks,), generator=g, dtype=torch.uint8)
    nested_absmax, code = torch.rand(-(-blocks // 256), generator=g), torch.randn(256, generator=g).sort().values
    offset = torch.rand((), generator=g)
    return NF4Weight(packed, absmax, (n, k), blocksize, torch.float32, nested_absmax, code, offset)


def to_bfloat16_bits(value):
    """Round-to-nearest-even of a finite float32, by its bits."""
    bits = np.asarray(value, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def naive_decode(weight):
    """float32 values, element by element."""
    n, k = weight.shape
    packed, absmax = weight.packed.numpy(), weight.absmax.numpy()
    values = np.empty(n * k, np.float32)
    for i in range(n * k):
        byte = int(packed[i // 2])
        block = i // weight.blocksize
        if weight.nested:
            product = np.float32(weight.nested_code.numpy()[absmax[block]] * weight.nested_absmax.numpy()[block // 256])
            scale = np.float32(product + np.float32(weight.offset.item()))
        else:
            scale = absmax[block]
        values[i] = NF4[byte >> 4 if i % 2 == 0 else byte & 15] * scale
    return values.reshape(n, k)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("n", "k", "blocksize"), [(7, 32, 32), (5, 33, 32), (3, 70, 64), (1, 1, 64), (9, 517, 4096)])
def test_decode_equals_naive_loop(n, k, blocksize, nested):
    weight = random_weight(n, k, blocksize, nested)
    expected = naive_decode(weight)
    assert np.array_equal(weight.dequantize(torch.float32).numpy(), expected)
    assert np.array_equal(weight.dequantize(torch.float64).numpy(), expected.astype(np.float64))
    assert np.array_equal(weight.dequantize(torch.float16).numpy(), expected.astype(np.float16))
    bits = weight.dequantize(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(bits, to_bfloat16_bits(expected))


def test_nested_absmax_is_rounded_twice():
    """With one rounding (an FMA) some of these would differ: the test first makes sure of that."""
    weight = random_weight(64, 2048, 32, True)
    code, scale = (
        weight.nested_code.double(),
        weight.nested_absmax.double().repeat_interleave(256)[: weight.absmax.numel()],
    )
    exact = code[weight.absmax.long()] * scale
    fused = (exact + weight.offset.double()).float()
    twice = exact.float() + weight.offset
    assert (fused != twice).any()
    decoded = weight.dequantize(torch.float64).view(-1, 32)
    codes = torch.from_numpy(NF4)[torch.stack([weight.packed >> 4, weight.packed & 15], 1).view(-1, 32).long()]
    assert torch.equal(decoded.float(), codes * twice[:, None])


@pytest.mark.parametrize("nested", [False, True])
def test_decode_does_not_depend_on_row_blocks(monkeypatch, nested):
    use_reference(monkeypatch)
    weight = random_weight(37, 45, 64, nested)
    whole = weight.dequantize(torch.float32)
    for elements in (1, 90, 3 * 45, 200, 5 * 45, 45 * 37 - 1):
        monkeypatch.setattr(reference, "_DECODED_ELEMENTS", elements)
        assert torch.equal(weight.dequantize(torch.float32), whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_decode_rounds_like_torch_at_every_magnitude(dtype):
    """Subnormals, overflow and halves between: absmax from 1e-44 to 1e38."""
    blocks = 700
    packed = torch.randint(0, 256, (blocks * 32,), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    absmax = torch.logspace(-44, 38, blocks, dtype=torch.float64).float()
    weight = NF4Weight(packed, absmax, (blocks, 64), 64, torch.float32)
    exact = weight.dequantize(torch.float32)
    assert (exact != 0).any() and torch.equal(weight.dequantize(dtype), exact.to(dtype))


def test_odd_tail_ignores_the_spare_nibble():
    weight = random_weight(3, 5, 64, False)
    other = weight.packed.clone()
    other[-1] ^= 0x0F
    changed = NF4Weight(other, weight.absmax, weight.shape, 64, torch.float32)
    assert torch.equal(weight.dequantize(), changed.dequantize())


def test_default_dtype_is_that_of_the_quantised_tensor():
    w = torch.randn(4, 64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        weight = NF4Weight.quantize(w.to(dtype))
        assert weight.dtype == weight.dequantize().dtype == dtype
        assert weight.dequantize(torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_quantize_picks_the_nearest_code(blocksize, nested):
    w = torch.randn(7, 701, generator=torch.Generator().manual_seed(blocksize))
    weight = NF4Weight.quantize(w, blocksize, nested)
    flat = torch.nn.functional.pad(w.reshape(-1), (0, -w.numel() % blocksize)).view(-1, blocksize)
    absmax = flat.abs().amax(1)
    scaled = (flat.double() / absmax.double()[:, None]).view(-1)[: w.numel()]
    distance = (scaled[:, None] - torch.from_numpy(NF4).double()).abs()
    index = torch.stack([weight.packed >> 4, weight.packed & 15], 1).view(-1)[: w.numel()].long()
    assert (distance.gather(1, index[:, None])[:, 0] <= distance.amin(1) + 1e-6).all()
    if not nested:
        assert torch.equal(weight.absmax, absmax)
        return
    assert torch.equal(weight.offset, absmax.mean())
    centred = torch.nn.functional.pad(absmax - weight.offset, (0, -absmax.numel() % 256)).view(-1, 256)
    assert torch.equal(weight.nested_absmax, centred.abs().amax(1))
    target = (centred.double() / weight.nested_absmax.double()[:, None]).view(-1)[: absmax.numel()]
    distance = (target[:, None] - weight.nested_code.double()).abs()
    chosen = distance.gather(1, weight.absmax.long()[:, None])[:, 0]
    assert (chosen <= distance.amin(1) + 1e-6).all()


def test_quantize_known_answers():
    """Codes quantise to themselves, a tie goes to the lower code, a block of zeros decodes to zeros."""
    weight = NF4Weight.quantize(torch.from_numpy(NF4).repeat(4)[None] * 3, nested=False)
    assert weight.packed.tolist() == [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF] * 4
    assert weight.absmax.tolist() == [3.0]
    ties = torch.from_numpy((NF4[:-1] + NF4[1:]) / 2)
    row = torch.cat([torch.ones(1), ties, torch.zeros(48)])[None]
    packed = NF4Weight.quantize(row, nested=False).packed
    index = torch.stack([packed >> 4, packed & 15], 1).view(-1)
    assert index[1:16].tolist() == list(range(15))
    for nested in (False, True):
        zeros = NF4Weight.quantize(torch.zeros(3, 50), nested=nested)
        assert torch.equal(zeros.dequantize(), torch.zeros(3, 50))


def test_dynamic_code():
    """Sorted, 256 distinct values in (-1, 1], with 0 and 1, finer towards 0."""
    code = NF4Weight.quantize(torch.randn(2, 64)).nested_code
    assert code.shape == (256,) and code.dtype == torch.float32
    assert (code.diff() > 0).all() and code[-1] == 1 and (code == 0).sum() == 1
    assert torch.allclose(code[:127], -code[128:255].flip(0), atol=0) and code[127] == 0
    assert torch.equal(code[:64], -code[191:255].flip(0)) and math.isclose(code[254], 1 - 0.45 / 64, rel_tol=1e-6)


@pytest.mark.parametrize("shape", [(0, 64), (5, 0), (0, 0)])
@pytest.mark.parametrize("nested", [False, True])
def test_empty_weight(shape, nested):
    weight = NF4Weight.quantize(torch.zeros(shape), nested=nested)
    assert weight.dequantize().shape == shape


@pytest.mark.parametrize("nested", [False, True])
def test_deepcopy_and_pickle_are_independent_copies(nested):
    weight = random_weight(6, 70, 64, nested)
    expected = weight.dequantize()
    copies = [copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))]
    buffer = io.BytesIO()
    torch.save(weight, buffer)
    buffer.seek(0)
    copies.append(torch.load(buffer, weights_only=False))
    for other in copies:
        assert other.packed.data_ptr() != weight.packed.data_ptr()
        assert (other.shape, other.blocksize, other.dtype, other.nested) == (weight.shape, 64, torch.float32, nested)
    weight.packed.zero_()
    for other in copies:
        assert torch.equal(other.dequantize(), expected)


@pytest.mark.parametrize("nested", [False, True])
def test_to(nested):
    weight = random_weight(6, 70, 64, nested)
    assert weight.to("cpu") is weight
    assert weight.to(torch.device("cpu")) is weight
    meta = weight.to("meta")
    assert meta.device.type == "meta" and all(t is None or t.device.type == "meta" for t in meta.tensors())
    assert (meta.shape, meta.blocksize, meta.dtype, meta.nested) == (weight.shape, 64, torch.float32, nested)
    with pytest.raises(TypeError, match="device"):
        weight.to(torch.bfloat16)


def test_bytes_per_weight_and_repr():
    weight = NF4Weight.quantize(torch.randn(512, 512))
    assert weight.nbytes == 512 * 512 // 2 + 4096 + 16 * 4 + 256 * 4 + 4
    assert repr(weight) == (
        "NF4Weight(out_features=512, in_features=512, blocksize=64, nested=True, dtype=torch.float32, device=cpu)"
    )
    with pytest.raises(AttributeError):
        weight.blocksize = 32


def test_peers_are_never_imported():
    for path in Path(nf4.__file__).parent.glob("*.py"):
        assert not re.search(r"^\s*(import|from)\s+(bitsandbytes|peft|transformers)", path.read_text(), re.MULTILINE), (
            path
        )


def _parts(**changes):
    weight = random_weight(4, 64, 64, True)
    names = ("packed", "absmax", "nested_absmax", "nested_code", "offset")
    parts = dict(zip(names, weight.tensors(), strict=True), shape=(4, 64), blocksize=64, dtype=torch.float32)
    return parts | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"packed": torch.zeros(127, dtype=torch.uint8)}, ValueError, "packed must have shape"),
        ({"packed": torch.zeros(128)}, TypeError, "packed must be uint8"),
        ({"packed": [0] * 128}, TypeError, "packed must be a tensor"),
        ({"absmax": torch.zeros(5, dtype=torch.uint8)}, ValueError, "absmax must have shape"),
        ({"absmax": torch.zeros(4)}, TypeError, "absmax must be uint8"),
        ({"absmax": torch.zeros(4, dtype=torch.uint8, device="meta")}, ValueError, "absmax must be on cpu"),
        ({"nested_absmax": torch.zeros(2)}, ValueError, "nested_absmax must have shape"),
        ({"nested_code": torch.zeros(16)}, ValueError, "nested_code must have shape"),
        ({"offset": torch.zeros(1)}, ValueError, "offset must have shape"),
        ({"offset": torch.zeros((), dtype=torch.bfloat16)}, TypeError, "offset must be float32"),
        ({"offset": None}, ValueError, "nested_absmax, nested_code and offset must be given together"),
        ({"nested_absmax": None}, ValueError, "nested_absmax, nested_code and offset must be given together"),
        ({"packed": torch.zeros(256, dtype=torch.uint8)[::2]}, ValueError, "packed must be contiguous"),
        ({"nested_code": torch.zeros(256, 2)[:, 0]}, ValueError, "nested_code must be contiguous"),
        ({"blocksize": 48}, ValueError, "blocksize must be one of 32, 64"),
    ],
)
def test_attributes_are_checked(changes, error, message):
    NF4Weight(**_parts())
    with pytest.raises(error, match=message):
        NF4Weight(**_parts(**changes))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: NF4Weight.quantize(torch.zeros(64)), ValueError, "tensor must have shape"),
        (lambda: NF4Weight.quantize(torch.zeros(2, 64, dtype=torch.int64)), TypeError, "tensor must be float32"),
        (lambda: NF4Weight.quantize([[1.0]]), TypeError, "tensor must be a tensor"),
        (lambda: NF4Weight.quantize(torch.zeros(2, 64), blocksize=100), ValueError, "blocksize must be one of"),
        (lambda: NF4Weight.quantize(torch.tensor([[1.0, math.nan]])), ValueError, "tensor must be finite"),
        (lambda: NF4Weight.quantize(torch.tensor([[1.0, -math.inf]])), ValueError, "tensor must be finite"),
        (lambda: NF4Weight.quantize(torch.zeros(2, 64)).dequantize(torch.int8), ValueError, "dtype must be one of"),
    ],
)
def test_quantize_and_dequantize_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
