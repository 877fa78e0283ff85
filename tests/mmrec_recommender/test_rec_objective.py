from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from rec_helpers import (
    ALL,
    COLD,
    CONTENT,
    ITEMS,
    KNOWN,
    NOTHING,
    POPULARITY,
    TRAINED,
    batch,
    config,
    inputs,
    known_inputs,
    model_of,
    objective_of,
)  # fmt: skip
from torch import Tensor
from torch.nn import functional as F

from mmrec.fusion import ModalityMoE, alignment
from mmrec.recommender import Batch, Objective, Recommender

EXTRA = torch.tensor([3, 0, 11, 0])


def with_extra(objective: Objective, extra: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective, "_extra", lambda: extra)


def states_and_items(model: Recommender) -> tuple[Tensor, Tensor]:
    """States of the batch and the vectors of all items, from the public parts of the model."""
    vectors = model.encode(inputs(), torch.arange(ITEMS)).vectors
    read = batch()
    return model.states(vectors, read.index, read.offsets), vectors


@pytest.mark.parametrize("modalities", [ALL, CONTENT, ("identity",)])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_full_softmax_is_cross_entropy_over_the_known_items(modalities: tuple[str, ...], smoothing: float) -> None:
    model = model_of(config(*modalities, negatives="all", label_smoothing=smoothing))
    losses = objective_of(model)(model, known_inputs(), batch())
    states, vectors = states_and_items(model)
    place = torch.from_numpy(np.cumsum(TRAINED) - 1)
    expected = F.cross_entropy(states @ vectors[KNOWN].T, place[batch().target], label_smoothing=smoothing)
    torch.testing.assert_close(losses.item, expected)


def test_cosine_scores_have_a_scale_that_learns_up_to_one_hundred() -> None:
    model = model_of(config(negatives="all", score="cosine", scale=3.0))
    objective = objective_of(model)
    states, vectors = states_and_items(model)
    for rows in (states, vectors[KNOWN]):
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)).double())
    place = torch.from_numpy(np.cumsum(TRAINED) - 1)[batch().target]
    for log_scale, scale in ((math.log(3.0), 3.0), (math.log(500.0), 100.0)):
        assert objective.log_scale is not None
        with torch.no_grad():
            objective.log_scale.fill_(log_scale)
        losses = objective(model, known_inputs(), batch())
        torch.testing.assert_close(losses.item, F.cross_entropy(scale * states @ vectors[KNOWN].T, place))
    with torch.no_grad():
        objective.log_scale.fill_(math.log(3.0))
    objective(model, known_inputs(), batch()).total.backward()
    assert objective.log_scale.grad is not None and objective.log_scale.grad != 0
    assert objective_of(model_of(config())).log_scale is None


@torch.no_grad()
def in_batch_by_hand(model: Recommender, extra: Tensor, popularity: np.ndarray, scale: float = 1.0) -> float:
    """The docstring's formula, one key and one row at a time, in Python floats."""
    states, vectors = states_and_items(model)
    keys = [*batch().target.tolist(), *extra.tolist()]
    positives, draws, known = len(batch().target), len(keys), len(KNOWN)
    losses = []
    for row in range(positives):
        logits = {}
        for column, key in enumerate(keys):
            if column != row and key == keys[row]:
                continue
            share = popularity[key] / popularity.sum()
            rate = (positives * share + len(extra) / known) / draws
            logits[column] = scale * float(states[row] @ vectors[key]) - math.log(rate)
        losses.append(math.log(sum(math.exp(value) for value in logits.values())) - logits[row])
    return sum(losses) / positives


@pytest.mark.parametrize("extra", [EXTRA, EXTRA[:0], torch.arange(6)])
@pytest.mark.parametrize("modalities", [ALL, ("identity",)])
def test_in_batch_equals_the_formula(
    modalities: tuple[str, ...], extra: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(config(*modalities, negatives="batch"))
    objective = objective_of(model)
    with_extra(objective, extra, monkeypatch)
    losses = objective(model, known_inputs(), batch())
    assert losses.item.item() == pytest.approx(in_batch_by_hand(model, extra, POPULARITY), rel=1e-6)


def test_in_batch_with_cosine_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(config(negatives="batch", score="cosine", scale=5.0))
    objective = objective_of(model)
    with_extra(objective, EXTRA, monkeypatch)
    losses = objective(model, known_inputs(), batch())
    assert losses.item.item() == pytest.approx(in_batch_by_hand(model, EXTRA, POPULARITY, 5.0), rel=1e-6)


def test_an_accidental_hit_changes_the_loss_only_through_the_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(config("identity", negatives="batch"))
    objective = objective_of(model)
    only = Batch(torch.tensor([0]), torch.tensor([0, 1]), torch.tensor([3]))
    for extra, others in ((torch.tensor([3, 3]), 0), (torch.tensor([3, 5]), 1)):
        with_extra(objective, extra, monkeypatch)
        loss = objective(model, known_inputs(), only).item
        assert (loss > 0) == bool(others)


@torch.no_grad()
def test_many_uniform_negatives_approach_the_softmax_over_all_known_items() -> None:
    count = 40_000
    model = model_of(config("identity", negatives="batch", extra_negatives=count))
    losses = objective_of(model)(model, known_inputs(), batch())
    states, vectors = states_and_items(model)
    logits = states @ vectors[KNOWN].T
    place = torch.from_numpy(np.cumsum(TRAINED) - 1)[batch().target].unsqueeze(1)
    rivals = logits.scatter(1, place, -torch.inf).logsumexp(1) - logits.gather(1, place)[:, 0]
    # Each rival is drawn count / W times and the positive counts once: the softmax with count / W of every rival.
    expected = F.softplus(rivals + math.log(count / len(KNOWN))).mean()
    torch.testing.assert_close(losses.item, expected, rtol=0, atol=0.02)


def test_extra_negatives_are_uniform_over_the_known_items() -> None:
    objective = objective_of(model_of(config("identity", negatives="batch", extra_negatives=10_000)))
    counts = torch.bincount(objective._extra(), minlength=ITEMS)
    assert counts.sum() == 10_000 and counts[[COLD, NOTHING]].sum() == 0
    # 1000 expected per item; five standard deviations of the binomial are 150.
    assert ((counts[KNOWN] - 1000).abs() < 150).all()
    assert len(objective_of(model_of(config(extra_negatives=0)))._extra()) == 0


@pytest.mark.parametrize("negatives", ["all", "batch"])
def test_cold_items_are_never_negatives(negatives: str) -> None:
    model = model_of(config("identity", negatives=negatives, extra_negatives=200))
    assert model.item_tower.identity is not None
    with torch.no_grad():
        model.item_tower.identity[[COLD, NOTHING]] = torch.nan
    losses = objective_of(model)(model, known_inputs(), batch())
    losses.total.backward()
    grad = model.item_tower.identity.grad
    assert losses.total.isfinite() and grad is not None and grad.isfinite().all()
    assert not grad[[COLD, NOTHING]].any()
    assert grad[KNOWN].any(1).all()


def test_auto_takes_all_items_up_to_the_limit() -> None:
    def full(**changes: object) -> bool:
        return objective_of(model_of(config("identity", **changes))).full

    assert full(negatives="auto", full_softmax_items=len(KNOWN))
    assert not full(negatives="auto", full_softmax_items=len(KNOWN) - 1)
    assert full(negatives="all", full_softmax_items=1)
    assert not full(negatives="batch", full_softmax_items=100)


@pytest.mark.parametrize("kind", ["contrast", "attention", "prototypes", "vae"])
def test_what_disentangles_is_part_of_the_total_and_says_what_is_aligned(kind: str) -> None:
    settings = config(negatives="all", disentangle=kind, disentangle_weight=0.7, align_weight=0.3, align_items=100)
    model = model_of(settings)
    objective = objective_of(model)
    losses = objective(model, known_inputs(), batch())
    torch.testing.assert_close(
        losses.total, losses.item + 0.3 * losses.alignment + 0.7 * losses.disentangle + losses.router
    )
    output = model.encode(known_inputs(), torch.from_numpy(KNOWN))
    assert output.parts is not None
    torch.testing.assert_close(losses.disentangle, torch.stack(list(output.parts.losses.values())).sum().detach())
    assert objective.alignment is not None and losses.disentangle > 0
    torch.testing.assert_close(losses.alignment, objective.alignment(output.pooled, output.present).detach())
    losses.total.backward()
    assert model.item_tower.disentangle is not None
    unused = [
        name
        for name, parameter in model.item_tower.disentangle.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    assert not unused


@pytest.mark.parametrize("kind", ["infonce", "adapters", "projection", "bootstrap", "vae"])
def test_alignment_is_of_the_kind_that_the_config_says(kind: str) -> None:
    model = model_of(config(negatives="all", align=kind, align_items=100))
    objective = objective_of(model).eval()  # no dropout of targets, nothing drawn
    output = model.encode(known_inputs(), torch.from_numpy(KNOWN))
    expected = alignment(kind, ALL, 8).double().eval()
    assert objective.alignment is not None
    expected.load_state_dict(objective.alignment.state_dict())
    found = objective(model, known_inputs(), batch()).alignment
    torch.testing.assert_close(found, expected(output.pooled, output.present).detach())


@pytest.mark.parametrize("negatives", ["all", "batch"])
def test_total_is_the_weighted_sum_of_its_parts(negatives: str) -> None:
    entropy = {"local_entropy": 0.02, "global_entropy": 0.4}
    weights = {"align_weight": 0.3, "balance_weight": 0.2, "z_weight": 0.05}
    weights |= {f"{name}_weight": weight for name, weight in entropy.items()}
    model = model_of(config(negatives=negatives, align_items=100, **weights))
    objective = objective_of(model)
    losses = objective(model, known_inputs(), batch())
    torch.testing.assert_close(losses.total, losses.item + 0.3 * losses.alignment + losses.router)
    assert losses.total.requires_grad and not losses.item.requires_grad
    if negatives == "batch":
        return
    output = model.encode(known_inputs(), torch.from_numpy(KNOWN))
    assert output.routing is not None and objective.alignment is not None and losses.load is not None
    torch.testing.assert_close(losses.router, ModalityMoE.penalty(output.routing.losses, 0.2, 0.05, **entropy).detach())
    torch.testing.assert_close(losses.alignment, objective.alignment(output.pooled, output.present).detach())
    assert torch.equal(losses.load, output.routing.stats[..., 0])


def test_alignment_reads_align_items_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(config(negatives="all", align_items=3))
    objective = objective_of(model)
    seen = []
    alignment = objective.alignment
    assert alignment is not None
    forward = alignment.forward
    monkeypatch.setattr(
        alignment, "forward", lambda e, p: (seen.append({n: len(v) for n, v in e.items()}), forward(e, p))[1]
    )
    objective(model, known_inputs(), batch())
    assert seen == [dict.fromkeys(ALL, 3)]


def test_alignment_needs_two_modalities_and_a_weight() -> None:
    for settings in (config("identity"), config("text"), config(align_weight=0.0)):
        model = model_of(settings)
        objective = objective_of(model)
        assert objective.alignment is None
        assert objective(model, known_inputs(), batch()).alignment == 0


def test_no_experts_no_router_loss() -> None:
    model = model_of(config(experts_shared=0, experts_private=0))
    losses = objective_of(model)(model, known_inputs(), batch())
    assert losses.router == 0 and losses.load is None


@pytest.mark.parametrize("negatives", ["all", "batch"])
def test_one_step_reaches_every_parameter(negatives: str) -> None:
    model = model_of(config(negatives=negatives, score="cosine", extra_negatives=60, align_items=100))
    objective = objective_of(model)
    objective(model, known_inputs(), batch()).total.backward()
    for name, parameter in [*model.named_parameters(), *objective.named_parameters()]:
        grad = parameter.grad
        assert grad is not None and grad.isfinite().all() and grad.any(), name
        rows = grad.flatten(1).any(1) if grad.ndim > 1 else None
        if name == "item_tower.identity":
            assert rows is not None and rows.tolist() == TRAINED.tolist()
        elif name == "user_tower.position":
            assert rows is not None and rows.tolist() == [True] * 4 + [False] * 2
        elif rows is not None:
            assert rows.all(), name


@pytest.mark.parametrize("negatives", ["all", "batch"])
def test_bad_arguments(negatives: str) -> None:
    model = model_of(config(negatives=negatives))
    with pytest.raises(ValueError, match=r"popularity must have shape \[12\], got \[10\]"):
        Objective(model, POPULARITY[KNOWN])
    with pytest.raises(ValueError, match="inputs must hold the 10 known items, got 12"):
        objective_of(model)(model, inputs(), batch())


def test_the_model_that_is_saved_holds_nothing_of_the_objective() -> None:
    model = model_of(config(score="cosine"))
    objective = objective_of(model)
    assert {name for name, _ in objective.named_parameters()} == {
        "log_scale", "alignment.log_scale", *(f"alignment.heads.{name}.weight" for name in ALL)
    }  # fmt: skip
    assert not set(objective.state_dict()) & set(model.state_dict())
    assert dataclasses.is_dataclass(model.config)
