"""Work that several processes share: a training, and a store of items; ranks of ``torchrun`` on one machine, or, for a
store, tasks of a Ray Data job over many.

For a store each encodes some of the items and writes them as parts into a folder beside it; one then joins the parts,
in the order of the items. The folder, the run and the items must be where all of them can read and write.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from .console import FAILED, INTERRUPTED, Interrupted
from .runs import TrainedRun, open_run

if TYPE_CHECKING:
    from torch.distributed import Store

    from ..adaptation import Catalogue
    from ..recommender.encoder import ItemEncoder
    from ..recommender.parallel import Alone
    from ..recommender.store import Meta

__all__ = ["build_with_ray", "build_with_torchrun", "training_ranks", "under_torchrun"]

# Parts per worker, so that all end at about the same time; and items of a part at most, which are in memory at once.
_PARTS, _MOST = 4, 4096

# Ranks wait for the slowest, which may have hours of work; one that failed waits a moment whether others did too.
_WORK, _MOMENT = timedelta(days=7), timedelta(seconds=10)


def under_torchrun() -> bool:
    """Whether this process is one of several that ``torchrun`` started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def _joined() -> Iterator[tuple[int, int, Store]]:
    """Inside, this process is one of those that ``torchrun`` started, with its share of the cores: rank, number, and
    what they all can write to."""
    import torch
    from torch import distributed
    from torch.distributed.rendezvous import rendezvous

    store, rank, world = next(iter(rendezvous("env://")))
    distributed.init_process_group("gloo", timeout=_WORK, store=store, rank=rank, world_size=world)
    try:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", world))))
        yield rank, world, store
    finally:
        distributed.destroy_process_group()


@contextmanager
def training_ranks(parallel: str | None) -> Iterator[Alone]:
    """Who trains together: this process alone, or all that ``torchrun`` started, of which the first one speaks.

    Args:
        parallel: see :func:`.several`; None: "ddp" where there are several.

    Raises:
        ValueError: ``parallel`` without ``torchrun``, or another word.
    """
    from ..recommender.parallel import ALONE, PARALLEL, several

    if parallel not in (None, *PARALLEL):
        raise ValueError(f"--parallel must be one of {', '.join(PARALLEL)}, got {parallel!r}")
    if not under_torchrun():
        if parallel is not None and "WORLD_SIZE" not in os.environ:
            raise ValueError(
                f"--parallel {parallel} needs several processes: torchrun --nproc-per-node 2 -- $(which mmrec) train …"
            )
        yield ALONE
        return
    with _joined() as (rank, _, store), _one_voice(rank, store):
        yield several(parallel or PARALLEL[0])


@contextmanager
def _one_voice(rank: int, store: Store) -> Iterator[None]:
    """Inside, only the first rank writes to stdout and stderr. The others wait for its end; of those that fail at the
    same time the first one says why."""
    try:
        with ExitStack() as stack:
            if rank:
                nothing = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(redirect_stdout(nothing))
                stack.enter_context(redirect_stderr(nothing))
                logging.disable(logging.WARNING)
                stack.callback(logging.disable, logging.NOTSET)
            yield
    except (Exception, KeyboardInterrupt) as error:
        # The first one that leaves has torchrun end the others, who have something to say.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        code = INTERRUPTED if isinstance(error, Interrupted | KeyboardInterrupt) else FAILED
        store.set(f"ended/{rank}", str(code))
        if _failed(store, range(rank), _MOMENT):
            raise SystemExit(code) from error
        raise
    store.set(f"ended/{rank}", "0")
    _failed(store, range(min(rank, 1)), _WORK)


def _failed(store: Store, ranks: range, patience: timedelta) -> bool:
    """Whether one of these failed; no, if they do not all say how they ended in time."""
    keys = [f"ended/{rank}" for rank in ranks]
    try:
        store.wait(keys, patience)
    except RuntimeError:
        return False
    return any(store.get(key) != b"0" for key in keys)


def build_with_torchrun(run: TrainedRun, items: Path, folder: Path, meta: Meta, encoder: ItemEncoder) -> bool:
    """Encodes this rank's items; rank 0 joins what all ranks wrote. Whether this is rank 0.

    Raises:
        RuntimeError: on all ranks, where one failed; nothing was written then.
    """
    from torch import distributed

    with _joined() as (rank, world, _), ExitStack() as stack:
        catalogue = _catalogue(items, encoder)
        told = [""]
        if rank == 0:
            told = [str(_parts_folder(folder))]
            stack.callback(shutil.rmtree, told[0], ignore_errors=True)
        distributed.broadcast_object_list(told)
        parts = Path(told[0])
        error = _attempt(lambda: _write_share(encoder, catalogue, parts, meta, rank, world))
        _agree(error)
        if rank == 0:
            error = _attempt(lambda: _join(folder, meta, parts, _ranges(catalogue.num_items, world)))
        _agree(error)
        return rank == 0


def _attempt(work: Callable[[], object]) -> Exception | None:
    try:
        work()
    except Exception as error:  # the others wait: they have to hear of it
        return error
    return None


def _agree(error: Exception | None) -> None:
    """Goes on where all ranks do."""
    from torch import distributed

    told: list[str | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(told, None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for rank, failure in enumerate(told):
        if failure is not None:
            raise RuntimeError(f"rank {rank} failed ({failure}): nothing was written")


def _write_share(encoder: ItemEncoder, catalogue: Catalogue, parts: Path, meta: Meta, rank: int, world: int) -> None:
    if not parts.is_dir():
        raise ValueError(f"{parts.parent} is not the same for all ranks: it must be on a disk that they share")
    for start, stop in _ranges(catalogue.num_items, world)[rank::world]:
        _write(encoder, catalogue, parts, meta, start, stop)


def _ranges(items: int, workers: int) -> list[tuple[int, int]]:
    """Half-open ranges of items; one that is empty where there are none."""
    size = max(1, min(_MOST, -(-items // (_PARTS * workers))))
    return [(start, min(start + size, items)) for start in range(0, max(items, 1), size)]


def _write(encoder: ItemEncoder, catalogue: Catalogue, parts: Path, meta: Meta, start: int, stop: int) -> Path:
    from ..recommender.store import write_part

    path = _part(parts, start)
    write_part(path, encoder.encode_part(catalogue, start, stop), meta)
    return path


def _part(parts: Path, start: int) -> Path:
    return parts / f"{start:012d}.safetensors"


def _join(folder: Path, meta: Meta, parts: Path, ranges: list[tuple[int, int]]) -> None:
    from ..recommender.store import ItemStore

    files = [_part(parts, start) for start, _ in ranges]
    absent = [file for file in files if not file.is_file()]
    if absent:
        raise ValueError(
            f"{len(absent)} of {len(files)} parts are not in {parts}, which all must share: nothing is written"
        )
    with ItemStore(folder).writer() as writer:
        writer.join(meta, files)


def _parts_folder(folder: Path) -> Path:
    """A new one beside the store, which removes what it does not know."""
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f"{folder.name}.parts-", dir=folder.absolute().parent))


def _catalogue(items: Path, encoder: ItemEncoder) -> Catalogue:
    from ..adaptation import Catalogue

    return Catalogue.load_items(items, encoder.recipe.schema)


class _Encoding:
    """What a Ray actor keeps: the run and the items, read once."""

    def __init__(self, run: str, items: str, parts: str, meta: Meta) -> None:
        self.encoder = open_run(run).item_encoder()
        self.catalogue = _catalogue(Path(items), self.encoder)
        self.parts, self.meta = Path(parts), meta

    def __call__(self, batch: dict[str, Sequence[int]]) -> dict[str, list[str]]:
        ranges = zip(map(int, batch["start"]), map(int, batch["stop"]), strict=True)
        written = [_write(self.encoder, self.catalogue, self.parts, self.meta, *part) for part in ranges]
        return {"part": [str(path) for path in written]}


def build_with_ray(
    run: TrainedRun, items: Path, folder: Path, meta: Meta, encoder: ItemEncoder, workers: int | None
) -> None:
    """A Ray Data job over the items, on the cluster that ``RAY_ADDRESS`` names or else on this machine.

    Args:
        workers: most actors at a time; None: as many as the cluster has CPUs.

    Raises:
        ImportError: Ray is not installed.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ImportError("--engine ray needs Ray Data: pip install mmrec-kernels[ray]") from error
    count = _catalogue(items, encoder).num_items
    parts = _parts_folder(folder)
    started = not ray.is_initialized()
    try:
        if started:
            ray.init(log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
        ray.data.DataContext.get_current().enable_progress_bars = False
        most = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        ranges = _ranges(count, most)
        rows = [{"start": start, "stop": stop} for start, stop in ranges]
        job = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _Encoding, batch_size=1, concurrency=(1, min(most, len(rows))), num_cpus=1,
            fn_constructor_args=(str(run.folder.absolute()), str(items.absolute()), str(parts.absolute()), meta),
        )  # fmt: skip
        job.take_all()
        _join(folder, meta, parts, ranges)
    finally:
        shutil.rmtree(parts, ignore_errors=True)
        if started:
            ray.shutdown()
