"""``mmrec serve``: a trained run over HTTP."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import parse_json
from .console import say, status
from .data import load_catalogue
from .index import write_store
from .runs import TrainedRun, open_run

if TYPE_CHECKING:
    from ..recommender import OnlineRecommender, Plan, Reranker
    from ..recommender.serving.upsert import Encode

__all__ = ["TOKEN", "default_threads", "load_reranker", "serve_command"]

_LOG = logging.getLogger(__name__)
STORE, TOKEN = "store", "MMREC_TOKEN"
_LOCAL = ("127.0.0.1", "localhost", "::1")


def serve_command(
    *, run: Path, store: Path | None, data: Path | None, layout: str, host: str, port: int, threads: int | None,
    max_batch: int, timeout: float, read_only: bool, costs: Path | None, calibrate_seconds: float, plans: Path | None,
    ann: str | None, reranker: str | None, quantize: str, access_log: bool,
) -> None:  # fmt: skip
    """See ``mmrec serve --help``."""
    import torch

    from ..recommender.serving import Settings, create_app, serve

    token = os.environ.get(TOKEN) or None
    if not read_only and token is None and host not in _LOCAL:
        raise ValueError(
            f"--host {host}: whoever reaches it could change items; give --read-only, or a token in ${TOKEN}"
        )
    hosts = (*_LOCAL, "[::1]") if host in _LOCAL else None
    settings = Settings(max_batch=max_batch, timeout=timeout, writable=not read_only, token=token, hosts=hosts)
    torch.set_num_threads(default_threads() if threads is None else threads)
    opened = open_run(run)
    folder = run / STORE if store is None else store
    image = _images(opened, data, layout, folder)
    online = _online(opened, folder, ann, reranker, quantize)
    _set_costs(online, costs, calibrate_seconds, {} if plans is None else _worth(plans, opened.model_id))
    version = online.version
    say(f"{len(version)} items of {opened.label} in {version.meta.dtype}, version {version.number} of {folder}")
    logging.getLogger("mmrec").setLevel(logging.INFO)
    serve(
        create_app(online, settings, image=image, encode=_encode(opened)), host=host, port=port, access_log=access_log
    )


def default_threads() -> int:
    """For the model: one core is left to connections."""
    return max(1, len(os.sched_getaffinity(0)) - 1)


def _images(run: TrainedRun, data: Path | None, layout: str, store: Path) -> Callable[[str], Path | None] | None:
    """Where items' images lie; writes the store if there is none. Without the data there are no images."""
    folder = run.data if data is None else data
    missing = not any(store.glob("version-*.json"))
    try:
        catalogue, fingerprint = load_catalogue(folder, layout)
        run.check_data(catalogue, fingerprint)
    except ValueError as error:
        if missing:
            raise
        _LOG.warning("no images: %s", error)
        return None
    if missing:
        write_store(run, catalogue, store, "float32")
    images = {item: path for item, path in zip(catalogue.item_ids, catalogue.images, strict=True) if path is not None}
    return images.get


def _encode(run: TrainedRun) -> Encode | None:
    """What makes rows of the store of items by column; the language model is loaded when that is first asked for."""
    try:
        return run.item_encoder().encode_items
    except ValueError as error:
        _LOG.warning("%s", error)
        return None


def _online(run: TrainedRun, store: Path, ann: str | None, reranker: str | None, quantize: str) -> OnlineRecommender:
    from ..recommender import ItemStore, OnlineRecommender

    found = None if reranker is None else load_reranker(reranker, quantize)
    with status("opening the store"):
        online = OnlineRecommender(run.model, ItemStore(store), model_id=run.model_id, reranker=found, ann=ann)
    if online.version.index is not None:
        index = online.version.index
        say(f"{index.kind}: recall {index.recall:.3f} of the {index.depth} best, at effort {index.effort}")
    return online


def load_reranker(name: str, quantize: str) -> Reranker:
    """A causal model that ranks again, by folder or name."""
    from ..llm import Backbone, YesNoScorer
    from ..recommender import LLMReranker

    with status(f"loading {name}"):
        backbone = Backbone.load(name, quantize=None if quantize == "none" else quantize)
        return LLMReranker(YesNoScorer(backbone))


def _worth(path: Path, model_id: str) -> dict[Plan, float]:
    """What ``mmrec latency`` found the plans of this model to be worth; in the first dtype that it tried."""
    from ..recommender import Plan

    try:
        rows = parse_json(path.read_text(encoding="utf-8"))["frontier"]
        mine = [row for row in rows if row["model_id"] == model_id]
        found = {Plan(r["depth"], r["rerank"]): float(r["worth"]) for r in mine if r["dtype"] == mine[0]["dtype"]}
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"--plans {path} is no latency.json ({type(error).__name__}: {error})") from None
    if not found:
        raise ValueError(f"--plans {path} says nothing of model {model_id}")
    return found


def _set_costs(online: OnlineRecommender, path: Path | None, seconds: float, worth: Mapping[Plan, float]) -> None:
    """Costs of the file, if they are those of this machine and store; else measured anew, and kept there."""
    from ..recommender import Costs, Plan, calibrate

    costs = None
    if path is not None and path.is_file():
        try:
            costs = Costs.load(path)
            online.check_costs(costs)
            if not set(worth) <= {Plan(d, w) for d in costs.retrieval for w in (0, *costs.rerank)}:
                raise ValueError(f"{path} lacks plans of --plans: measuring anew")
        except ValueError as error:
            _LOG.warning("%s", error)
            costs = None
    if costs is None and seconds and not len(online.version):
        _LOG.warning("no budgets: the store has no items by which to measure what answers cost")
    elif costs is None and seconds:
        depths, widths = ({plan.depth for plan in worth}, {plan.rerank for plan in worth if plan.rerank})
        settings: dict[str, Any] = {"depths": sorted(depths), "widths": sorted(widths)} if worth else {}
        with status("measuring what answers cost"):
            costs = calibrate(online, seconds=seconds, **settings)
        if path is not None:
            costs.save(path)
    if costs is not None:
        online.costs = dataclasses.replace(costs, quality=worth or costs.quality)
