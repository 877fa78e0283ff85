"""Kernels on tensors that end, or begin, at memory that must not be touched: mapped files end like that.

Reading beyond them ends the process, so another one does it: this file as a script, which draws the problems of the
five ops' property tests.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

TESTS = Path(__file__).parent.parent
OPS = ("attention", "infonce", "nf4", "retrieval", "routing")


def script(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "faulthandler", __file__, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect")
def test_nothing_beyond_a_tensor_is_read() -> None:
    done = script(*OPS)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == list(OPS)


@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect")
def test_a_read_beyond_is_seen() -> None:
    """Raw ops are private and take their caller's word for shapes: a bias that is too short is read beyond its end."""
    assert script("beyond").returncode == -signal.SIGSEGV


def _found(run: Callable[[bool | None], Any]) -> None:
    """The same bits from tensors at the end of pages and at their beginning as from any."""
    from strategies import same_bits

    first, *others = (run(where) for where in (None, True, False))
    for other in others:
        assert all(same_bits(a, b) for a, b in zip(first, other, strict=True))


def _draw(op: str) -> None:
    """The problems of `op`, each three times."""
    sys.path[:0] = [str(TESTS), str(TESTS / op)]
    import hypothesis.strategies as st
    from hypothesis import given

    from strategies import GuardPages, examples, normal

    dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])

    def moved(value: Any, where: bool | None, pages: GuardPages) -> Any:
        if isinstance(value, dict):
            return {n: moved(v, where, pages) for n, v in value.items()}
        if isinstance(value, tuple | list):
            return type(value)(moved(v, where, pages) for v in value)
        return value if where is None or not isinstance(value, torch.Tensor) else pages.place(value, where)

    def attention(data: Any, dtype: torch.dtype) -> Callable[..., Any]:
        import test_attention_properties as module
        from attention_oracle import FLAGS

        case = data.draw(module.cases(dtype))
        results = case.call(module.cross_modal_attention, **FLAGS)
        upstream, plan = (
            [normal(n, *x.shape).to(x.dtype) for n, x in enumerate(results)],
            (case.plan, case.query_offsets),
        )
        return lambda move: module.run(
            case, module.cross_modal_attention, move(case.leaves), move(plan), move(upstream), **FLAGS
        )

    def infonce(data: Any, dtype: torch.dtype) -> Callable[..., Any]:
        import test_infonce_properties as module

        given_ = data.draw(module.problems(dtype))
        upstream = normal(0, len(given_["query"])).to(dtype)
        return lambda move: module.run(module.info_nce, move(given_), move(upstream), reduction="none")

    def nf4(data: Any, dtype: torch.dtype) -> Callable[..., Any]:
        import dataclasses

        import test_nf4_properties as module

        given_ = data.draw(module.problems(dtype))
        weight = given_["weight"]
        upstream = normal(0, len(given_["x"]), weight.shape[0]).to(dtype)
        parts = {n: getattr(weight, n) for n in module.FIELDS}

        def run(move: Any) -> Any:
            there = dataclasses.replace(weight, **move(parts))
            return [*module.run(move(given_) | {"weight": there}, move(upstream)), there.dequantize()]

        return run

    def retrieval(data: Any, dtype: torch.dtype) -> Callable[..., Any]:
        import test_topk_properties as module

        given_ = data.draw(module.problems())[0]
        return lambda move: module.top_k(**move(given_))

    def routing(data: Any, dtype: torch.dtype) -> Callable[..., Any]:
        import test_experts_properties as experts
        import test_routing_properties as module

        given_, mixture = data.draw(module.routers(dtype)), data.draw(experts.mixtures(dtype))
        upstream = [normal(0, len(given_["x"]), given_["k"]), normal(1, 4, given_["num_modalities"])]
        above = normal(2, *mixture["x"].shape).to(dtype)
        return lambda move: [
            *module.run_route(module.route, move(given_), move(upstream)),
            *experts.run_mix(experts.mix, move(mixture), move(above)),
        ]

    make = {"attention": attention, "infonce": infonce, "nf4": nf4, "retrieval": retrieval, "routing": routing}[op]

    @examples(40)
    @given(st.data(), dtypes)
    def search(data: Any, dtype: torch.dtype) -> None:
        pages = GuardPages()
        run = make(data, dtype)
        _found(lambda where: run(lambda value: moved(value, where, pages)))

    search()


def _beyond() -> None:
    sys.path.insert(0, str(TESTS))
    from mmrec_kernels import schemas
    from strategies import GuardPages

    bias = GuardPages().place(torch.zeros(8), at_end=True)
    schemas.retrieval_topk(torch.ones(3, 8), torch.ones(5000, 8), 3, None, bias, *[None] * 4, False)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for argument in sys.argv[1:]:
        if argument == "beyond":
            _beyond()
        else:
            _draw(argument)
            print(argument, flush=True)
