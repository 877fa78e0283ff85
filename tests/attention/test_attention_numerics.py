"""Errors against the float64 reference: at most twice those of eager torch in the same dtype, plus the floor."""

import pytest
import torch
from attention_oracle import EVERYTHING, FLAGS, Case, gradients, oracle

from mmrec_kernels.attention import cross_modal_attention

pytestmark = pytest.mark.usefixtures("provider")

FLOORS = {torch.float32: 1e-6, torch.bfloat16: 3e-5}

PROBLEMS = {
    "plain": lambda: Case([[20, 5, 13]], [3, 2, 4], width=16, value_width=16),
    "segments": lambda: Case([[9, 0, 20], [7, 7, 1], [3, 2, 30]], [3, 2, 4], width=32, extras=EVERYTHING),
    "latent, indexed": lambda: Case([[9, 6, 20], [7, 7, 1]], width=16, indexed=(0, 1), extras=("log_bias", "sink")),
    "causal": lambda: Case([[12, 7]], [12, 7], width=16, causal=(0,), extras=("query_norm", "key_norm")),
}


def errors(x, exact):
    """The error in the maximum and in the 2-norm, each scaled by that of `exact`."""
    x, difference = x.double(), (x.double() - exact).flatten()
    largest, norm = exact.abs().amax().item(), exact.norm().item()
    return difference.abs().max().item() / (largest or 1), difference.norm().item() / (norm or 1)


@pytest.mark.parametrize("dtype", FLOORS)
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("sharpness", [1.0, 6.0])
def test_errors_are_within_twice_those_of_eager(name, dtype, sharpness, provider):
    case = PROBLEMS[name]()
    case.leaves = {n: x.to(dtype) for n, x in case.leaves.items()}
    case.leaves["query"] = case.leaves["query"] * sharpness
    g = torch.Generator().manual_seed(3)
    found = {}
    for who, function, precision, more in (
        ("exact", cross_modal_attention, torch.float64, FLAGS),
        ("ours", cross_modal_attention, dtype, FLAGS),
        ("eager", oracle, dtype, {}),
    ):
        leaves = case.to(precision)
        outputs = case.call(function, leaves, **more)
        if who == "exact":
            upstream = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(dtype) for x in outputs]
        grads = gradients(outputs, leaves, upstream)
        named = dict(zip(("out", "lse", "mass"), outputs, strict=True)) | {f"d{n}": x for n, x in grads.items()}
        found[who] = {n: torch.where(x.isfinite(), x, 0).detach() for n, x in named.items()}
    for n, exact in found["exact"].items():
        ours, eager = errors(found["ours"][n], exact), errors(found["eager"][n], exact)
        for norm, mine, theirs in zip(("max", "2-norm"), ours, eager, strict=True):
            # Stores of bfloat16 truncate in Triton's interpreter.
            floor = FLOORS[dtype] + (torch.finfo(dtype).eps if provider == "triton" and dtype == torch.bfloat16 else 0)
            assert mine <= 2 * theirs + floor, f"{n}, {norm}: ours {mine:.2e}, eager {theirs:.2e}"


@pytest.mark.parametrize("seed", range(12))
def test_random_lengths(seed):
    """Zeros first, last, in the middle and everywhere; every feature on or off."""
    g = torch.Generator().manual_seed(seed)

    def draw(high, *shape):
        return torch.randint(0, high, shape, generator=g).tolist()

    batch, count = 1 + draw(5, 1)[0], 1 + draw(4, 1)[0]
    lengths = [[n * on for n, on in zip(draw(6, batch), draw(2, batch), strict=True)] for _ in range(count)]
    on = draw(2, 7 + 2 * count)
    case = Case(
        lengths, draw(4, batch) if on[0] else None, around=on[1], seed=seed,
        extras=[name for name, use in zip(EVERYTHING, on[2:7], strict=True) if use],
        indexed=[m for m in range(count) if on[7 + m]], causal=[m for m in range(count) if on[7 + count + m]],
    )  # fmt: skip
    results = []
    for function, more in ((cross_modal_attention, FLAGS), (oracle, {})):
        leaves = case.to(torch.float64)
        outputs = case.call(function, leaves, **more)
        results.append((outputs, gradients(outputs, leaves, [torch.ones_like(x) for x in outputs])))
    (x, dx), (y, dy) = results
    for a, b in zip([*x, *dx.values()], [*y, *dy.values()], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
