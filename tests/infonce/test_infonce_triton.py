"""The Triton kernels of InfoNCE: in the interpreter, compiled ahead of time, and on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from infonce_providers import use_reference
from test_infonce_kernel import everything, run, unit, widened
from test_infonce_parts import check_parts
from torch import Tensor

from gpu import assert_captured
from mmrec_kernels import info_nce, library, schemas, validation
from mmrec_kernels.infonce import autograd
from numerics import errors

triton = pytest.importorskip("triton")


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The public functions run the Triton launchers on CPU tensors."""
    from mmrec_kernels.infonce import triton as launchers

    def call(op: Any, *args: Any) -> Any:
        if op is schemas.infonce_backward:
            return launchers.backward(*args)
        return launchers.forward(*args[:-2], False, args[-1])  # save is False, as for CUDA tensors

    monkeypatch.setattr(autograd, "library", SimpleNamespace(call=call, detached=library.detached))
    every = (*validation.GPU_DTYPES, torch.float64)
    monkeypatch.setattr(validation, "float_dtypes", lambda device: every)


def exact(monkeypatch: pytest.MonkeyPatch, query: Tensor, key: Tensor, options: dict[str, Any]) -> Any:
    use_reference(monkeypatch)
    return run(query.double(), key.double(), **widened(options))


# The interpreter multiplies float16 exactly; its bfloat16 stores truncate, which is one unit in the last place.
LIMITS = {torch.float32: 5e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}
OPTIONS: dict[str, Callable[[int, int, torch.dtype], dict[str, Any]]] = {
    "plain": lambda rows, keys, dtype: {"scale": torch.tensor(9.0)},
    "one direction": lambda rows, keys, dtype: {"scale": torch.tensor(9.0), "symmetric": False},
    "everything": everything,
    "everything, one direction": lambda rows, keys, dtype: {**everything(rows, keys, dtype), "symmetric": False},
}


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.usefixtures("interpreted")
def test_interpreted_kernels_match_the_oracle(
    case: str, chunked: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmrec_kernels.infonce.triton import backward_pass, forward_pass

    if chunked:
        monkeypatch.setitem(backward_pass.OWNER_WIDTH, dtype, 8)
        monkeypatch.setattr(backward_pass, "CHUNK_BYTES", 1)
        monkeypatch.setattr(forward_pass, "_MOST_ROW_TILES", 2)
    rows, keys = 37, 70
    query, key = unit(rows, 20, dtype, 1) * 2, unit(keys, 20, dtype, 2)
    options = OPTIONS[case](rows, keys, dtype)
    ours, stats = run(query, key, **options)
    oracle, exact_stats = exact(monkeypatch, query, key, options)
    for name, tensor in ours.items():
        limit = 5e-6 if name == "value" and dtype != torch.bfloat16 else LIMITS[dtype]
        assert max(errors(tensor, oracle[name])) <= limit, name
    torch.testing.assert_close(stats.lse.double(), exact_stats.lse.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats.positive.double(), exact_stats.positive.double(), rtol=1e-6, atol=1e-6)
    clear = (stats.rank - exact_stats.rank).abs()
    assert int(clear.max()) <= 1 and float((clear == 0).double().mean()) > 0.9


@pytest.mark.interpret
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.usefixtures("interpreted")
def test_interpreted_kernels_put_parts_together(symmetric: bool) -> None:
    check_parts(torch.float32, symmetric, 1e-5)


@pytest.mark.interpret
@pytest.mark.usefixtures("interpreted")
def test_interpreted_kernels_keep_keys_far_below_their_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that need references of their own, and pairs of references too far apart for one exponential."""
    query, key = torch.randn(40, 8) * 6, torch.randn(40, 8) * torch.logspace(-1, 1.2, 40)[:, None]
    query[20:] = query[20:].abs()
    key[10:20] = -key[10:20].abs()
    options = {"scale": torch.tensor(1.0)}
    ours, _ = run(query, key, **options)
    oracle, _ = exact(monkeypatch, query, key, options)
    for mine, other in zip(ours["key"].double(), oracle["key"], strict=True):
        assert float((mine - other).norm()) <= 1e-3 * float(other.norm()) + 1e-9


@pytest.mark.interpret
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("normalize", [True, False])
def test_interpreted_kernels_ignore_what_nobody_reads(normalize: bool) -> None:
    query, key = unit(20, 8, torch.float32, 1), unit(40, 8, torch.float32, 2)
    target = torch.randint(0, 30, (20,))
    target[[3, 7]] = -1
    offsets = torch.arange(21) * 10
    options = {
        "target": target,
        "exclude": (offsets, torch.arange(30, 40).repeat(20)),
        "symmetric": False,
        "normalize": normalize,
        "scale": torch.ones(20),
    }
    clean, _ = run(query, key, **options)
    query[[3, 7]], key[30:] = float("nan"), float("nan")
    dirty, _ = run(query, key, **options)
    assert all(torch.equal(a, b) for a, b in zip(clean.values(), dirty.values(), strict=True))


@pytest.mark.interpret
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("chunked", [False, True])
def test_interpreted_kernels_where_neither_row_nor_key_has_a_slope(
    chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmrec_kernels.infonce.triton import backward_pass

    if chunked:
        monkeypatch.setitem(backward_pass.OWNER_WIDTH, torch.float32, 4)
    query, key = unit(64, 8, torch.float32, 1).requires_grad_(), unit(64, 8, torch.float32, 2).requires_grad_()
    nothing = torch.autograd.grad(0.0 * info_nce(query, key, scale=200.0), [query, key])
    assert not any(g.any() for g in nothing)
    weight = torch.cat([torch.zeros(32), torch.ones(32)])
    padded = torch.autograd.grad(info_nce(query, key, scale=200.0, weight=weight), [query, key])
    target = torch.cat([torch.arange(32), torch.full((32,), -1)])
    idle = torch.autograd.grad(info_nce(query, key, scale=200.0, target=target), [query, key])
    use_reference(monkeypatch)
    for found, options in ((padded, {"weight": weight}), (idle, {"target": target})):
        expected = torch.autograd.grad(info_nce(query, key, scale=200.0, **options), [query, key])
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.interpret
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("chunked", [False, True])
def test_interpreted_float16_normalizes_short_and_zero_rows(chunked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmrec_kernels.infonce.triton import backward_pass

    if chunked:
        monkeypatch.setitem(backward_pass.OWNER_WIDTH, torch.float16, 4)
    query, key = unit(32, 8, torch.float16, 1) / 200, unit(32, 8, torch.float16, 2)
    query[5], key[9] = 0, 0
    options = {"scale": torch.tensor(50.0), "normalize": True}
    ours, _ = run(query, key, **options)
    oracle, _ = exact(monkeypatch, query, key, options)
    for name, tensor in ours.items():
        assert max(errors(tensor, oracle[name])) <= 5e-3, name
    assert not ours["query"][5].any() and not ours["key"][9].any()


@pytest.mark.interpret
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("rows, keys", [(0, 5), (3, 0), (1, 1)])
def test_interpreted_kernels_take_empty_sizes(rows: int, keys: int) -> None:
    query, key = torch.randn(rows, 4).requires_grad_(), torch.randn(keys, 4).requires_grad_()
    target = torch.full((rows,), -1) if keys < rows else None
    value = info_nce(query, key, target=target)
    dq, dk = torch.autograd.grad(value, [query, key])
    assert value.item() == 0 and not dq.any() and not dk.any()


@pytest.mark.interpret
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("symmetric", [True, False])
def test_interpreted_float16_keeps_small_weights(symmetric: bool) -> None:
    """A gradient from above as of a mean over a hundred thousand rows: the weights would be below float16's numbers."""
    query, key = unit(33, 8, torch.float16, 1) / 256, unit(33, 8, torch.float16, 2) * 256
    query, key = query.requires_grad_(), key.requires_grad_()
    value = info_nce(query, key, scale=5.0, symmetric=symmetric, label_smoothing=0.1)
    (plain,) = torch.autograd.grad(value, query, retain_graph=True)
    (small,) = torch.autograd.grad(value, query, torch.tensor(2.0**-17), retain_graph=True)
    torch.testing.assert_close(plain.float() * 2.0**-17, small.float(), rtol=1e-2, atol=1e-7)


# Sizes of every argument that is no constant; pointers are float32 unless they are listed.
POINTERS = {
    "row_read": "*u8", "key_read": "*u8", "target": "*i64", "tile_offsets": "*i64", "query_ids": "*i32",
    "key_ids": "*i32", "listed_rows": "*i32", "listed_keys": "*i32", "kept": "*i32", "rank": "*i32",
}  # fmt: skip
MASKED = ("kappa", "bias", "query_ids", "key_ids", "listed_rows", "listed_keys", "tile_offsets", "log_q")
UNUSED = ("positive", "total", "kept", "rank", "total_slope")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def compiled(name: str, dtype: str, width: int, masked: bool, capability: int) -> Any:
    """Resources of a kernel in its shipped configuration; `masked`: norms, logQ, ids and lists."""
    from aot import compile_for, signature_of
    from mmrec_kernels.infonce.triton import backward_kernels, block_sizes, forward_kernels

    kernels = forward_kernels if name == "forward" else backward_kernels
    kernel, blocks = getattr(kernels, f"{name}_kernel"), block_sizes(name, width, DTYPES[dtype])
    warps, stages = blocks.pop("num_warps"), blocks.pop("num_stages")
    flags = ("HAS_KAPPA", "HAS_BIAS", "HAS_IDS", "HAS_EXCLUDE", "NEED_LOG_Q")
    constants: dict[str, Any] = {
        **dict.fromkeys(flags, masked), "SYMMETRIC": True, "FOLD": True, "HAS_TOTAL": False, "NEED_TOTAL": False,
        "NEED_RANK": False, "PRECISION": "ieee", "UPCAST": False, **blocks,
    }  # fmt: skip
    absent = UNUSED if masked else (*UNUSED, *MASKED)
    constants |= {f"{pointer}_ptr": None for pointer in absent}
    constants = {n: v for n, v in constants.items() if n in kernel.arg_names}
    rows = ("q", "k", "out") if name == "weights" else ("q", "k")
    signature = signature_of(kernel, constants, rows, dtype, POINTERS)
    return compile_for(kernel, signature, constants, capability, num_warps=warps, num_stages=stages), warps


# Kernel, dtype, width: the widths that take another configuration.
TABLE = [
    ("forward", "bf16", 64), ("forward", "fp16", 256), ("forward", "fp32", 64), ("weights", "bf16", 768),
    ("weights", "fp32", 768), ("query_sums", "bf16", 64), ("query_sums", "bf16", 128), ("query_sums", "bf16", 256),
    ("key_sums", "bf16", 64), ("key_sums", "bf16", 128), ("key_sums", "bf16", 256), ("query_sums", "fp32", 64),
    ("key_sums", "fp32", 64),
]  # fmt: skip


# With every mask at once, and beside float32's multiply-adds, some words go to the stack.
SPILL_BYTES = {
    ("query_sums", "bf16", 64, True): 400,
    ("key_sums", "bf16", 64, True): 200,
    ("key_sums", "fp32", 64, False): 16,
}


@pytest.mark.parametrize("capability", (80, 90))
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("name", "dtype", "width"), TABLE, ids=str)
def test_compiled_ahead_of_time_within_limits(name: str, dtype: str, width: int, masked: bool, capability: int) -> None:
    used, warps = compiled(name, dtype, width, masked, capability)
    assert used.stack_bytes <= SPILL_BYTES.get((name, dtype, width, masked), 0)
    assert used.registers * warps * 32 <= 65536
    assert used.shared_bytes <= 100 * 1024
    assert "tf32" not in used.ptx
    if dtype != "fp32":
        assert ("wgmma" if capability == 90 else "mma.sync") in used.ptx


SMALL = {
    "positive": ({"q": "*bf16", "k": "*bf16", "target": "*i64", "dot": "*fp64", "query_norm": "*fp64"},
                 {"HAS_KEY": True, "BLOCK_M": 16, "BLOCK_D": 64}),
    "merge": ({}, {"BLOCK": 128}),
    "combine": ({"out": "*fp64"}, {"BLOCK": 128}),
    "rank_reference": ({"q": "*bf16", "k": "*bf16", "row_read": "*u8", "target": "*i64"},
                       {"HAS_KAPPA": True, "HAS_BIAS": True, "BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_D": 64,
                        "PRECISION": "ieee", "UPCAST": False}),
}  # fmt: skip


@pytest.mark.parametrize("capability", (80, 90))
@pytest.mark.parametrize("name", SMALL)
def test_small_kernels_compiled_ahead_of_time(name: str, capability: int) -> None:
    from aot import compile_for
    from mmrec_kernels.infonce.triton import forward_kernels

    kernel, (pointers, constants) = getattr(forward_kernels, f"{name}_kernel"), SMALL[name]
    arguments = [a for a in kernel.arg_names if a not in constants]
    signature = {a: pointers.get(a.removesuffix("_ptr"), "*fp32") if a.endswith("_ptr") else "i32" for a in arguments}
    used = compile_for(kernel, signature, constants, capability, num_warps=8 if name == "rank_reference" else 4)
    assert used.stack_bytes == 0


GPU_SHAPES = [
    (300, 500, 64, True),
    (257, 257, 96, True),
    (1000, 3000, 200, False),
    (500, 700, 513, True),
    (4096, 4096, 256, True),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_gpu_kernels_match_the_oracle(
    shape: tuple[int, int, int, bool], masked: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, keys, width, symmetric = shape
    query, key = unit(rows, width, dtype, 1), unit(keys, width, dtype, 2)
    options = {**(everything(rows, keys, dtype) if masked else {"scale": torch.tensor(14.3)}), "symmetric": symmetric}

    def there(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(x.cuda() for x in value)
        return value.cuda() if isinstance(value, Tensor) else value

    on_gpu = {name: there(value) for name, value in options.items()}
    ours, stats = run(query.cuda(), key.cuda(), **on_gpu)
    again, _ = run(query.cuda(), key.cuda(), **on_gpu)
    assert all(torch.equal(a, b) for a, b in zip(ours.values(), again.values(), strict=True))
    oracle, exact_stats = exact(monkeypatch, query, key, options)
    limit = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: torch.finfo(torch.bfloat16).eps}[dtype]
    for name, tensor in ours.items():
        assert max(errors(tensor.cpu(), oracle[name])) <= (5e-6 if name == "value" else limit), name
    torch.testing.assert_close(stats.lse.cpu().double(), exact_stats.lse.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 512])
def test_gpu_loss_and_gradients_are_captured_in_a_graph(width: int) -> None:
    query, key = (unit(700, width, torch.bfloat16, seed).cuda().requires_grad_() for seed in (1, 2))

    def step() -> tuple[Tensor, ...]:
        value = info_nce(query, key, scale=20.0)
        return (value, *torch.autograd.grad(value, [query, key]))

    assert_captured(step)


@pytest.mark.gpu
def test_gpu_memory_stays_far_below_the_matrix_of_logits() -> None:
    query, key = (unit(16384, 768, torch.bfloat16, seed).cuda().requires_grad_() for seed in (1, 2))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    info_nce(query, key, scale=20.0, workspace_bytes=2**26).backward()
    assert torch.cuda.max_memory_allocated() - before < 16384 * 16384 * 2
