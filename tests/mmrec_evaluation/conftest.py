"""The real data sets, read in a few lines that share nothing with the package's readers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mmrec.evaluation.protocols import Split, labelled, leave_last_out


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """Folder of a real data set by name; skips the test where it is absent."""
    root = Path(os.environ.get("MMREC_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))

    def find(name: str) -> Path:
        if not (root / name).is_dir():
            pytest.skip(f"{name} is not there: set MMREC_DATA to the folder that holds it")
        return root / name

    return find


@pytest.fixture(scope="session")
def movielens(real_data: Callable[[str], Path]) -> Split:
    table = np.loadtxt(real_data("movielens-100k-mm") / "ml-100k" / "u.data", dtype=np.int64)
    return leave_last_out(table[:, 0] - 1, table[:, 1] - 1, 943, 1682, time=table[:, 3])


@pytest.fixture(scope="session")
def scientific(real_data: Callable[[str], Path]) -> Split:
    text = (real_data("amazon-scientific") / "Scientific.inter.json").read_text(encoding="utf-8")
    return _sequences([items for _, items in sorted((int(u), items) for u, items in json.loads(text).items())])


@pytest.fixture(scope="session")
def beauty(real_data: Callable[[str], Path]) -> Split:
    lines = (real_data("amazon-beauty") / "Beauty.txt").read_text(encoding="utf-8").splitlines()
    return _sequences([[int(field) - 1 for field in line.split()[1:]] for line in lines])


@pytest.fixture(scope="session")
def baby(real_data: Callable[[str], Path]) -> Split:
    # This copy names MMRec's validation part "tst" and its test part "val".
    parts = [np.loadtxt(real_data("amazon-baby") / f"{name}.tsv", dtype=np.int64) for name in ("trn", "tst", "val")]
    table, label = np.concatenate(parts), np.repeat([0, 1, 2], [len(part) for part in parts])
    return labelled(table[:, 0], table[:, 1], label, 19445, 7050)


def _sequences(rows: list[list[int]]) -> Split:
    user = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    item = np.concatenate([np.array(row) for row in rows])
    return leave_last_out(user, item, len(rows), int(item.max()) + 1)
