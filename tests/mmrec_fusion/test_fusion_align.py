from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmrec.fusion import ModalityAlignment
from mmrec_kernels import info_nce_pairs

NAMES = ("identity", "text", "image")
PRESENT = {
    "identity": torch.tensor([1, 1, 1, 0, 1, 1]).bool(),
    "text": torch.tensor([1, 0, 1, 1, 1, 1]).bool(),
    "image": torch.tensor([1, 1, 0, 1, 0, 1]).bool(),
}


def embeddings() -> dict[str, Tensor]:
    return {name: torch.randn(6, 5, dtype=torch.float64) for name in NAMES}


def module(**settings: object) -> ModalityAlignment:
    return ModalityAlignment(NAMES, 5, dim=4, **settings).double()  # type: ignore[arg-type]


def by_hand(model: ModalityAlignment, given: dict[str, Tensor], pairs: list[tuple[str, str]]) -> Tensor:
    """CLIP's loss with torch's cross_entropy on the rows that have both modalities."""
    losses = []
    for a, b in pairs:
        both = PRESENT[a] & PRESENT[b]
        left, right = (F.normalize(given[name][both] @ model.heads[name].weight.T, dim=1) for name in (a, b))
        logits = left @ right.T * model.log_scale.exp()
        target = torch.arange(len(logits))
        losses.append((F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2)
    return torch.stack(losses).mean()


def test_is_the_mean_of_clips_loss_over_pairs() -> None:
    model, given = module(), embeddings()
    pairs = [("identity", "text"), ("identity", "image"), ("text", "image")]
    assert model.pairs == pairs
    torch.testing.assert_close(model(given, PRESENT), by_hand(model, given, pairs))


def test_only_the_named_pairs() -> None:
    model, given = module(pairs=[("text", "image")], scale=3.0), embeddings()
    torch.testing.assert_close(model(given, PRESENT), by_hand(model, given, [("text", "image")]))


def test_equals_info_nce_pairs_on_the_projections() -> None:
    model, given = module(), embeddings()
    projected = {name: model.heads[name](values) for name, values in given.items()}
    expected = info_nce_pairs(
        projected, model.pairs, mask=PRESENT, scale=model.log_scale.exp(), pair_weight=1 / 3, normalize=True
    )
    torch.testing.assert_close(model(given, PRESENT), expected)


def test_rows_that_are_missing_are_not_read() -> None:
    model, given = module(pairs=[("text", "image")]), embeddings()
    poisoned = {name: torch.where(PRESENT[name].unsqueeze(1), values, torch.nan) for name, values in given.items()}
    assert torch.equal(model(poisoned, PRESENT), model(given, PRESENT))


def test_a_modality_that_is_not_given_leaves_its_pairs_out() -> None:
    model, given = module(), embeddings()
    del given["image"]
    torch.testing.assert_close(model(given, PRESENT), by_hand(model, given, [("identity", "text")]))
    assert model({"text": given["text"]}, PRESENT).item() == 0.0


def test_nobody_has_two_modalities() -> None:
    model, given = module(), embeddings()
    nobody = {name: torch.zeros(6, dtype=torch.bool) for name in NAMES}
    loss = model(given, nobody)
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_the_scale_learns_and_stops_at_one_hundred() -> None:
    model, given = module(), embeddings()
    model(given, PRESENT).backward()
    assert model.log_scale.grad is not None and model.log_scale.grad.item() != 0.0
    with torch.no_grad():
        model.log_scale.fill_(math.log(1000.0))
    beyond = model(given, PRESENT)
    with torch.no_grad():
        model.log_scale.fill_(math.log(100.0))
    torch.testing.assert_close(beyond, model(given, PRESENT))


def test_gradient_pulls_an_items_modalities_together() -> None:
    model, given = module(), embeddings()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(given, PRESENT)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"pairs name \['audio'\]"):
        module(pairs=[("text", "audio")])
    for scale in (0.0, -1.0, 100.5, math.nan):
        with pytest.raises(ValueError, match=r"scale must be in \(0, 100\]"):
            module(scale=scale)
