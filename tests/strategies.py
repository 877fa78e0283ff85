"""What property tests share: how many examples there are, sizes, values, and tensors amid memory that nobody may read.

`MMREC_EXAMPLES=5000` draws that many examples of each property, other ones on every run; by default they are few and
the same each time.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from torch import Tensor

from numerics import assert_accurate

INT64 = torch.iinfo(torch.int64)
# What memory around a tensor holds: as an offset or an index none of these leads anywhere.
_POISON = {torch.int64: 2**62, torch.int32: 2**30, torch.int8: 127, torch.uint8: 255, torch.bool: True}


def examples(default: int) -> Callable[..., Any]:
    """Decorator: how many examples of a property are drawn; those of a run without `MMREC_EXAMPLES` never change."""
    wanted = os.environ.get("MMREC_EXAMPLES")
    # Shrinking takes minutes where an example takes a while; what was drawn is printed without it.
    return settings(
        max_examples=default if wanted is None else int(wanted),
        derandomize=wanted is None,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate],
    )


def sizes(*tiles: int, least: int = 0) -> st.SearchStrategy[int]:
    """Nothing, one, few, odd ones, and one less and one more than each of the kernels' `tiles`."""
    around = {n + more for n in tiles for more in (-1, 0, 1)}
    return st.sampled_from([n for n in sorted({0, 1, 2, 3, 5, 7} | around) if n >= least])


class Layout(NamedTuple):
    """Where a tensor lies in its memory: per axis a step and free entries before it, axes last to first if `turned`,
    and whether all entries of the first axis are one (stride 0)."""

    steps: tuple[int, ...]
    before: tuple[int, ...]
    turned: bool
    expanded: bool


@st.composite
def layouts(draw: Any, axes: int, *, expanded: bool = False) -> Layout:
    """Contiguous, at an offset, rows or columns apart, transposed; with `expanded`, at times one row for all."""
    few = st.tuples(*[st.sampled_from([1, 1, 2])] * axes)
    return Layout(draw(few), draw(st.tuples(*[st.sampled_from([0, 1, 3])] * axes)), draw(st.booleans()),
                  expanded and draw(st.integers(0, 5)) == 0)  # fmt: skip


class Memory:
    """Tensors of a test, each amid poison: NaN, or integers that lead nowhere."""

    def __init__(self) -> None:
        self._held: list[tuple[Tensor, Tensor, Tensor, int]] = []

    def place(self, values: Tensor, layout: Layout, poison: float | None = None) -> Tensor:
        """`values` as a view of larger memory; of an expanded layout the first row of them, for all rows."""
        rows = values.shape[0] if values.ndim else 1
        values = values[:1] if layout.expanded and rows > 1 else values
        axes = list(range(values.ndim))[:: -1 if layout.turned else 1]
        sizes_ = [layout.before[a] + values.shape[a] * layout.steps[a] + 2 for a in axes]
        if poison is None:
            poison = torch.nan if values.is_floating_point() else _POISON[values.dtype]
        room = torch.full(sizes_ or [3], poison, dtype=values.dtype)
        view = room[1] if not axes else room.permute([axes.index(a) for a in range(values.ndim)])
        for axis in range(values.ndim):
            start, step = layout.before[axis], layout.steps[axis]
            view = view.narrow(axis, start, values.shape[axis] * step)
            view = view[(slice(None),) * axis + (slice(None, None, step),)]
        view.copy_(values)
        if layout.expanded and rows > 1:
            view = view.expand(rows, *values.shape[1:])
        self._held.append((view, room, room.clone(), view._version))
        return view

    def assert_untouched(self) -> None:
        """Nobody has written to any of these tensors, nor around them."""
        for view, room, before, version in self._held:
            assert view._version == version
            assert same_bits(room, before)


class GuardPages:
    """Tensors that begin or end where a page begins that nobody may touch: a read beyond them ends the process."""

    def __init__(self) -> None:
        self._held: list[mmap.mmap] = []
        self._mprotect = ctypes.CDLL(None, use_errno=True).mprotect

    def place(self, values: Tensor, at_end: bool) -> Tensor:
        """A contiguous copy of `values`; of an empty one, itself."""
        size = values.numel() * values.element_size()
        if size == 0:
            return values
        page = mmap.PAGESIZE
        whole = -(-size // page) * page
        self._held.append(mmap.mmap(-1, whole + 2 * page))
        begin = ctypes.addressof(ctypes.c_char.from_buffer(self._held[-1]))
        for at in (0, page + whole):
            assert self._mprotect(ctypes.c_void_p(begin + at), page, 0) == 0
        start = page + (whole - size if at_end else 0)
        room = torch.frombuffer(self._held[-1], dtype=torch.uint8, count=size, offset=start)
        return room.view(values.dtype).view(values.shape).copy_(values)


class Problem(dict[str, Any]):
    """Arguments by name: tensors, tuples of them, and whatever else. Shown by its shapes."""

    def __repr__(self) -> str:
        shown = _each(self, lambda x: (list(x.shape), x.dtype) if x.ndim else x)  # type: ignore[arg-type, return-value]
        return str(dict(shown))


def _each(problem: Problem, change: Callable[[Tensor], Tensor]) -> Problem:
    def one(x: Any) -> Any:
        return tuple(map(one, x)) if isinstance(x, tuple) else change(x) if isinstance(x, Tensor) else x

    return Problem({name: one(value) for name, value in problem.items()})


def in_memory(problem: Problem, memory: Memory, draw: Any) -> Problem:
    """`problem` amid poison in drawn layouts; integers that fit are int32 at times."""

    def one(x: Tensor) -> Tensor:
        fits = x.dtype == torch.int64 and bool((x.abs() < 2**31).all())
        return memory.place(x.to(torch.int32) if fits and draw(st.booleans()) else x, draw(layouts(x.ndim)))

    return _each(problem, one)


def copied(problem: Problem, dtype: torch.dtype | None = None) -> Problem:
    """`problem` in contiguous memory of its own; its floats in `dtype`."""

    def one(x: Tensor) -> Tensor:
        return x.contiguous().clone().to(dtype if dtype is not None and x.is_floating_point() else x.dtype)

    return _each(problem, one)


def bits(x: Tensor) -> Tensor:
    """The bytes of `x`."""
    return x.detach().contiguous().reshape(-1).view(torch.uint8)


def same_bits(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and x.dtype == y.dtype and torch.equal(bits(x), bits(y))


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def integers(seed: int, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """In [low, high)."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


seeds = st.integers(0, 2**31 - 1)


def on_threads(count: int, run: Callable[[], Any]) -> Any:
    """What `run` returns when torch has `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return run()
    finally:
        torch.set_num_threads(before)


def assert_deterministic(run: Callable[[], Sequence[Tensor]], again: Callable[[], Sequence[Tensor]]) -> None:
    """Equal bits on a second run, on two threads, and from `again`: the same problem in contiguous memory."""
    first = on_threads(1, run)
    for other in (on_threads(1, run), on_threads(2, run), on_threads(1, again)):
        for n, (a, b) in enumerate(zip(first, other, strict=True)):
            assert same_bits(a, b), f"result {n}"


def judge(
    names: Sequence[str],
    ours: Sequence[Tensor],
    exact: Sequence[Tensor],
    eager: Callable[[int], Sequence[Tensor]],
    dtype: torch.dtype,
) -> None:
    """The rule of docs/numerics.md for every result, but eager's luck on a few numbers is not asked for: `eager(n)` for
    n from 0 to 3 is eager torch with its sums in another order, and no result is nearer than the oracle, rounded."""
    found: list[Sequence[Tensor]] = []
    assert len(names) == len(ours) == len(exact)
    for n, name in enumerate(names):
        for order in range(5):
            if order == len(found) < 4:
                found.append(eager(order))
            theirs = found[order][n] if order < 4 else exact[n].to(ours[n].dtype)
            try:
                assert_accurate(ours[n], exact[n], theirs, dtype=dtype)
                break
            except AssertionError as error:
                if order == 4:
                    raise AssertionError(f"{name}: {error}") from None


def bad_integers(length: int, low: int, high: int) -> st.SearchStrategy[list[int]]:
    """Lists of `length` in which at least one entry is outside [low, high): a neighbour, or as far as int64 goes."""
    far = [low - 1, low - 2, high, high + 1, 2**31, -(2**31) - 1, 2**32, INT64.max, INT64.min]
    outside = st.sampled_from([n for n in far if not low <= n < high and INT64.min <= n <= INT64.max])
    inside = st.integers(low, high - 1) if high > low else outside
    return st.tuples(
        st.lists(st.one_of(inside, outside), min_size=length, max_size=length), st.integers(0, length - 1), outside
    ).map(lambda t: [*t[0][: t[1]], t[2], *t[0][t[1] + 1 :]])


def bad_offsets(length: int, most: int) -> st.SearchStrategy[list[int]]:
    """Lists of `length` that are not non-decreasing inside [0, most]."""
    anything = st.sampled_from([-1, 0, 1, most, most + 1, 2**31, 2**32 + 1, INT64.max, INT64.min])
    drawn = st.lists(st.one_of(st.integers(0, most), anything), min_size=length, max_size=length)
    return drawn.filter(lambda x: x[0] < 0 or x[-1] > most or any(a > b for a, b in zip(x, x[1:], strict=False)))


@st.composite
def misfits(draw: Any, good: Tensor) -> tuple[str, Any]:
    """What is no integer tensor of the shape of `good` on its device: (how so, the object)."""
    how = draw(st.sampled_from(["dtype", "longer", "shorter", "axis", "device", "list"]))
    if how == "shorter" and good.shape[0] == 0:
        how = "longer"
    made = {
        "dtype": lambda: good.to(draw(st.sampled_from([torch.float32, torch.float64, torch.int16, torch.bool]))),
        "longer": lambda: torch.cat([good, good[-1:] if len(good) else good.new_zeros(1)]),
        "shorter": lambda: good[:-1],
        "axis": lambda: good[None],
        "device": lambda: good.to("meta"),
        "list": lambda: good.tolist(),
    }  # fmt: skip
    return how, made[how]()


def refuses(name: str, run: Callable[[], Any]) -> None:
    """`run` raises a ValueError or TypeError that begins with the argument's `name`."""
    with pytest.raises((ValueError, TypeError)) as caught:
        run()
    assert str(caught.value).startswith(name), caught.value
