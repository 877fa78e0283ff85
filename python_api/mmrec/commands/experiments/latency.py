"""What quality costs in milliseconds: models of fewer and more modalities, ways to answer, stages of a request."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ..data import Data
from ..latency import measure
from ..results import variants
from ..serve import load_reranker
from ..settings import label
from .base import Context, Findings, Table
from .trained import TrainingSettings, train_all

__all__ = ["LatencySettings", "latency_run"]

_QUALITY = "NDCG@10"


@dataclass(frozen=True)
class LatencySettings(TrainingSettings):
    """What is timed: the model of all `modalities`, the identity alone, and each content modality alone.

    Attributes:
        dtypes: of the item store.
        depths: last items of a history that are read; all that the model reads are always among them.
        reranker: a causal model, or none.
        widths, rerank_users: candidates that it ranks again, and for how many users.
        seconds: per stage and way.
    """

    dtypes: tuple[str, ...] = ("float32", "int8")
    depths: tuple[int, ...] = (5, 20)
    reranker: str | None = None
    widths: tuple[int, ...] = (10,)
    rerank_users: int = 48
    seconds: float = 3.0


def latency_run(context: Context) -> tuple[Data, Findings]:
    """Trains the models of the first seed and measures them in turn."""
    settings: LatencySettings = context.settings
    data = context.load("S")
    first = dataclasses.replace(context, seeds=context.seeds[:1])
    configs = {label(config): config for config in variants(settings.config(data.catalogue))}
    runs = {name: found[0] for name, found in train_all(first, data, configs).items()}
    stages, points, rows = measure(
        runs, data, dtypes=settings.dtypes, depths=settings.depths, batches=(1, 8, 32), widths=settings.widths,
        reranker=None if settings.reranker is None else load_reranker(settings.reranker, settings.quantize),
        rerank_users=settings.rerank_users, seconds=settings.seconds, seed=first.seeds[0],
    )  # fmt: skip
    tables = [
        Table(
            "Ways to answer, single requests", ("model", "store", "depth", "reranked", "frontier"),
            [_way(row) for row in rows], hint="Frontier: no other way is as good and as fast.",
        ),
        Table("Stages of a request", ("stage", "store", "batch"), [_stage(row) for row in stages]),
    ]  # fmt: skip
    best = max((row for row in rows if not row["rerank"]), key=lambda row: row["metrics"]["NDCG@10"][0])
    fast = min((row for row in rows if not row["rerank"]), key=lambda row: row["p50_ms"])
    sentences = [
        f"Best without reranking: {_named(best)}, NDCG@10 {best['metrics']['NDCG@10'][0]:.4f} at "
        f"{best['p50_ms']:.2f} ms (p50), {best['p99_ms']:.2f} ms (p99).",
        f"Fastest: {_named(fast)}, NDCG@10 {fast['metrics']['NDCG@10'][0]:.4f} at {fast['p50_ms']:.2f} ms (p50).",
        f"{sum(point.best for point in points)} of {len(points)} ways are on the frontier.",
    ]
    for row in rows:
        if row["rerank"]:
            mean, low, high = row["change"]["NDCG@10"]
            sentences.append(
                f"Ranking {row['rerank']} again takes {row['p50_ms']:.0f} ms (p50) and changes NDCG@10 of "
                f"{row['users']} users by {mean:+.4f} [{low:+.4f}, {high:+.4f}]."
            )
    chart = {"frontier": {"quality": _QUALITY, "rows": rows}}
    question = "What does quality cost in milliseconds?"
    return data, Findings(question, tables, sentences, sections=chart, seeds=first.seeds)


def _named(row: dict[str, Any]) -> str:
    return f"{row['model']}, {row['dtype']}, last {row['depth']} items"


def _way(row: dict[str, Any]) -> dict[str, Any]:
    from ...evaluation import Interval

    metrics = {
        name: Interval(mean, low, high, 0.95, row["users"], 1, 10_000)
        for name, (mean, low, high) in row["metrics"].items()
    }
    return {
        "model": row["model"], "store": row["dtype"], "depth": row["depth"], "reranked": row["rerank"] or "",
        "frontier": "yes" if row["frontier"] else "",
        "values": {**{f"{q} ms": row[f"{q}_ms"] for q in ("p50", "p95", "p99")}, **metrics},
    }  # fmt: skip


def _stage(row: dict[str, Any]) -> dict[str, Any]:
    values = {f"{q} ms": row[f"{q}_ms"] for q in ("p50", "p95", "p99")}
    return {
        "stage": row["stage"], "store": row["dtype"], "batch": row["batch"],
        "values": {**values, "first ms": row["cold_ms"]},
    }  # fmt: skip
