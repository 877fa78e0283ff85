"""Against bitsandbytes and peft themselves: the same bytes, the same decoded bits, the same layer."""

import types

import pytest
import torch

from mmrec_kernels.nf4 import LoRA, NF4Weight, nf4_linear

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@pytest.fixture(autouse=True)
def eager_bitsandbytes():
    """bitsandbytes compiles its generic decode, which takes half a minute and gives the same bits."""
    with torch.compiler.set_stance("force_eager"):
        yield


def quantised(w, *, blocksize=64, nested=True, storage=torch.uint8, quant_type="nf4"):
    return bnb.nn.Params4bit(
        w.clone(), requires_grad=False, blocksize=blocksize, compress_statistics=nested, quant_type=quant_type,
        quant_storage=storage,
    ).to("cpu")  # fmt: skip


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("k", [4096, 4097, 1])
def test_decode_is_bit_equal(k, blocksize, nested):
    """Every byte value in every block size, whole rows, and odd K, whose blocks cross rows and whose tail is odd."""
    n = {4096: 4, 4097: 5, 1: 77}[k]
    param = quantised(normal(n, k), blocksize=blocksize, nested=nested)
    param.data.view(-1)[: min(256, param.numel())] = torch.arange(256, dtype=torch.uint8)[: param.numel()]
    weight = NF4Weight.from_bitsandbytes(param)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        param.quant_state.dtype = dtype
        expected = bnb.functional.dequantize_4bit(param.data, param.quant_state)
        assert torch.equal(weight.dequantize(dtype), expected)


def test_decode_where_bitsandbytes_itself_is_wrong():
    """K a multiple of 32, not of the block size: the AVX-512 decode of bitsandbytes 0.50.2 takes the wrong absmax."""
    w = normal(64, 96)
    param = quantised(w, nested=False)
    theirs = bnb.functional.dequantize_4bit(param.data, param.quant_state)
    ours = NF4Weight.from_bitsandbytes(param).dequantize()
    # The same flat bytes as one row of whole blocks, which bitsandbytes decodes right, are what we decode.
    param.quant_state.shape = torch.Size([1, 64 * 96])
    assert torch.equal(bnb.functional.dequantize_4bit(param.data, param.quant_state).view(64, 96), ours)
    our_error, their_error = ((d - w).norm() / w.norm() for d in (ours, theirs))
    assert our_error < 0.1
    if torch.equal(ours, theirs):
        pytest.skip(f"bitsandbytes {bnb.__version__} decodes K % blocksize != 0 as it is stored on this machine")
    assert their_error > 1.3 * our_error, f"ours {our_error:.3f}, theirs {their_error:.3f}"


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("nested", [False, True])
def test_from_bitsandbytes_is_a_view(nested, storage):
    param = quantised(normal(8, 128), nested=nested, storage=storage)
    weight = NF4Weight.from_bitsandbytes(param)
    state = param.quant_state
    assert weight.packed.data_ptr() == param.data_ptr() and weight.packed.shape == (512,)
    assert weight.absmax.data_ptr() == state.absmax.data_ptr()
    assert (weight.shape, weight.blocksize, weight.dtype, weight.nested) == ((8, 128), 64, torch.float32, nested)
    if nested:
        assert weight.nested_absmax.data_ptr() == state.state2.absmax.data_ptr()
        assert weight.nested_code.data_ptr() == state.state2.code.data_ptr()
        assert weight.offset.data_ptr() == state.offset.data_ptr()
    assert all(t is None or type(t) is torch.Tensor for t in weight.tensors())
    before = bnb.functional.dequantize_4bit(param.data, state)
    assert torch.equal(weight.dequantize(), before)
    param.data.view(torch.uint8).zero_()
    assert torch.equal(weight.dequantize(), bnb.functional.dequantize_4bit(param.data, state))


def test_transposed_bytes_decode_to_the_stored_shape():
    param = quantised(normal(8, 128))
    expected = bnb.functional.dequantize_4bit(param.data, param.quant_state)
    transposed = param.t()
    transposed.quant_state = param.quant_state
    assert torch.equal(NF4Weight.from_bitsandbytes(transposed).dequantize(), expected)


def test_offset_of_another_dtype():
    param = quantised(normal(8, 128))
    param.quant_state.offset = param.quant_state.offset.bfloat16()
    expected = bnb.functional.dequantize_4bit(param.data, param.quant_state)
    weight = NF4Weight.from_bitsandbytes(param)
    assert weight.offset.dtype == torch.float32 and torch.equal(weight.dequantize(), expected)


def test_state_dict_round_trip():
    """A layer loaded from a checkpoint: absmax and codes are the loaded tensors."""
    layer = bnb.nn.Linear4bit(128, 8, bias=False, quant_type="nf4").to("cpu")
    state = layer.state_dict()
    stats = {k.removeprefix("weight."): v for k, v in state.items() if k != "weight"}
    loaded = bnb.nn.Params4bit.from_prequantized(state["weight"], stats, device="cpu")
    expected = NF4Weight.from_bitsandbytes(layer.weight).dequantize()
    assert torch.equal(NF4Weight.from_bitsandbytes(loaded).dequantize(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_quantize_gives_bitsandbytes_bytes(blocksize, dtype):
    w = normal(16, 1024).to(dtype)
    param = quantised(w, blocksize=blocksize, nested=False)
    weight = NF4Weight.quantize(w, blocksize, nested=False)
    assert torch.equal(weight.packed, param.data.view(-1))
    assert torch.equal(weight.absmax, param.quant_state.absmax)


@pytest.mark.parametrize("shape", [(16, 1001), (3, 7), (5, 100)])
def test_quantize_tail(shape):
    """bitsandbytes divides in the last, partial block and multiplies by the reciprocal elsewhere; we always multiply:
    the tail may differ where an element lies within rounding of the middle of two codes, and is as near there."""
    w = normal(*shape)
    param = quantised(w, nested=False)
    weight = NF4Weight.quantize(w, nested=False)
    assert torch.equal(weight.absmax, param.quant_state.absmax)
    theirs = NF4Weight.from_bitsandbytes(param)
    full = w.numel() // 64 * 32
    assert torch.equal(weight.packed[:full], theirs.packed[:full])
    ours_error, theirs_error = ((q.dequantize() - w).abs() for q in (weight, theirs))
    assert (ours_error - theirs_error).abs().max() < 1e-6


def test_quantize_nested_against_bitsandbytes():
    """The same codes, offset and scales. bitsandbytes' CPU search of the 256-entry code is off by one entry now and
    then; where the two differ, ours is the nearer."""
    w = normal(512, 1024)
    param = quantised(w)
    state = param.quant_state
    weight = NF4Weight.quantize(w)
    assert torch.equal(weight.packed, param.data.view(-1))
    assert torch.equal(weight.nested_code, state.state2.code)
    assert torch.equal(weight.offset, state.offset)
    assert torch.equal(weight.nested_absmax, state.state2.absmax)
    difference = (weight.absmax.int() - state.absmax.int()).abs()
    assert difference.max() <= 1 and difference.count_nonzero() < 0.01 * difference.numel()
    absmax = w.view(-1, 64).abs().amax(1)
    ours, theirs = (
        (
            code[q.long()].double() * weight.nested_absmax.double().repeat_interleave(256)
            + weight.offset.double()
            - absmax
        )
        for code, q in ((weight.nested_code, weight.absmax), (weight.nested_code, state.absmax))
    )
    assert (ours.abs() <= theirs.abs() + 1e-6).all()
    our_error, their_error = (
        (d - w).norm() / w.norm() for d in (weight.dequantize(), bnb.functional.dequantize_4bit(param.data, state))
    )
    assert our_error <= their_error * (1 + 1e-5)


def stub(**changes):
    """What from_bitsandbytes reads of a Params4bit, and nothing else."""
    param = torch.zeros(128, 1, dtype=torch.uint8)
    state2 = types.SimpleNamespace(absmax=torch.ones(1), code=torch.zeros(256), blocksize=256)
    fields = {"absmax": torch.zeros(4, dtype=torch.uint8), "shape": (4, 64), "blocksize": 64, "quant_type": "nf4",
              "dtype": torch.float32, "offset": torch.tensor(0.0), "state2": state2}  # fmt: skip
    param.quant_state = types.SimpleNamespace(**(fields | changes))
    return param


def test_a_stub_will_do():
    assert NF4Weight.from_bitsandbytes(stub()).shape == (4, 64)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: bnb.nn.Linear4bit(64, 8), TypeError, "param must be a bitsandbytes Params4bit"),
        (lambda: bnb.nn.Linear4bit(64, 8).weight, ValueError, "param must be quantised"),
        (lambda: torch.zeros(8, 64), ValueError, "param must be quantised"),
        (
            lambda: quantised(torch.randn(8, 64), quant_type="fp4"),
            ValueError,
            "param must have quant_type 'nf4', got 'fp4'",
        ),
        (lambda: quantised(torch.randn(2, 8, 64)), ValueError, "param must be a weight of shape"),
        (
            lambda: stub(packing_format_for_cpu=True),
            ValueError,
            "repacked in place.*support_avx512bf16_for_cpu = False",
        ),
        (
            lambda: stub(state2=types.SimpleNamespace(absmax=torch.ones(1), code=torch.zeros(256), blocksize=64)),
            ValueError,
            "param must have nested blocks of 256, got 64",
        ),
        (lambda: stub(state2=None), TypeError, "absmax must be float32"),
    ],
)
def test_refusals(make, error, message):
    with pytest.raises(error, match=message):
        NF4Weight.from_bitsandbytes(make())


def test_a_layer_that_bitsandbytes_repacked_is_refused():
    param = quantised(normal(64, 128))
    param.data, param.quant_state = bnb.functional._convert_weight_packed_for_cpu(param.data, param.quant_state)
    with pytest.raises(ValueError, match="repacked in place"):
        NF4Weight.from_bitsandbytes(param)


def layer_and_view(dtype, bias=True, n=64, k=128):
    layer = bnb.nn.Linear4bit(k, n, bias=bias, compute_dtype=dtype, quant_type="nf4")
    layer.support_avx512bf16_for_cpu = False
    layer.load_state_dict({"weight": normal(n, k)} | ({"bias": normal(n, seed=1)} if bias else {}))
    layer = layer.to("cpu")
    return layer, NF4Weight.from_bitsandbytes(layer.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_input_gradient_against_the_layer(dtype):
    """Within the layer's own rounding; the layer's bytes are as before."""
    layer, weight = layer_and_view(dtype)
    before = {k: v.clone() for k, v in layer.state_dict().items() if k.startswith("weight")}
    x = normal(5, 3, 128, seed=2).to(dtype).requires_grad_()
    dy = normal(5, 3, 64, seed=3).to(dtype)
    expected = layer(x)
    (expected_dx,) = torch.autograd.grad(expected, x, dy)
    y = nf4_linear(x, weight, layer.bias.to(dtype))
    (dx,) = torch.autograd.grad(y, x, dy)
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8
    for ours, theirs in ((y, expected), (dx, expected_dx)):
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()
    after = layer.state_dict()
    assert len(before) == 6 and all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_peft(dtype):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    layer, weight = layer_and_view(dtype, bias=False)
    model = peft.get_peft_model(
        torch.nn.Sequential(layer), peft.LoraConfig(r=8, lora_alpha=16, target_modules=["0"], lora_dropout=0.0)
    )
    module = model.base_model.model[0]
    a, b = (module.lora_A["default"].weight, module.lora_B["default"].weight)
    with torch.no_grad():
        b.copy_(normal(*b.shape, seed=4))
    x = normal(6, 128, seed=5).to(dtype).requires_grad_()
    dy = normal(6, 64, seed=6).to(dtype)
    expected = model(x)
    expected_grads = torch.autograd.grad(expected, (x, a, b), dy)
    y = nf4_linear(x, weight, lora=LoRA(a, b, module.scaling["default"]))
    grads = torch.autograd.grad(y, (x, a, b), dy)
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7
    for ours, theirs in zip((y, *grads), (expected, *expected_grads), strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()
