"""The soak (`tests/soak.py`) in small, and that it notices what grows."""

from __future__ import annotations

import dataclasses

import pytest

for package in ("fastapi", "httpx", "polars", "typer"):
    pytest.importorskip(package)

from soak import MOST_BYTES, Held, grown, soak  # noqa: E402

ROUND = Held(steps=0, requests=0, resident=500 << 20, handles=9, threads=1, files=70, seconds=0.0)


def rounds(**values):
    """Twelve rounds in which what is named has the values of a function of the round."""
    return [dataclasses.replace(ROUND, **{name: value(n) for name, value in values.items()}) for n in range(12)]


def test_rounds_train_and_serve(tmp_path):
    (only,) = soak(steps=1, requests=21, folder=tmp_path, say=False)
    assert only.steps > 100 and only.requests == 21
    assert only.resident > 100 << 20 and only.handles > 2 and only.threads >= 1
    assert (tmp_path / "run/run.json").exists() and list((tmp_path / "store").glob("version-*.json"))


def test_what_stays_is_not_said_to_grow():
    noise = [0, 3, -2, 5, 1, -4, 2, 0, -3, 4, 1, -1]
    assert grown(rounds(resident=lambda n: (500 + noise[n]) << 20)) == []
    # Warm-up may take what it wants.
    assert grown(rounds(resident=lambda n: (500 + min(n, 5) * 100) << 20, handles=lambda n: min(n, 5))) == []
    # One high reading among many is none of a leak.
    assert grown(rounds(handles=lambda n: 30 if n == 9 else 9)) == []


@pytest.mark.parametrize("name", ("handles", "threads", "files"))
def test_one_more_a_round_is_found(name):
    (found,) = grown(rounds(**{name: lambda n: 9 + n}))
    assert found.startswith(f"{name} grow")


def test_memory_that_grows_is_found():
    by = MOST_BYTES // 5 + (1 << 18)  # over the five steps between the last six rounds
    (found,) = grown(rounds(resident=lambda n: (500 << 20) + n * by))
    assert found == f"memory grows by {by / 2**20:.2f} MiB a round over the last 6 rounds"
    assert grown(rounds(resident=lambda n: (500 << 20) + n * (by - (1 << 19)))) == []


def test_too_few_rounds_are_refused():
    with pytest.raises(ValueError, match="at least 3 rounds are needed, got 1"):
        grown([ROUND])
