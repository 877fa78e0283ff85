from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from mmrec.adaptation import Catalogue, CatalogueError, Interactions, TableFit, TableSchema, encode_table

SCHEMA = TableSchema(numeric=("size", "sales"), categorical=("brand",), multi=("tags",))


def table(**columns: list) -> Catalogue:
    rows = len(next(iter(columns.values())))
    ids = [f"i{n}" for n in range(rows)]
    full = {"size": [None] * rows, "sales": [None] * rows, "brand": [None] * rows, "tags": [None] * rows, **columns}
    types = {
        "item_id": pl.String,
        "size": pl.Float64,
        "sales": pl.Float64,
        "brand": pl.String,
        "tags": pl.List(pl.String),
    }
    return Catalogue(
        name="t",
        item_ids=ids,
        user_ids=["u"],
        interactions=Interactions.from_rows(np.array([0]), np.array([0])),
        items=pl.DataFrame({"item_id": ids, **full}, schema=types),
        schema=SCHEMA,
    )


def test_numbers_are_standardised_over_what_is_present() -> None:
    arrays = encode_table(table(size=[1.0, 2.0, None, 3.0]))
    expected = (np.array([1, 2, 3]) - 2) / np.std([1, 2, 3])
    assert arrays.numeric.dtype == np.float32 and arrays.numeric.shape == (4, 2)
    np.testing.assert_allclose(arrays.numeric[[0, 1, 3], 0], expected, rtol=1e-6)
    assert arrays.numeric[2, 0] == 0 and arrays.numeric_mask[:, 0].tolist() == [True, True, False, True]
    assert not arrays.numeric_mask[:, 1].any() and not arrays.numeric[:, 1].any()
    assert arrays.mask.tolist() == [True, True, False, True]


def test_heavy_tails_go_through_the_signed_logarithm() -> None:
    values = [float(10**n) for n in range(8)] + [-5.0]
    arrays = encode_table(table(sales=values, size=[float(n) for n in range(9)]))
    assert arrays.log_scaled == ("sales",)
    logs = np.sign(values) * np.log1p(np.abs(values))
    np.testing.assert_allclose(arrays.numeric[:, 1], (logs - logs.mean()) / logs.std(), rtol=1e-5)


def test_a_constant_column_becomes_zero() -> None:
    arrays = encode_table(table(size=[0.1, 0.1, 0.1, None]))
    assert not arrays.numeric.any() and arrays.numeric_mask[:, 0].tolist() == [True, True, True, False]


def test_statistics_come_from_the_fitted_items_only() -> None:
    fit = np.array([True, True, True, False])
    cold = table(size=[1, 2, 3, 1e9], brand=["b", "a", "b", "z"], tags=[["x"], ["y"], [], ["z", "x"]])
    other = table(size=[1, 2, 3, -7], brand=["b", "a", "b", None], tags=[["x"], ["y"], [], None])
    fitted, reference = encode_table(cold, fit_items=fit), encode_table(other, fit_items=fit)
    np.testing.assert_array_equal(fitted.numeric[:3], reference.numeric[:3])
    assert fitted.numeric[3, 0] == pytest.approx((1e9 - 2) / np.std([1, 2, 3]))
    assert fitted.vocabularies == (("a", "b"),) and fitted.cardinalities == (2,)
    assert fitted.categorical[:, 0].tolist() == [1, 0, 1, -1], "a brand seen only in a cold item has no code"
    assert fitted.multi["tags"].vocabulary == ("x", "y")
    assert fitted.multi["tags"].values.tolist() == [0, 1, 0]


def test_multi_valued_columns_are_csr() -> None:
    arrays = encode_table(table(tags=[["b", "a", "b"], None, [], ["a"]]))
    tags = arrays.multi["tags"]
    assert tags.vocabulary == ("a", "b") and tags.cardinality == 2
    assert tags.offsets.tolist() == [0, 2, 2, 2, 3] and tags.values.tolist() == [1, 0, 0]
    assert (tags.offsets.dtype, tags.values.dtype) == (np.int64, np.int64)
    assert arrays.mask.tolist() == [True, False, False, True]


def test_rare_values_can_be_left_out() -> None:
    arrays = encode_table(table(brand=["a", "b", "a", None], tags=[["x"], ["x", "y"], None, None]), min_count=2)
    assert arrays.vocabularies == (("a",),) and arrays.categorical[:, 0].tolist() == [0, -1, 0, -1]
    assert arrays.multi["tags"].vocabulary == ("x",)


def test_columns_can_be_chosen() -> None:
    arrays = encode_table(table(size=[1.0, 2.0]), columns=["tags", "sales"])
    assert arrays.names == ("sales", "tags") and arrays.categorical.shape == (2, 0)
    assert encode_table(table(size=[1.0])).names == ("size", "sales", "brand", "tags")
    assert encode_table(table(size=[1.0]), columns=[]).mask.tolist() == [False]


def test_bad_arguments() -> None:
    catalogue = table(size=[1.0, 2.0])
    with pytest.raises(CatalogueError, match="'weight' is not numeric, categorical or multi"):
        encode_table(catalogue, columns=["weight"])
    with pytest.raises(CatalogueError, match="names a column twice"):
        encode_table(catalogue, columns=["size", "size"])
    with pytest.raises(CatalogueError, match=r"fit_items needs bool \[2\], got int64 \[2\]"):
        encode_table(catalogue, fit_items=np.array([0, 1]))


def test_the_table_of_a_real_folder(shop: Path) -> None:
    arrays = encode_table(Catalogue.load(shop))
    assert arrays.categorical_names == ("brand", "organic")
    assert arrays.categorical.tolist() == [[0, -1], [1, 0], [0, 1]]
    assert arrays.numeric[:, 0].tolist() == [0, -1, 1]


def test_another_table_in_the_codes_of_this_one() -> None:
    """What a run keeps of its table, through JSON, encodes it to the same, and what it does not know to missing."""
    tags = [["x"], ["y", "x"], None, []]
    first = table(size=[1.0, 2.0, None, 3.0], sales=[1.0, 1.0, 1.0, 1e6], brand=["b", "a", None, "b"], tags=tags)
    arrays = encode_table(first)
    kept = TableFit.from_dict(json.loads(json.dumps(arrays.fit.to_dict())))
    assert kept == arrays.fit
    again = encode_table(first, fit=kept)
    for name in ("numeric", "numeric_mask", "categorical"):
        assert np.array_equal(getattr(arrays, name), getattr(again, name))
    assert np.array_equal(again.multi["tags"].values, arrays.multi["tags"].values)
    other = encode_table(table(size=[3.0], sales=[None], brand=["new"], tags=[["z", "y"]]), fit=kept)
    assert other.numeric[0, 0] == arrays.numeric[3, 0] and not other.numeric_mask[0, 1]
    assert other.categorical.tolist() == [[-1]] and other.multi["tags"].values.tolist() == [1]
    constant = encode_table(table(size=[2.0, 2.0]))
    assert TableFit.from_dict(json.loads(json.dumps(constant.fit.to_dict()))) == constant.fit
