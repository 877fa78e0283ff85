"""A recommender over a store of 300 random items, and the application over it."""

from __future__ import annotations

import pytest


@pytest.fixture
def online():
    from serving_helpers import ITEMS, WIDTH, Reversing

    from mmrec.recommender.latency import generated

    with generated(ITEMS, "float32", width=WIDTH, history=20) as made:
        made.reranker = Reversing()
        yield made


@pytest.fixture
def client(online):
    from fastapi.testclient import TestClient

    from mmrec.recommender.serving import Settings, create_app

    with TestClient(create_app(online, Settings(reload_seconds=0.05))) as made:
        yield made
