from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from rec_helpers import ALL, COLD, CONTENT, ITEMS, TRAINED, config, inputs, model_of

from mmrec.evaluation import Ragged
from mmrec.recommender import ItemVectors, Recommender

HISTORIES = Ragged.from_lists([[0, 1], [3], [5, 6, 2, 3, 0, 1, 8, 10, 11]])


@pytest.fixture
def model() -> Recommender:
    return model_of(config())


def by_hand(
    model: Recommender, histories: Ragged, exclude_seen: bool = True, candidates: list[int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Every score as a matrix and a stable sort."""
    items = model.item_vectors(inputs()).vectors
    ids, scores = [], []
    for history in histories.to_lists():
        read = torch.tensor(history[-6:])
        state = model.user_tower(items, read, torch.tensor([0, len(read)]))[-1]
        score = (items @ state).numpy()
        if model.config.score == "cosine":
            score = score / np.linalg.norm(state.numpy())
        hidden = set(history) if exclude_seen else set()
        hidden |= set(range(ITEMS)) - set(range(ITEMS) if candidates is None else candidates)
        score[sorted(hidden)] = -np.inf
        order = np.argsort(-score, kind="stable")
        ids.append(np.where(np.isinf(score[order]), -1, order))
        scores.append(score[order])
    return np.stack(ids), np.stack(scores)


@pytest.mark.parametrize("score", ["dot", "cosine"])
@pytest.mark.parametrize("exclude_seen", [True, False])
@pytest.mark.parametrize("candidates", [None, [COLD, 2, 5, 4, 2], []])
@torch.no_grad()
def test_recommend_equals_a_full_sort(score: str, exclude_seen: bool, candidates: list[int] | None) -> None:
    model = model_of(config(score=score))
    items = model.item_vectors(inputs())
    given = None if candidates is None else np.array(candidates, dtype=np.int64)
    answers = model.recommend(HISTORIES, 12, items, exclude_seen=exclude_seen, candidates=given)
    ids, scores = by_hand(model, HISTORIES, exclude_seen, candidates)
    assert np.array_equal(answers.items, ids)
    np.testing.assert_allclose(answers.scores, scores, rtol=1e-9)
    assert answers.mass.shape == (3, 12, len(ALL))
    expected = np.where((ids >= 0)[..., None], items.mass.numpy()[ids], 0)
    assert np.array_equal(answers.mass, expected)


def test_seen_items_that_are_too_old_to_be_read_stay_out(model: Recommender) -> None:
    answers = model.recommend(HISTORIES, 12, model.item_vectors(inputs()))
    assert set(answers.items[2]) == {-1, 4, 7, 9}
    assert (answers.items[2] == -1).sum() == 9
    assert np.isneginf(answers.scores[2, 3:]).all() and not answers.mass[2, 3:].any()


def test_cold_items_have_finite_scores_and_are_recommended_by_their_content(model: Recommender) -> None:
    answers = model.recommend(HISTORIES, 1, model.item_vectors(inputs()), candidates=np.array([COLD]))
    assert answers.items.tolist() == [[COLD]] * 3 and np.isfinite(answers.scores).all()
    assert not answers.mass[..., 0].any()
    np.testing.assert_allclose(answers.mass.sum(2), 1)


def test_only_the_last_items_are_read(model: Recommender) -> None:
    items = model.item_vectors(inputs())
    short = Ragged.from_lists([history[-6:] for history in HISTORIES.to_lists()])
    assert torch.equal(model.user_vectors(HISTORIES, items), model.user_vectors(short, items))
    older = Ragged.from_lists([[0, 1], [3], [5, 6, 2, 1, 0, 1, 8, 10, 11]])
    moved = model.user_vectors(older, items) != model.user_vectors(HISTORIES, items)
    assert moved.any(1).tolist() == [False, False, True]


def test_batches_of_items_and_users_do_not_change_the_answer(model: Recommender) -> None:
    whole, parts = model.item_vectors(inputs()), model.item_vectors(inputs(), batch_size=5)
    torch.testing.assert_close(parts.vectors, whole.vectors)
    torch.testing.assert_close(parts.mass, whole.mass)
    torch.testing.assert_close(model.user_vectors(HISTORIES, whole, batch_size=1), model.user_vectors(HISTORIES, whole))


@pytest.mark.parametrize("training", [True, False])
def test_serving_is_in_eval_mode_and_restores_the_mode(training: bool) -> None:
    model = model_of(config(dropout=0.5, content_dropout=0.5, identity_dropout=0.5))
    items = model.item_vectors(inputs())
    users = model.user_vectors(HISTORIES, items)
    model.train(training)
    again = model.item_vectors(inputs())
    assert torch.equal(again.vectors, items.vectors) and not again.vectors.requires_grad
    assert torch.equal(model.user_vectors(HISTORIES, again), users) and not users.requires_grad
    assert model.training == training and model.user_tower.training == training
    with pytest.raises(ValueError):
        model.recommend(Ragged.from_lists([[]]), 1, items)
    assert model.training == training


def test_no_histories(model: Recommender) -> None:
    answers = model.recommend(Ragged.empty(0), 3, model.item_vectors(inputs()))
    assert answers.items.shape == answers.scores.shape == (0, 3) and answers.mass.shape == (0, 3, 4)


def test_a_saved_model_gives_the_same_answers(model: Recommender) -> None:
    fresh = Recommender(config(), inputs().spec, TRAINED).double()
    fresh.load_state_dict(model.state_dict())
    one, other = (m.recommend(HISTORIES, 5, m.item_vectors(inputs())) for m in (model, fresh))
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    assert {"trained", "item_tower.whiten.text.matrix"} <= set(model.state_dict())


def test_who_was_trained_is_part_of_the_saved_model(model: Recommender) -> None:
    fresh = Recommender(config(), inputs().spec, None).double()
    assert fresh.trained.all()
    fresh.load_state_dict(model.state_dict())
    assert fresh.trained.tolist() == TRAINED.tolist()


def test_the_array_of_trained_items_is_copied() -> None:
    trained = TRAINED.copy()
    model = Recommender(config("identity"), inputs().spec, trained)
    trained[:] = False
    assert model.trained.tolist() == TRAINED.tolist()


@pytest.mark.parametrize(
    "histories, changes, error, message",
    [
        ([[0], [], [1]], {}, ValueError, "history 1 is empty; it needs at least one item"),
        ([[0, 12]], {}, ValueError, r"history holds item row 12, outside \[0, 12\)"),
        ([[-1]], {}, ValueError, r"history holds item row -1, outside \[0, 12\)"),
        ([[0]], {"k": 0}, ValueError, "k must be"),
        ([[0]], {"candidates": np.array([3, 12])}, ValueError, r"candidates hold item row 12, outside \[0, 12\)"),
        ([[0]], {"candidates": np.array([-1])}, ValueError, r"candidates hold item row -1, outside \[0, 12\)"),
        ([[0]], {"candidates": np.array([[1]])}, ValueError, "candidates must be one-dimensional"),
        (
            [[0]],
            {"candidates": np.array([1.0])},
            TypeError,
            r"candidates must hold item rows \(integers\), got float64",
        ),
        ([[0]], {"candidates": TRAINED}, TypeError, r"candidates must hold item rows \(integers\), got bool"),
    ],
)
def test_bad_requests(
    model: Recommender, histories: list[list[int]], changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        model.recommend(Ragged.from_lists(histories), items=model.item_vectors(inputs()), **{"k": 3, **changes})


def test_vectors_of_another_catalogue(model: Recommender) -> None:
    with pytest.raises(ValueError, match="inputs must hold 12 items, got 2"):
        model.item_vectors(inputs().select(torch.tensor([0, 1])))
    items = model.item_vectors(inputs())
    with pytest.raises(ValueError, match="items must hold 12 vectors, got 11"):
        model.user_vectors(HISTORIES, ItemVectors(items.vectors[:11], items.mass[:11]))


@pytest.mark.parametrize("trained", [np.ones(11, bool), np.ones(12, np.int64), torch.ones(12, 1, dtype=torch.bool)])
def test_trained_must_be_a_mask_of_the_catalogue(trained: Any) -> None:
    with pytest.raises(ValueError, match=r"trained must be bool \[12\], got"):
        Recommender(config(), inputs().spec, trained)


def test_parameters_follow_the_modalities() -> None:
    names = {name for name, _ in model_of(config("identity")).named_parameters()}
    assert {name.split(".")[0] for name in names} == {"item_tower", "user_tower"}
    assert [name for name in names if name.startswith("item_tower")] == ["item_tower.identity"]
    assert "item_tower.identity" not in dict(model_of(config(*CONTENT)).named_parameters())
