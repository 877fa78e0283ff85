"""One model's figures on one split, with everything needed to refuse a comparison that would mean nothing."""

from __future__ import annotations

import hashlib
import io
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from ..files import parse_json, write_atomic
from .intervals import Interval, bootstrap, paired_bootstrap
from .metrics import Metric

__all__ = ["Result", "Row", "compare", "interval"]

_FORMAT = 1


@dataclass(frozen=True, eq=False)
class Row:
    """Figures of a group of users and targets: per metric one number for each of ``users``.

    Args:
        users: int64 ``[n]``, user rows, ascending.
        values: ``{metric: float64 [n]}``.
    """

    users: np.ndarray
    values: Mapping[str, np.ndarray]

    def __post_init__(self) -> None:
        for name, column in self.values.items():
            Metric.parse(name)
            if column.shape != self.users.shape:
                raise ValueError(f"{name} must have one value per user {self.users.shape}, got {column.shape}")

    @property
    def metrics(self) -> dict[str, float]:
        """Means over the users; NaN without users."""
        return {name: float(column.mean()) if len(column) else float("nan") for name, column in self.values.items()}


@dataclass(frozen=True, eq=False)
class Result:
    """What one model reached.

    Args:
        model: its name in tables.
        protocol: "S", "G" or "T", or "C" (`.candidates`).
        split: identity of the split (:attr:`.Split.id`).
        stage: "valid" or "test".
        mask: which seen items were left out of the rankings: "none", "train" or "train+valid".
        dataset, fingerprint: name and content hash of the catalogue.
        seed: of the training; None for a model without randomness.
        rows: "all", and further groups such as "cold-among-all" (see :func:`.evaluate`).
        beyond_accuracy: figures about the lists as a whole.
    """

    model: str
    protocol: str
    split: str
    stage: str
    mask: str
    dataset: str
    fingerprint: str
    seed: int | None
    rows: Mapping[str, Row]
    beyond_accuracy: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if "all" not in self.rows:
            raise ValueError(f"rows must contain 'all', got {sorted(self.rows)}")

    @property
    def metrics(self) -> dict[str, float]:
        """Means of the row "all", keyed ``HR@10`` and so on."""
        return self.rows["all"].metrics

    def to_dict(self) -> dict[str, Any]:
        """The figures without the per-user columns, ready for JSON (NaN becomes None)."""
        return {
            "format": _FORMAT,
            "model": self.model,
            "protocol": self.protocol,
            "split": self.split,
            "stage": self.stage,
            "mask": self.mask,
            "dataset": self.dataset,
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            "metrics": _plain(self.metrics),
            "beyond_accuracy": _plain(self.beyond_accuracy),
            "rows": {
                name: {"users": len(row.users), "metrics": _plain(row.metrics)} for name, row in self.rows.items()
            },
        }

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes ``path`` (JSON) and, beside it, the per-user columns as ``<stem>.<hash>.npz``.

        The columns are written first and the JSON that names them replaces its predecessor in one step: a reader sees
        the old result or the new one, also after a crash or on a full disk.
        """
        path = Path(path)
        arrays: dict[str, np.ndarray] = {}
        for name, row in self.rows.items():
            arrays[f"{name}/users"] = row.users
            arrays |= {f"{name}/{metric}": column for metric, column in row.values.items()}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        content = buffer.getvalue()
        columns = path.with_name(f"{path.stem}.{hashlib.sha256(content).hexdigest()[:12]}.npz")
        before = _named_columns(path)
        write_atomic(columns, content)
        text = json.dumps(self.to_dict() | {"per_user": columns.name}, indent=2, allow_nan=False)
        write_atomic(path, (text + "\n").encode())
        if before is not None and before != columns:
            before.unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Result:
        """Reads what :meth:`save` wrote; ``ValueError`` names the file that is damaged or of another format."""
        path = Path(path)
        try:
            data = parse_json(path.read_text(encoding="utf-8"))
            if data["format"] != _FORMAT:
                raise ValueError(f"format {data['format']} is not {_FORMAT}")
            columns = path.with_name(data["per_user"])
            content = columns.read_bytes()
            if hashlib.sha256(content).hexdigest()[:12] != columns.name.split(".")[-2]:
                raise ValueError(f"{columns.name} does not have the content that its name promises")
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                rows = {
                    name: Row(arrays[f"{name}/users"], {m: arrays[f"{name}/{m}"] for m in row["metrics"]})
                    for name, row in data["rows"].items()
                }
            names = ("model", "protocol", "split", "stage", "mask", "dataset", "fingerprint", "seed")
            beyond = {k: float("nan") if v is None else v for k, v in data["beyond_accuracy"].items()}
            return cls(**{name: data[name] for name in names}, rows=rows, beyond_accuracy=beyond)
        except FileNotFoundError:
            raise
        except (
            ValueError, KeyError, TypeError, IndexError, AttributeError, OSError, EOFError, BadZipFile, zlib.error,
        ) as error:  # fmt: skip
            raise ValueError(f"{path} is not a readable result: {type(error).__name__}: {error}") from error


def interval(results: Result | Sequence[Result], metric: str, *, row: str = "all", seed: int = 0) -> Interval:
    """Bootstrap interval of one model's mean, over users and, for several results, over seeds."""
    return bootstrap(_columns(_listed(results), metric, row), seed=seed)


def compare(
    a: Result | Sequence[Result],
    b: Result | Sequence[Result],
    metric: str,
    *,
    row: str = "all",
    resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Paired interval of ``a − b`` in one metric; ``ValueError`` where the two are not comparable.

    Both must have the same protocol, split, stage, mask, data set and users, and the same variant of the metric.

    Args:
        a, b: one result, or one per seed in the same order of seeds. A single result of a model without randomness
            (seed None) may stand against several.
    """
    first, second = _listed(a), _listed(b)
    _check_comparable([*first, *second])
    single = [side for side in (first, second) if len(side) == 1 and side[0].seed is None]
    if not single and [r.seed for r in first] != [r.seed for r in second]:
        raise ValueError(
            f"results must pair by seed, got seeds {[r.seed for r in first]} and {[r.seed for r in second]}"
        )
    left, right = _columns(first, metric, row), _columns(second, metric, row)
    if not np.array_equal(first[0].rows[row].users, second[0].rows[row].users):
        raise ValueError(f"row {row!r} holds other users in {first[0].model!r} than in {second[0].model!r}")
    left = left[0] if len(left) == 1 else left
    right = right[0] if len(right) == 1 else right
    return paired_bootstrap(left, right, resamples=resamples, level=level, seed=seed)


def _plain(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: float(value) if np.isfinite(value) else None for name, value in values.items()}


def _named_columns(path: Path) -> Path | None:
    """The column file that an existing result names, if there is one to replace."""
    try:
        name = parse_json(path.read_text(encoding="utf-8"))["per_user"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    ours = isinstance(name, str) and Path(name).name == name and name.startswith(f"{path.stem}.")
    return path.with_name(name) if ours and name.endswith(".npz") else None


def _listed(results: Result | Sequence[Result]) -> list[Result]:
    listed = [results] if isinstance(results, Result) else list(results)
    if not listed:
        raise ValueError("results must not be empty")
    return listed


def _columns(results: list[Result], metric: str, row: str) -> np.ndarray:
    wanted = Metric.parse(metric)
    columns = []
    for result in results:
        if row not in result.rows:
            raise ValueError(f"{result.model!r} has no row {row!r}; it has {sorted(result.rows)}")
        values = result.rows[row].values
        if str(wanted) not in values:
            others = [n for n in values if Metric.parse(n).base == wanted.base and Metric.parse(n).k == wanted.k]
            hint = f", only {others}: another definition, not comparable" if others else f"; it has {list(values)}"
            raise ValueError(f"{result.model!r} has no {wanted}{hint}")
        columns.append(values[str(wanted)])
    if len({len(column) for column in columns}) > 1:
        raise ValueError(f"row {row!r} has another number of users in each seed: {[len(c) for c in columns]}")
    return np.stack(columns)


def _check_comparable(results: list[Result]) -> None:
    for name in ("protocol", "split", "stage", "mask", "fingerprint"):
        values = {getattr(result, name) for result in results}
        if len(values) > 1:
            raise ValueError(f"results differ in {name} and cannot be compared: {sorted(map(str, values))}")
