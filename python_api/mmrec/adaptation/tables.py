"""Table columns as arrays: standardised numbers, category codes, and ragged lists of codes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .errors import CatalogueError

if TYPE_CHECKING:
    from .catalogue import Catalogue

_HEAVY_TAIL = 2.0


@dataclass(frozen=True)
class MultiColumn:
    """A multi-valued column in CSR form: item i has ``values[offsets[i]:offsets[i + 1]]``, codes into ``vocabulary``.

    ``offsets`` int64 ``[I + 1]``, ``values`` int64 ``[nnz]``. Values unseen in the items that were fitted are left out.
    """

    name: str
    offsets: np.ndarray
    values: np.ndarray
    vocabulary: tuple[str, ...]

    @property
    def cardinality(self) -> int:
        """Number of codes."""
        return len(self.vocabulary)


@dataclass(frozen=True)
class TableArrays:
    """A table as model input.

    Attributes:
        numeric: float32 ``[I, n]``, mean 0 and deviation 1 over the present values of the fitted items; 0 where
            missing.
        numeric_mask: bool ``[I, n]``, True = present.
        numeric_names: column names; ``log_scaled`` names those that went through sign(x)·ln(1 + |x|) first.
        categorical: int64 ``[I, c]``, −1 where missing or unseen in the fitted items.
        categorical_names, cardinalities, vocabularies: per categorical column; codes are 0 … cardinality − 1.
        multi: one :class:`MultiColumn` per multi-valued column, by name.
        mean, std: float64 ``[n]``, after the logarithm: value = (number − mean) / std.
    """

    numeric: np.ndarray
    numeric_mask: np.ndarray
    numeric_names: tuple[str, ...]
    log_scaled: tuple[str, ...]
    categorical: np.ndarray
    categorical_names: tuple[str, ...]
    cardinalities: tuple[int, ...]
    vocabularies: tuple[tuple[str, ...], ...]
    multi: dict[str, MultiColumn] = field(default_factory=dict)
    mean: np.ndarray = field(default_factory=lambda: np.zeros(0))
    std: np.ndarray = field(default_factory=lambda: np.ones(0))

    @property
    def names(self) -> tuple[str, ...]:
        """All columns: numeric, categorical, multi."""
        return (*self.numeric_names, *self.categorical_names, *self.multi)

    @property
    def mask(self) -> np.ndarray:
        """bool ``[I]``: items with at least one usable value."""
        parts = [self.numeric_mask.any(axis=1), (self.categorical >= 0).any(axis=1)]
        parts += [np.diff(column.offsets) > 0 for column in self.multi.values()]
        return np.any(parts, axis=0)


def encode_table(
    catalogue: Catalogue,
    columns: Sequence[str] | None = None,
    *,
    fit_items: np.ndarray | None = None,
    min_count: int = 1,
) -> TableArrays:
    """Encodes the item table's numeric, categorical and multi-valued columns.

    Args:
        catalogue: its ``items`` and ``schema`` are read.
        columns: which columns; None is every one with such a role.
        fit_items: bool ``[I]``, the items that means, deviations and vocabularies may look at (the training items, so
            that nothing leaks from cold ones); None is all.
        min_count: values that occur in fewer fitted items get no code.

    A numeric column whose fitted values have |skewness| > 2 is taken to sign(x)·ln(1 + |x|) if that makes it less
    skewed. A column that is constant over the fitted items becomes 0. Vocabularies are in lexicographic order.

    Raises:
        CatalogueError: an unknown column, one whose role is neither, or a mask of the wrong form.
    """
    schema = catalogue.schema
    usable = schema.numeric + schema.categorical + schema.multi
    chosen = usable if columns is None else tuple(columns)
    for column in chosen:
        if column not in usable:
            raise CatalogueError(f"columns: {column!r} is not numeric, categorical or multi; those are {list(usable)}")
    if len(set(chosen)) != len(chosen):
        raise CatalogueError(f"columns: {list(chosen)} names a column twice")
    fit = _fit_mask(fit_items, catalogue.num_items)
    numeric = [column for column in chosen if column in schema.numeric]
    categorical = [column for column in chosen if column in schema.categorical]
    numbers, present, mean, std, log_scaled = _encode_numeric(catalogue, numeric, fit)
    codes, vocabularies = _encode_categorical(catalogue, categorical, fit, min_count)
    return TableArrays(
        numeric=numbers,
        numeric_mask=present,
        numeric_names=tuple(numeric),
        log_scaled=log_scaled,
        categorical=codes,
        categorical_names=tuple(categorical),
        cardinalities=tuple(len(vocabulary) for vocabulary in vocabularies),
        vocabularies=vocabularies,
        multi={column: _encode_multi(catalogue, column, fit, min_count) for column in chosen if column in schema.multi},
        mean=mean,
        std=std,
    )


def _fit_mask(fit_items: np.ndarray | None, rows: int) -> np.ndarray:
    if fit_items is None:
        return np.ones(rows, dtype=bool)
    mask = np.asarray(fit_items)
    if mask.dtype != np.bool_ or mask.shape != (rows,):
        raise CatalogueError(f"fit_items needs bool [{rows}], got {mask.dtype} {list(mask.shape)}")
    return mask


def _encode_numeric(
    catalogue: Catalogue, columns: list[str], fit: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, tuple[str, ...]]:
    shape = (catalogue.num_items, len(columns))
    values, present = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=bool)
    mean, std, log_scaled = np.zeros(len(columns)), np.ones(len(columns)), []
    for i, column in enumerate(columns):
        raw = catalogue.items[column].fill_null(float("nan")).to_numpy()
        present[:, i] = np.isfinite(raw)
        fitted = raw[present[:, i] & fit]
        if abs(_skewness(fitted)) > max(_HEAVY_TAIL, abs(_skewness(_signed_log(fitted)))):
            raw, fitted = _signed_log(raw), _signed_log(fitted)
            log_scaled.append(column)
        if len(fitted):
            mean[i] = fitted.mean()
            spread = fitted.std()
            std[i] = spread if spread > 1e-12 * max(1.0, abs(mean[i])) else np.inf
        scaled = (raw - mean[i]) / std[i]
        values[:, i] = np.where(present[:, i], scaled, 0)
    return values, present, mean, std, tuple(log_scaled)


def _signed_log(values: np.ndarray) -> np.ndarray:
    return np.sign(values) * np.log1p(np.abs(values))


def _skewness(values: np.ndarray) -> float:
    """Third standardised moment; 0 for fewer than three values or a constant."""
    if len(values) < 3:
        return 0.0
    centred = values - values.mean()
    spread = np.sqrt(np.mean(centred**2))
    return float(np.mean((centred / spread) ** 3)) if spread > 1e-12 * max(1.0, float(np.abs(values).max())) else 0.0


def _vocabulary(values: Iterable[str], min_count: int) -> tuple[str, ...]:
    counts = Counter(values)
    return tuple(sorted(value for value, count in counts.items() if count >= min_count))


def _encode_categorical(
    catalogue: Catalogue, columns: list[str], fit: np.ndarray, min_count: int
) -> tuple[np.ndarray, tuple[tuple[str, ...], ...]]:
    codes = np.full((catalogue.num_items, len(columns)), -1, dtype=np.int64)
    vocabularies = []
    for i, column in enumerate(columns):
        values = catalogue.items[column].to_list()
        known = (value for value, fitted in zip(values, fit, strict=True) if fitted and value is not None)
        vocabulary = _vocabulary(known, min_count)
        index = {value: code for code, value in enumerate(vocabulary)}
        codes[:, i] = [index.get(value, -1) for value in values]
        vocabularies.append(vocabulary)
    return codes, tuple(vocabularies)


def _encode_multi(catalogue: Catalogue, column: str, fit: np.ndarray, min_count: int) -> MultiColumn:
    lists = [list(dict.fromkeys(values or ())) for values in catalogue.items[column].to_list()]
    known = (value for values, fitted in zip(lists, fit, strict=True) if fitted for value in values)
    vocabulary = _vocabulary(known, min_count)
    index = {value: code for code, value in enumerate(vocabulary)}
    coded = [[index[value] for value in values if value in index] for values in lists]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in coded], dtype=np.int64)]).astype(np.int64)
    return MultiColumn(column, offsets, np.array([code for row in coded for code in row], dtype=np.int64), vocabulary)
