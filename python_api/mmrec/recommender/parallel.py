"""Training in several processes: which part of a step is a rank's, and what ranks tell each other.

Every rank reads the same data and builds the same batches. Of a step it takes some windows of the batch, and it encodes
some of the items; the item vectors are gathered, with gradients. What a rank's loss is, is chosen so that the *mean*
over ranks, of losses and of gradients, is that of one process with the whole batch: a gather's backward sums over the
ranks, so a loss that every rank computes in full counts W times and is divided by W.

Draws that ranks must agree on (negatives, the sample that is aligned, the texts read anew) come from one random state,
which is where it would be in one process without dropout; all others come from a state of their own.
"""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, distributed, nn

from .batches import Batch

if TYPE_CHECKING:
    from mmrec_kernels import RouterLosses

    from .objective import Losses

__all__ = ["ALONE", "PARALLEL", "Alone", "Replicas", "several"]

PARALLEL = ("ddp", "fsdp")

T = TypeVar("T")

# A rank that does not answer a step for so long is lost. Waiting for work of one rank alone has no limit.
_STEP = timedelta(minutes=30)


class Alone:
    """One process: all of a step is its own, and there is nobody to tell.

    Attributes:
        rank, size: of the processes.
        sharded: whether parameters and moments lie in parts on the ranks.
        signals: those that end training after the step at hand.
    """

    rank, size = 0, 1
    sharded = False
    signals: tuple[signal.Signals, ...] = (signal.SIGINT,)

    # Of a step.

    def share(self, items: Tensor) -> Tensor:
        """This rank's of `items [N, …]`."""
        return items

    def windows(self, batch: Batch) -> tuple[Batch, Tensor | None]:
        """This rank's windows, and where their positions are in the batch, int64; None: they are the batch."""
        return batch, None

    def gather(self, own: Tensor, count: int) -> Tensor:
        """The `count` rows of which every rank has its `share`, with gradients."""
        return own

    def sample(
        self, parts: Mapping[str, Tensor], masks: Mapping[str, Tensor], chosen: Tensor, count: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Rows `chosen` (int64, of `count` in all) of `parts [n, d]` and `masks [n]`, of which every rank has its
        `share`; in any order, the same for all."""
        return _rows(parts, chosen), _rows({name: masks[name] for name in parts}, chosen)

    def weigh(self, loss: Tensor, own: int, count: int) -> Tensor:
        """A mean over `own` of `count` rows, so that the mean over ranks is that over all rows."""
        return loss

    def weigh_routed(self, losses: RouterLosses, load: Tensor) -> RouterLosses:
        """The same for means over the tokens of each modality; `load [M, E]` counts this rank's."""
        return losses

    def together(self) -> AbstractContextManager[None]:
        """Inside, all ranks draw the same numbers."""
        return nullcontext()

    def apart(self, seed: int, step: int) -> AbstractContextManager[None]:
        """Around a step: ranks draw numbers of their own, but for `together`."""
        return nullcontext()

    def average(self, losses: Losses) -> Losses:
        """Means of the losses over ranks, and the sum of the load; without gradients where there are several."""
        return losses

    # Of weights.

    def equalize(self, tensors: Iterable[Tensor]) -> None:
        """Every rank's become those of the first."""

    def wrap(self, step: nn.Module, *, unused: bool) -> nn.Module:
        """A module that is called like `step` and whose backward averages gradients. `unused`: a step may leave some
        parameters out."""
        return step

    def settle(self, parameters: Sequence[nn.Parameter]) -> None:
        """Averages the gradients that the backward did not."""

    def clip(self, parameters: Sequence[nn.Parameter], most: float) -> None:
        """Scales all gradients to norm `most` together, where they exceed it."""
        nn.utils.clip_grad_norm_(parameters, most)

    def whole(self, step: nn.Module) -> AbstractContextManager[None]:
        """Inside, the modules of the wrapped `step` hold whole parameters."""
        return nullcontext()

    def full(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors of those that lie in parts."""
        return dict(tensors)

    def parts(self, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse: this rank's parts, as the tensors of the same name in `like` lie."""
        return dict(tensors)

    # Of the processes.

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether a rank has it set."""
        return flags

    def check_same(self, value: object, where: object) -> None:
        """ValueError on all ranks unless all read the same `value` in the folder `where`."""

    def by_first(self, work: Callable[[], T]) -> T:
        """What the first rank gets from `work`, told to all. The others wait, and fail where it fails."""
        return work()

    def in_turn(self, work: Callable[[], T]) -> T:
        """`work` of the first rank, then that of the others: they find what it has cached."""
        return work()

    def guarded(self) -> AbstractContextManager[None]:
        """Inside, a rank that is gone is a ConnectionError that says so."""
        return nullcontext()


ALONE = Alone()


class Replicas(Alone):
    """The ranks of torch.distributed's default group, each with whole weights: DistributedDataParallel. Every rank
    makes the same calls."""

    signals = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        # What the backward of a gather sends must not get between the wrapper's own messages.
        self._group, self._reducing = (distributed.new_group(backend="gloo", timeout=_STEP) for _ in range(2))
        self._common = torch.get_rng_state()

    def _bounds(self, count: int) -> list[int]:
        return [count * rank // self.size for rank in range(self.size + 1)]

    def share(self, items: Tensor) -> Tensor:
        start, stop = self._bounds(len(items))[self.rank :][:2]
        return items[start:stop]

    def windows(self, batch: Batch) -> tuple[Batch, Tensor | None]:
        ends = batch.offsets
        # As many positions for each as whole windows allow: a window is of the rank in whose part its middle lies.
        twice_middle = ends[:-1] + ends[1:]
        twice_bounds = 2 * torch.tensor(self._bounds(int(ends[-1])), device=ends.device)
        first, last = torch.searchsorted(twice_middle, twice_bounds)[self.rank :][:2].tolist()
        start, stop = ends[[first, last]].tolist()
        own = Batch(batch.index[start:stop], ends[first : last + 1] - start, batch.target[start:stop])
        return own, torch.arange(start, stop, device=ends.device)

    def gather(self, own: Tensor, count: int) -> Tensor:
        return self._all_rows(own, np.diff(self._bounds(count)).tolist())

    def _all_rows(self, own: Tensor, counts: list[int]) -> Tensor:
        from mmrec_kernels.infonce.group import all_gather_rows

        return all_gather_rows(own, counts, self._group) if sum(counts) else own

    def sample(
        self, parts: Mapping[str, Tensor], masks: Mapping[str, Tensor], chosen: Tensor, count: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        bounds = torch.tensor(self._bounds(count), device=chosen.device)
        rank_of = torch.searchsorted(bounds, chosen, right=True) - 1
        counts = torch.bincount(rank_of, minlength=self.size).tolist()
        own = chosen[rank_of == self.rank] - bounds[self.rank]
        mine, mask = super().sample(parts, masks, own, count)
        # In one message, so that there is no order to get wrong.
        values = self._all_rows(torch.cat(list(mine.values()), dim=1), counts)
        present = self._all_rows(torch.stack(list(mask.values()), dim=1), counts)
        widths = [part.shape[1] for part in mine.values()]
        return (
            dict(zip(mine, values.split(widths, dim=1), strict=True)),
            dict(zip(mask, present.unbind(1), strict=True)),
        )

    def weigh(self, loss: Tensor, own: int, count: int) -> Tensor:
        return loss * (self.size * own / max(count, 1))

    def weigh_routed(self, losses: RouterLosses, load: Tensor) -> RouterLosses:
        own = load.sum(1)
        total = own.clone()
        distributed.all_reduce(total, group=self._group)
        weight = self.size * own / total.clamp(min=1)
        return type(losses)(*(loss * weight for loss in losses))

    @contextmanager
    def together(self) -> Iterator[None]:
        own = torch.get_rng_state()
        torch.set_rng_state(self._common)
        try:
            yield
        finally:
            self._common = torch.get_rng_state()
            torch.set_rng_state(own)

    @contextmanager
    def apart(self, seed: int, step: int) -> Iterator[None]:
        self._common = torch.get_rng_state()
        # A function of the step, so that a checkpoint need not hold the states of all ranks.
        own = int(np.random.SeedSequence([seed, step, self.rank]).generate_state(1, np.uint64)[0])
        torch.set_rng_state(torch.Generator().manual_seed(own).get_state())
        try:
            yield
        finally:
            torch.set_rng_state(self._common)

    def average(self, losses: Losses) -> Losses:
        given = [value for value in losses if value is not None]
        told = torch.cat([value.detach().double().reshape(-1) for value in given])
        distributed.all_reduce(told, group=self._group)
        parts = iter(told.split([value.numel() for value in given]))
        found = [None if value is None else next(parts).view(value.shape) for value in losses]
        scalars = [value is not None and value.ndim == 0 for value in losses]
        return type(losses)(*(x / self.size if s else x for x, s in zip(found, scalars, strict=True)))  # type: ignore

    def equalize(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            if tensor.numel():
                data = tensor.detach()
                # Not every backend has bool.
                distributed.broadcast(data.view(torch.uint8) if data.dtype == torch.bool else data, 0)

    def wrap(self, step: nn.Module, *, unused: bool) -> nn.Module:
        with warnings.catch_warnings():
            # torch 2.13 renamed it, 2.10 has no other name.
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
            return nn.parallel.DistributedDataParallel(
                step, process_group=self._reducing, broadcast_buffers=False, init_sync=False,
                find_unused_parameters=unused,
            )  # fmt: skip

    def any(self, *flags: bool) -> tuple[bool, ...]:
        told = torch.tensor(flags, dtype=torch.int32)
        distributed.all_reduce(told, group=self._group)
        return tuple((told > 0).tolist())

    def check_same(self, value: object, where: object) -> None:
        told: list[Any] = [None] * self.size
        distributed.all_gather_object(told, value)
        for rank, theirs in enumerate(told):
            if theirs != told[0]:
                raise ValueError(
                    f"{where} must be on a disk that all processes share: process 0 found {told[0]} there, process "
                    f"{rank} found {theirs}"
                )

    def by_first(self, work: Callable[[], T]) -> T:
        told = [self._first(work)]
        distributed.broadcast_object_list(told)
        return told[0]  # type: ignore[return-value]

    def in_turn(self, work: Callable[[], T]) -> T:
        result = self._first(work)
        return work() if self.rank else result  # type: ignore[return-value]

    def _first(self, work: Callable[[], T]) -> T | None:
        result, error, said = None, None, [""]
        if self.rank == 0:
            try:
                result = work()
            except (Exception, KeyboardInterrupt) as failure:  # the others wait: they have to hear of it
                error = failure
                said = [f"{type(failure).__name__}: {failure}"]
        distributed.broadcast_object_list(said)
        if error is not None:
            raise error
        if said[0]:
            raise RuntimeError(f"process 0 failed ({said[0]})")
        return result

    @contextmanager
    def guarded(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if "gloo" not in str(error):
                raise
            raise ConnectionError(
                f"a process of this training is gone or does not answer ({_reason(error)}); --resume goes on from "
                "the last checkpoint"
            ) from error


def several(parallel: str = "ddp") -> Replicas:
    """The ranks of torch.distributed's default group, which all have joined, for :func:`.train`.

    Args:
        parallel: "ddp", whole weights on every rank, or "fsdp", parts of them (:class:`.Shards`).

    Raises:
        ValueError: another way.
    """
    if parallel not in PARALLEL:
        raise ValueError(f"parallel must be one of {PARALLEL}, got {parallel!r}")
    if parallel == "ddp":
        return Replicas()
    from .training.shards import Shards

    return Shards()


def _rows(parts: Mapping[str, Tensor], chosen: Tensor) -> dict[str, Tensor]:
    return {name: part.index_select(0, chosen) for name, part in parts.items()}


def _reason(error: BaseException) -> str:
    # Before it stands where in gloo's source it was noticed, after it advice.
    return str(error).strip().splitlines()[0].rsplit("] ", 1)[-1].split(". ")[0]
