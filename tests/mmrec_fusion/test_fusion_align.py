from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmrec.fusion import (
    ALIGNMENTS,
    Adapter,
    BootstrapAlignment,
    GaussianAlignment,
    ModalityAlignment,
    ProjectionAlignment,
    alignment,
)
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


def test_adapters_as_heads_start_as_the_identity() -> None:
    model, given = ModalityAlignment(NAMES, 5, heads="adapter").double(), embeddings()
    expected = info_nce_pairs(
        given, model.pairs, mask=PRESENT, scale=model.log_scale.exp(), pair_weight=1 / 3, normalize=True
    )
    torch.testing.assert_close(model(given, PRESENT), expected)
    adapter = model.heads["text"]
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_()
    x = given["text"]
    normed = F.layer_norm(x, (5,), adapter.norm.weight, adapter.norm.bias)
    inner = F.gelu(normed @ adapter.down.weight.T + adapter.down.bias)
    torch.testing.assert_close(adapter(x), x + inner @ adapter.up.weight.T + adapter.up.bias)
    assert not torch.allclose(model(given, PRESENT), expected)


def apart(a: Tensor, b: Tensor, both: Tensor) -> Tensor:
    return torch.stack([1 - F.cosine_similarity(a[n], b[n], dim=0) for n in range(6) if both[n]]).mean()


def test_projection_takes_the_others_to_the_first() -> None:
    model, given = ProjectionAlignment(NAMES, 5, hidden=7).double(), embeddings()
    leaves = {name: value.requires_grad_() for name, value in given.items()}
    found = model(leaves, PRESENT)
    expected = [
        apart(model.project[name](given[name]), given["identity"], PRESENT["identity"] & PRESENT[name])
        for name in ("text", "image")
    ]
    torch.testing.assert_close(found, torch.stack(expected).mean())
    found.backward()
    assert leaves["identity"].grad is None and leaves["text"].grad is not None and leaves["text"].grad.any()
    assert float(model({"identity": given["identity"]}, PRESENT)) == 0
    assert float(model({"text": given["text"]}, PRESENT)) == 0
    assert float(ProjectionAlignment(("identity",), 5)({"identity": given["identity"].float()}, PRESENT)) == 0


def test_bootstrap_has_no_negatives_and_no_gradient_to_its_targets() -> None:
    model, given = BootstrapAlignment(NAMES, 5).double().eval(), embeddings()
    pairs = [(a, b) for a in NAMES for b in NAMES if a != b]
    between = [apart(model.predict(given[a]), given[b], PRESENT[a] & PRESENT[b]) for a, b in pairs]
    own = [apart(model.predict(given[a]), given[a], PRESENT[a]) for a in NAMES]
    torch.testing.assert_close(model(given, PRESENT), torch.stack(between).mean() + torch.stack(own).mean())
    leaves = {name: value.detach().requires_grad_() for name, value in given.items()}
    mean_grad = torch.autograd.grad(model(leaves, PRESENT), list(leaves.values()))
    held = {name: value.detach() for name, value in given.items()}

    def online(*values: Tensor) -> Tensor:
        """The same, with targets held where they were."""
        said = [model.predict(value) for value in values]
        cross = [apart(said[NAMES.index(a)], held[b], PRESENT[a] & PRESENT[b]) for a, b in pairs]
        return (
            torch.stack(cross).mean()
            + torch.stack([apart(said[NAMES.index(a)], held[a], PRESENT[a]) for a in NAMES]).mean()
        )

    for got, wanted in zip(
        mean_grad, torch.autograd.grad(online(*leaves.values()), list(leaves.values())), strict=True
    ):
        torch.testing.assert_close(got, wanted)
    model.train()
    torch.manual_seed(0)
    assert model(given, PRESENT).item() != model(given, PRESENT).item(), "targets lose other parts at each call"
    single = model.eval()({"text": given["text"]}, PRESENT)
    torch.testing.assert_close(single, apart(model.predict(given["text"]), given["text"], PRESENT["text"]))


def test_gaussians_decode_each_other_and_lie_together() -> None:
    model, given = GaussianAlignment(NAMES, 5, latent=3, kl=0.5).double().eval(), embeddings()
    q = {name: model.coders.posterior(name, given[name]) for name in NAMES}
    errors, apart_, divergences = [], [], []
    for a in NAMES:
        for b in NAMES:
            both = PRESENT[a] & PRESENT[b]
            error = (model.coders.decode[b](q[a][0]) - given[b])[both].square().mean()
            errors.append(error / given[b][both].square().mean())
            if NAMES.index(a) < NAMES.index(b):
                squared = (q[a][0] - q[b][0]).square().sum(1) + (q[a][1].sqrt() - q[b][1].sqrt()).square().sum(1)
                apart_.append((squared[both].sqrt() / math.sqrt(3)).mean())
        mean, variance = (part[PRESENT[a]] for part in q[a])
        divergences.append(((variance + mean**2 - 1 - variance.log()) / 2).mean())
    expected = torch.stack(errors).mean() + torch.stack(apart_).mean() + 0.5 * torch.stack(divergences).mean()
    torch.testing.assert_close(model(given, PRESENT), expected)


@pytest.mark.parametrize("kind", ALIGNMENTS)
def test_every_kind_reads_what_is_there_only_and_brings_modalities_together(kind: str) -> None:
    torch.manual_seed(0)
    model = alignment(kind, NAMES, 5).double()
    given = embeddings()
    poisoned = {name: torch.where(PRESENT[name].unsqueeze(1), v, torch.nan) for name, v in given.items()}
    for values in (model.eval()(poisoned, PRESENT), model.eval()(given, PRESENT)):
        assert values.shape == () and values.isfinite()
    assert torch.equal(model(poisoned, PRESENT), model(given, PRESENT))
    nobody = {name: torch.zeros(6, dtype=torch.bool) for name in NAMES}
    leaves = {name: value.detach().requires_grad_() for name, value in given.items()}
    nothing = model(leaves, nobody)
    nothing.backward()
    assert float(nothing) == 0 and all(v.grad is None or not v.grad.any() for v in leaves.values())
    # Two views of one thing behind different maps.
    hidden = torch.randn(64, 5).double()
    views = {name: hidden @ torch.randn(5, 5).double() for name in NAMES}
    everybody = {name: torch.ones(64, dtype=torch.bool) for name in NAMES}
    optimizer = torch.optim.Adam(model.train().parameters(), lr=0.02)
    first = float(model(views, everybody).detach())
    for _ in range(200):
        optimizer.zero_grad()
        loss = model(views, everybody)
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.75 * first


def test_bad_kinds_and_settings() -> None:
    with pytest.raises(ValueError, match="kind must be one of .*'infonce'.*, got 'magic'"):
        alignment("magic", NAMES, 5)
    with pytest.raises(ValueError, match="heads must be 'linear' or 'adapter', got 'mlp'"):
        ModalityAlignment(NAMES, 5, heads="mlp")
    with pytest.raises(ValueError, match="dim must be None or the width, 5, with adapters as heads, got 4"):
        ModalityAlignment(NAMES, 5, heads="adapter", dim=4)
    with pytest.raises(ValueError, match="dropout must be in"):
        BootstrapAlignment(NAMES, 5, dropout=1.0)
    with pytest.raises(ValueError, match="kl must be ≥ 0, got -1"):
        GaussianAlignment(NAMES, 5, kl=-1)
    with pytest.raises(ValueError, match="inner must be at least 1, got 0"):
        Adapter(5, 0)
