"""Table columns as arrays: standardised numbers, category codes, and ragged lists of codes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
class TableFit:
    """What a table is encoded by: of numeric columns ``(name, through a logarithm, mean, deviation)``, the deviation
    infinite for a constant; of categorical and multi-valued ones ``(name, vocabulary)``. See :func:`encode_table`."""

    numeric: tuple[tuple[str, bool, float, float], ...] = ()
    categorical: tuple[tuple[str, tuple[str, ...]], ...] = ()
    multi: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All columns: numeric, categorical, multi."""
        named = (*(name for name, *_ in self.numeric), *(name for name, _ in self.categorical))
        return (*named, *(name for name, _ in self.multi))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        numeric = [[name, log, mean, None if np.isinf(std) else std] for name, log, mean, std in self.numeric]
        return {"numeric": numeric, "categorical": _listed(self.categorical), "multi": _listed(self.multi)}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> TableFit:
        """The inverse of :meth:`to_dict`."""
        numeric = tuple(
            (n, bool(log), float(mean), np.inf if std is None else std) for n, log, mean, std in value["numeric"]
        )
        vocabularies = [tuple((name, tuple(words)) for name, words in value[kind]) for kind in ("categorical", "multi")]
        return cls(numeric, *vocabularies)


@dataclass(frozen=True)
class TableArrays:
    """A table as model input.

    Attributes:
        numeric: float32 ``[I, n]``, mean 0 and deviation 1 over the present values of the fitted items; 0 where
            missing.
        numeric_mask: bool ``[I, n]``, True = present.
        categorical: int64 ``[I, c]``, −1 where missing or unseen in the fitted items; else codes into the vocabulary.
        multi: one :class:`MultiColumn` per multi-valued column, by name.
        fit: what it was encoded by, and the names of the columns.
    """

    numeric: np.ndarray
    numeric_mask: np.ndarray
    categorical: np.ndarray
    multi: dict[str, MultiColumn]
    fit: TableFit

    @property
    def numeric_names(self) -> tuple[str, ...]:
        """Of the numeric columns."""
        return tuple(name for name, *_ in self.fit.numeric)

    @property
    def log_scaled(self) -> tuple[str, ...]:
        """Numeric columns that went through sign(x)·ln(1 + |x|) first."""
        return tuple(name for name, logarithm, *_ in self.fit.numeric if logarithm)

    @property
    def mean(self) -> np.ndarray:
        """float64 ``[n]``, after the logarithm: value = (number − mean) / std."""
        return np.array([mean for _, _, mean, _ in self.fit.numeric])

    @property
    def std(self) -> np.ndarray:
        """float64 ``[n]``, see :attr:`mean`."""
        return np.array([std for *_, std in self.fit.numeric])

    @property
    def categorical_names(self) -> tuple[str, ...]:
        """Of the categorical columns."""
        return tuple(name for name, _ in self.fit.categorical)

    @property
    def vocabularies(self) -> tuple[tuple[str, ...], ...]:
        """Per categorical column."""
        return tuple(vocabulary for _, vocabulary in self.fit.categorical)

    @property
    def cardinalities(self) -> tuple[int, ...]:
        """Per categorical column: codes are 0 … cardinality − 1."""
        return tuple(map(len, self.vocabularies))

    @property
    def names(self) -> tuple[str, ...]:
        """All columns: numeric, categorical, multi."""
        return self.fit.names

    @property
    def mask(self) -> np.ndarray:
        """bool ``[I]``: items with at least one usable value."""
        parts = [self.numeric_mask.any(axis=1), (self.categorical >= 0).any(axis=1)]
        parts += [np.diff(column.offsets) > 0 for column in self.multi.values()]
        return np.any(parts, axis=0)


def _listed(vocabularies: Iterable[tuple[str, tuple[str, ...]]]) -> list[list[Any]]:
    return [[name, list(words)] for name, words in vocabularies]


def encode_table(
    catalogue: Catalogue,
    columns: Sequence[str] | None = None,
    *,
    fit_items: np.ndarray | None = None,
    min_count: int = 1,
    fit: TableFit | None = None,
) -> TableArrays:
    """Encodes the item table's numeric, categorical and multi-valued columns.

    Args:
        catalogue: its ``items`` and ``schema`` are read.
        columns: which columns; None is every one with such a role.
        fit_items: bool ``[I]``, the items that means, deviations and vocabularies may look at (the training items, so
            that nothing leaks from cold ones); None is all.
        min_count: values that occur in fewer fitted items get no code.
        fit: of another catalogue (:attr:`TableArrays.fit`), in whose columns and codes this one is to be encoded;
            instead of the arguments before.

    A numeric column whose fitted values have |skewness| > 2 is taken to sign(x)·ln(1 + |x|) if that makes it less
    skewed. A column that is constant over the fitted items becomes 0. Vocabularies are in lexicographic order.

    Raises:
        CatalogueError: an unknown column, one whose role is neither, or a mask of the wrong form.
    """
    schema = catalogue.schema
    usable = schema.numeric + schema.categorical + schema.multi
    if fit is not None:
        columns = fit.names
    chosen = usable if columns is None else tuple(columns)
    for column in chosen:
        if column not in usable:
            raise CatalogueError(f"columns: {column!r} is not numeric, categorical or multi; those are {list(usable)}")
    if len(set(chosen)) != len(chosen):
        raise CatalogueError(f"columns: {list(chosen)} names a column twice")
    if fit is None:
        fit = _fitted(catalogue, chosen, _fit_mask(fit_items, catalogue.num_items), min_count)
    numbers, present = _encode_numeric(catalogue, fit)
    return TableArrays(
        numeric=numbers,
        numeric_mask=present,
        categorical=_encode_categorical(catalogue, fit),
        multi={name: _encode_multi(catalogue, name, vocabulary) for name, vocabulary in fit.multi},
        fit=fit,
    )


def _fitted(catalogue: Catalogue, columns: Sequence[str], mask: np.ndarray, min_count: int) -> TableFit:
    schema, items = catalogue.schema, catalogue.items
    numeric, categorical, multi = [], [], []
    for column in columns:
        if column in schema.numeric:
            raw = _numbers(catalogue, column)
            fitted = raw[np.isfinite(raw) & mask]
            logarithm = abs(_skewness(fitted)) > max(_HEAVY_TAIL, abs(_skewness(_signed_log(fitted))))
            fitted = _signed_log(fitted) if logarithm else fitted
            mean, spread = (float(fitted.mean()), float(fitted.std())) if len(fitted) else (0.0, 1.0)
            numeric.append((column, logarithm, mean, spread if spread > 1e-12 * max(1.0, abs(mean)) else np.inf))
            continue
        values = [
            value for value, known in zip(items[column].to_list(), mask, strict=True) if known and value is not None
        ]
        if column in schema.categorical:
            categorical.append((column, _vocabulary(values, min_count)))
        else:
            multi.append((column, _vocabulary((one for value in values for one in dict.fromkeys(value)), min_count)))
    return TableFit(tuple(numeric), tuple(categorical), tuple(multi))


def _fit_mask(fit_items: np.ndarray | None, rows: int) -> np.ndarray:
    if fit_items is None:
        return np.ones(rows, dtype=bool)
    mask = np.asarray(fit_items)
    if mask.dtype != np.bool_ or mask.shape != (rows,):
        raise CatalogueError(f"fit_items needs bool [{rows}], got {mask.dtype} {list(mask.shape)}")
    return mask


def _numbers(catalogue: Catalogue, column: str) -> np.ndarray:
    return catalogue.items[column].fill_null(float("nan")).to_numpy()


def _encode_numeric(catalogue: Catalogue, fit: TableFit) -> tuple[np.ndarray, np.ndarray]:
    shape = (catalogue.num_items, len(fit.numeric))
    values, present = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=bool)
    for i, (column, logarithm, mean, std) in enumerate(fit.numeric):
        raw = _numbers(catalogue, column)
        present[:, i] = np.isfinite(raw)
        scaled = ((_signed_log(raw) if logarithm else raw) - mean) / std
        values[:, i] = np.where(present[:, i], scaled, 0)
    return values, present


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


def _encode_categorical(catalogue: Catalogue, fit: TableFit) -> np.ndarray:
    codes = np.full((catalogue.num_items, len(fit.categorical)), -1, dtype=np.int64)
    for i, (column, vocabulary) in enumerate(fit.categorical):
        index = {value: code for code, value in enumerate(vocabulary)}
        codes[:, i] = [index.get(value, -1) for value in catalogue.items[column].to_list()]
    return codes


def _encode_multi(catalogue: Catalogue, column: str, vocabulary: tuple[str, ...]) -> MultiColumn:
    index = {value: code for code, value in enumerate(vocabulary)}
    coded = [
        [index[value] for value in dict.fromkeys(values or ()) if value in index]
        for values in catalogue.items[column].to_list()
    ]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in coded], dtype=np.int64)]).astype(np.int64)
    return MultiColumn(column, offsets, np.array([code for row in coded for code in row], dtype=np.int64), vocabulary)
