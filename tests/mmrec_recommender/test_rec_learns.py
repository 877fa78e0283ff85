"""Training on a generated catalogue with planted structure, in a loop of a few lines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mmrec.adaptation import Catalogue, encode_table, generate_catalogue, image_patches
from mmrec.evaluation import Split, most_popular, per_user, rank, split
from mmrec.fusion import TableInputs, Tokens
from mmrec.recommender import (
    ItemInputs,
    Objective,
    Recommender,
    RecommenderConfig,
    TableSpec,
    epoch_batches,
)  # fmt: skip

CONFIG = RecommenderConfig(
    modalities=("identity", "image", "table"), width=32, item_queries=2, image_rank=24, expert_hidden=32, layers=1,
    max_length=20, dropout=0.2, identity_dropout=0.3, table_pooled=True, batch_size=32, epochs=10, learning_rate=4e-3,
)  # fmt: skip


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    folder: Path = tmp_path_factory.mktemp("generated") / "catalogue"
    return generate_catalogue(folder, users=300, items=120, cold_items=10, mean_length=15.0, image_size=32, seed=1)


def content_of(catalogue: Catalogue, trained: np.ndarray) -> ItemInputs:
    arrays = encode_table(catalogue, fit_items=trained)
    bags = tuple((torch.from_numpy(c.offsets), torch.from_numpy(c.values)) for c in arrays.multi.values())
    numeric = (torch.from_numpy(arrays.numeric), torch.from_numpy(arrays.numeric_mask))
    table = TableInputs(*numeric, torch.from_numpy(arrays.categorical), bags)
    cardinalities = tuple(c.cardinality for c in arrays.multi.values())
    patches = image_patches(catalogue, 32, 16)
    per_image = patches.values.shape[1]
    values = torch.from_numpy(patches.values[patches.mask]).flatten(0, 1)
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(patches.mask * per_image)]))
    image = Tokens(values, offsets, torch.arange(per_image).repeat(int(patches.mask.sum())))
    spec = TableSpec(arrays.numeric.shape[1], arrays.cardinalities, cardinalities)
    return ItemInputs(catalogue.num_items, {"image": image}, table, spec)


def fit(config: RecommenderConfig, content: ItemInputs, data: Split) -> tuple[Recommender, list[float]]:
    torch.manual_seed(0)
    trained = data.popularity > 0
    model = Recommender(config, content.spec, trained)
    known = torch.from_numpy(np.flatnonzero(trained))
    model.item_tower.fit_whitening(content, known)
    objective = Objective(model, data.popularity)
    inputs = content.select(known)
    optimizer = torch.optim.AdamW([*model.parameters(), *objective.parameters()], lr=config.learning_rate)
    curve = []
    for epoch in range(config.epochs):
        batches = epoch_batches(data.train, config.max_length, config.batch_size, seed=0, epoch=epoch)
        total = 0.0
        for batch in batches:
            optimizer.zero_grad()
            loss = objective(model, inputs, batch).total
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) / len(batches)
        curve.append(total)
    return model.eval(), curve


def hit_rate(ranked: np.ndarray, data: Split) -> float:
    return float(per_user(ranked, data.relevant("test"), ["HR@10"])["HR@10"].mean())


def test_learns_planted_structure_and_recommends_cold_items(catalogue: Catalogue) -> None:
    data = split(catalogue, "S")
    trained = data.popularity > 0
    content = content_of(catalogue, trained)
    model, curve = fit(CONFIG, content, data)
    assert curve[-1] < curve[0] - 0.2
    items = model.item_vectors(content)
    users = data.users("test")
    query = model.user_vectors(data.history("test").rows(users), items)
    ours, popular = (
        hit_rate(rank(query, items.vectors, data, "test", 10), data),
        hit_rate(most_popular(data, "test", 10), data),
    )
    print(f"HR@10 {ours:.3f}, most popular {popular:.3f}, loss {curve[0]:.3f} to {curve[-1]:.3f}")
    assert ours > popular + 0.05

    cold = np.flatnonzero(~trained)
    targets = data.test.rows(users)
    wanting = np.flatnonzero(np.isin(targets.ids, cold))
    answers = model.recommend(data.history("test").rows(users[wanting]), len(cold), items, candidates=cold)
    found = answers.items == targets.ids[wanting][:, None]
    assert found.any(1).all()
    places = found.argmax(1)
    print(f"{len(wanting)} users want one of {len(cold)} cold items; its mean place is {places.mean():.2f}")
    assert places.mean() < (len(cold) - 1) / 2 - 0.5
