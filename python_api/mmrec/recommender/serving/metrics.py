"""What the server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = CONTENT_TYPE_LATEST
_PATHS = ("/", "/recommend", "/items", "/items/remove", "/health", "/metrics", "/openapi.json")
_SECONDS = (
    0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.035, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10,
)  # fmt: skip


class Metrics:
    """Counters, histograms and gauges in a registry of their own: several servers may live in one process.

    Args:
        gauges: name → (what it is, what gives its value now).
    """

    def __init__(self, gauges: Mapping[str, tuple[str, Callable[[], float]]]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "mmrec_requests", "Requests by path and status.", ["path", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "mmrec_request_seconds", "Seconds from arrival to answer.", ["path"], buckets=_SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self.stages = Histogram(
            "mmrec_stage_seconds", "Seconds of each stage of a batch.", ["stage"], buckets=_SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self.batch = Histogram(
            "mmrec_batch_size", "Requests answered together.", buckets=(1, 2, 4, 8, 16, 32, 64), registry=self.registry
        )
        self.late = Counter(
            "mmrec_budget_exceeded", "Answers that took longer than their budget.", registry=self.registry
        )
        self.plans = Counter(
            "mmrec_plans", "Answers with a budget, by what was chosen for them.", ["depth", "rerank"],
            registry=self.registry,
        )  # fmt: skip
        self.reload_failures = Counter(
            "mmrec_reload_failures", "New versions of the store that could not be opened.", registry=self.registry
        )
        for name, (text, value) in gauges.items():
            Gauge(f"mmrec_{name}", text, registry=self.registry).set_function(value)
        ProcessCollector(registry=self.registry)

    def count(self, path: str, status: int) -> None:
        """One answer. Paths that are none of the server's are one, as anybody may think of new ones."""
        self.requests.labels(path if path in _PATHS else "other", status).inc()

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self.registry)
