"""Each way of disentangling against its formulas, written item by item in float64."""

from __future__ import annotations

import math

import pytest
import torch
from fusion_helpers import away_from_the_start, check_gradients
from torch import Tensor, nn
from torch.nn import functional as F

from mmrec.evaluation import leakage
from mmrec.fusion import (
    DISENTANGLERS,
    Disentangled,
    FactorAttention,
    GaussianExperts,
    PrototypeExperts,
    SharedPrivate,
    disentangler,
    distance_correlation,
)
from mmrec.fusion.gaussian import divergence, product_of_gaussians

WIDTH, ITEMS = 8, 6
NAMES = ("identity", "text", "image")
PRESENT = {
    "identity": torch.tensor([1, 1, 1, 0, 1, 0]).bool(),
    "text": torch.tensor([1, 0, 1, 1, 1, 0]).bool(),
    "image": torch.tensor([1, 1, 0, 0, 1, 0]).bool(),  # the last item has nothing
}


def vectors() -> dict[str, Tensor]:
    return {name: torch.randn(ITEMS, WIDTH, dtype=torch.float64) for name in NAMES}


def module(kind: str) -> nn.Module:
    return away_from_the_start(disentangler(kind, NAMES, WIDTH)).eval()


def has(item: int) -> list[str]:
    return [name for name in NAMES if PRESENT[name][item]]


def relative_error(decode: nn.Module, code: Tensor, wanted: Tensor, name: str) -> Tensor:
    rows = PRESENT[name]
    return (decode(code[rows]) - wanted[rows]).square().mean() / wanted[rows].square().mean()


def test_shared_and_private_parts() -> None:
    model, x = module("contrast"), vectors()
    assert isinstance(model, SharedPrivate)
    found = model(x, PRESENT)
    for item in range(ITEMS):
        parts = [
            torch.stack([side[name].weight @ x[name][item] for name in has(item)]).mean(0)
            if has(item)
            else torch.zeros(WIDTH // 2).double()
            for side in (model.shared, model.private)
        ]
        torch.testing.assert_close(found.vector[item], model.out.weight @ torch.cat(parts))
    for name in NAMES:
        rows = PRESENT[name]
        torch.testing.assert_close(found.aligned[name][rows], model.shared[name](x[name])[rows])
        torch.testing.assert_close(found.private[name][rows], model.private[name](x[name])[rows])
    both = {name: torch.cat([found.aligned[name], found.private[name]], 1) for name in NAMES}
    errors = [relative_error(model.decode[name], both[name], x[name], name) for name in NAMES]
    torch.testing.assert_close(found.losses["reconstruction"], torch.stack(errors).mean())


def test_orthogonality_is_of_the_correlations_of_entries() -> None:
    model, x = module("contrast"), vectors()
    found = model(x, PRESENT)

    def correlated(a: Tensor, b: Tensor, rows: Tensor) -> Tensor:
        table = torch.corrcoef(torch.cat([a[rows], b[rows]], 1).T)
        return table[: WIDTH // 2, WIDTH // 2 :].square().sum() / (WIDTH // 2)

    pairs = [correlated(found.aligned[n], found.private[n], PRESENT[n]) for n in NAMES]
    pairs += [
        correlated(found.private[a], found.private[b], PRESENT[a] & PRESENT[b])
        for a, b in (("identity", "text"), ("identity", "image"), ("text", "image"))
    ]
    torch.testing.assert_close(found.losses["orthogonality"], torch.stack(pairs).mean())


def test_apart_for_linear_probes_when_it_is_minimised() -> None:
    """What the loss is for: fitted to one half of the items, no linear map reads a private part from the shared one."""
    torch.manual_seed(0)
    x = {name: torch.randn(2000, WIDTH) @ torch.randn(WIDTH, WIDTH) for name in NAMES}
    everything = {name: torch.ones(2000, dtype=torch.bool) for name in NAMES}
    model = SharedPrivate(NAMES, WIDTH)

    def leaks() -> list[float]:
        with torch.no_grad():
            parts = model(x, everything)
        arrays = [{n: v.numpy() for n, v in side.items()} for side in (parts.aligned, parts.private, everything)]
        return list(leakage(arrays[0], arrays[1], arrays[2]).within.values())

    before = leaks()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(200):
        losses = model(x, everything).losses
        optimizer.zero_grad()
        (losses["orthogonality"] + losses["reconstruction"]).backward()
        optimizer.step()
    assert min(before) > 0.3 and max(leaks()) < 0.05 and losses["reconstruction"] < 0.05


def test_orthogonality_falls_when_it_is_minimised() -> None:
    torch.manual_seed(0)
    x = {name: torch.randn(200, WIDTH) for name in NAMES}
    everything = {name: torch.ones(200, dtype=torch.bool) for name in NAMES}
    model = SharedPrivate(NAMES, WIDTH)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    curve = []
    for _ in range(150):
        losses = model(x, everything).losses
        optimizer.zero_grad()
        (losses["orthogonality"] + 0.1 * losses["reconstruction"]).backward()
        optimizer.step()
        curve.append({name: value.item() for name, value in losses.items()})
    assert curve[-1]["orthogonality"] < 0.2 * curve[0]["orthogonality"]
    assert curve[-1]["reconstruction"] < 0.5 * curve[0]["reconstruction"]


def test_each_factor_weighs_the_modalities_by_itself() -> None:
    model, x = module("attention"), vectors()
    assert isinstance(model, FactorAttention)
    found = model(x, PRESENT)
    head = WIDTH // model.factors
    assert model.weights is not None
    for item in range(ITEMS):
        if not has(item):
            assert not found.vector[item].any() and not model.weights[item].any()
            continue
        chunks = {name: model.project[name].weight @ x[name][item] for name in has(item)}
        query = model.query.weight @ torch.stack(list(chunks.values())).mean(0)
        heard = []
        for factor in range(model.factors):
            part = slice(factor * head, (factor + 1) * head)
            scores = torch.stack([query[part] @ (model.key.weight @ c)[part] for c in chunks.values()]) / head**0.5
            share = scores.softmax(0)
            heard.append(share @ torch.stack([c[part] for c in chunks.values()]))
            expected = torch.zeros(len(NAMES)).double()
            expected[[NAMES.index(name) for name in chunks]] = share
            torch.testing.assert_close(model.weights[item, factor], expected)
        torch.testing.assert_close(found.vector[item], model.out.weight @ torch.cat(heard))
    cut = {name: model.project[name](x[name])[PRESENT[name]].unflatten(1, (-1, head)) for name in NAMES}
    dependence = [
        distance_correlation(*(cut[name][:, k] for k in pair))
        for name in NAMES
        for pair in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
    ]  # fmt: skip
    torch.testing.assert_close(found.losses["independence"], torch.stack(dependence).mean())


def dcor_by_hand(a: Tensor, b: Tensor) -> float:
    n = len(a)
    tables = []
    for x in (a, b):
        d = [[math.dist(p, q) for q in x.tolist()] for p in x.tolist()]
        rows = [sum(row) / n for row in d]
        whole = sum(rows) / n
        tables.append([[d[i][j] - rows[i] - rows[j] + whole for j in range(n)] for i in range(n)])

    def covariance(p: list[list[float]], q: list[list[float]]) -> float:
        return sum(p[i][j] * q[i][j] for i in range(n) for j in range(n)) / n**2

    return math.sqrt(
        covariance(*tables) / math.sqrt(covariance(tables[0], tables[0]) * covariance(tables[1], tables[1]))
    )


def test_independence_is_of_other_items_in_every_step_while_training() -> None:
    model = away_from_the_start(FactorAttention(NAMES, WIDTH, factors=2, sample=2))
    x, there = vectors(), torch.tensor([1, 1, 1, 0, 1, 0]).bool()
    present = dict.fromkeys(NAMES, there)

    def losses(steps: int) -> list[float]:
        return [model(x, present).losses["independence"].item() for _ in range(steps)]

    # Two rows of any chunks are wholly dependent, a pair of equal rows is not: which pairs are looked at shows.
    for name in NAMES:
        x[name][1] = x[name][0]
    model.eval()
    assert losses(2) == [0, 0], "the first two, which are equal"
    model.train()
    seen = losses(20)
    assert min(seen) < 0.9 < max(seen)
    poisoned = {name: torch.where(there.unsqueeze(1), values, torch.nan) for name, values in x.items()}
    assert torch.isfinite(model(poisoned, present).losses["independence"])


def test_distance_correlation() -> None:
    torch.manual_seed(1)
    a = torch.randn(40, 3, dtype=torch.float64)
    b = a[:, :1] ** 2 + 0.1 * torch.randn(40, 1, dtype=torch.float64)  # uncorrelated, and anything but independent
    assert float(distance_correlation(a, b)) == pytest.approx(dcor_by_hand(a, b), rel=1e-12)
    assert float(distance_correlation(a, 3 * a + 1)) == pytest.approx(1)
    assert float(distance_correlation(a, torch.ones(40, 2).double())) == 0
    assert float(distance_correlation(a[:1], b[:1])) == 0 and float(distance_correlation(a[:0], b[:0])) == 0
    many = torch.randn(2, 1500, 2, dtype=torch.float64)
    assert float(distance_correlation(*many)) < 0.1
    with pytest.raises(ValueError, match="as many rows, got 40 and 39"):
        distance_correlation(a, b[:39])


def test_distance_correlation_has_gradients_where_rows_are_equal() -> None:
    a = torch.randn(6, 2, dtype=torch.float64)
    a[1] = a[0]
    a.requires_grad_()
    distance_correlation(a, torch.randn(6, 2).double()).backward()
    assert a.grad is not None and a.grad.isfinite().all() and a.grad.any()
    constant = torch.ones(6, 2, dtype=torch.float64, requires_grad=True)
    distance_correlation(constant, torch.randn(6, 2).double()).backward()
    assert constant.grad is not None and not constant.grad.any()


def test_prototypes_share_an_item_by_its_cosine_to_each() -> None:
    model, x = module("prototypes"), vectors()
    assert isinstance(model, PrototypeExperts)
    found = model(x, PRESENT)
    shares = []
    for item in range(ITEMS):
        if not has(item):
            assert not found.vector[item].any()
            continue
        mean = torch.stack([x[name][item] for name in has(item)]).mean(0)
        share = (F.cosine_similarity(mean.unsqueeze(0), model.prototypes, dim=1) / model.temperature).softmax(0)
        expected = torch.zeros(WIDTH).double()
        for k, weight in enumerate(share):
            gate, up = (model.w_in[k] @ mean).chunk(2)
            expected = expected + weight * (model.w_out[k] @ (F.silu(gate) * up))
        torch.testing.assert_close(found.vector[item], expected)
        shares.append(share)
    table = torch.stack(shares)
    sure = -(table * table.log()).sum(1).mean()
    mean = table.mean(0)
    even = -(mean * mean.log()).sum()
    torch.testing.assert_close(found.losses["assignment"], sure + math.log(len(model.prototypes)) - even)


def test_the_product_of_gaussians_is_their_density_up_to_a_factor() -> None:
    means, variances = {"a": 1.5, "b": -0.5}, {"a": 0.3, "b": 2.0}
    one = {
        name: tuple(torch.tensor([[table[name]]], dtype=torch.float64) for table in (means, variances))
        for name in means
    }
    mean, variance = product_of_gaussians(one, {name: torch.tensor([True]) for name in means})
    z = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    density = torch.exp(-z.square() / 2)
    for name in means:
        density = density * torch.exp(-((z - means[name]) ** 2) / variances[name] / 2)
    density = density / density.sum()
    assert float(mean) == pytest.approx(float((z * density).sum()), abs=1e-9)
    assert float(variance) == pytest.approx(float(((z - mean).square() * density).sum()), abs=1e-9)


def test_gaussian_experts() -> None:
    model, x = module("vae"), vectors()
    assert isinstance(model, GaussianExperts)
    found = model(x, PRESENT)
    posteriors = {name: model.coders.posterior(name, x[name]) for name in NAMES}
    codes, divergences = torch.zeros(ITEMS, WIDTH).double(), []
    for item in range(ITEMS):
        precision = 1 + sum((1 / posteriors[name][1][item] for name in has(item)), torch.zeros(WIDTH).double())
        pulled = sum((posteriors[n][0][item] / posteriors[n][1][item] for n in has(item)), torch.zeros(WIDTH).double())
        codes[item] = pulled / precision
        if has(item):
            torch.testing.assert_close(found.vector[item], model.out.weight @ codes[item])
            q = torch.distributions.Normal(codes[item], precision.rsqrt())
            prior = torch.distributions.Normal(torch.zeros(WIDTH).double(), torch.ones(WIDTH).double())
            divergences.append(torch.distributions.kl_divergence(q, prior).mean())
        else:
            assert not found.vector[item].any()
    torch.testing.assert_close(found.losses["kl"], torch.stack(divergences).mean())
    errors = [relative_error(model.coders.decode[name], codes, x[name], name) for name in NAMES]
    torch.testing.assert_close(found.losses["reconstruction"], torch.stack(errors).mean())


def test_a_modality_more_makes_the_posterior_surer() -> None:
    model, x = module("vae"), vectors()
    assert isinstance(model, GaussianExperts)
    alone = {name: model.coders.posterior(name, x[name]) for name in NAMES}
    everything = {name: torch.ones(ITEMS, dtype=torch.bool) for name in NAMES}
    before = torch.ones(ITEMS, WIDTH).double()
    for count in (1, 2, 3):
        names = NAMES[:count]
        _, variance = product_of_gaussians({name: alone[name] for name in names}, everything)
        assert (variance < before).all()
        before = variance


def test_what_is_drawn_has_the_posteriors_mean_and_variance() -> None:
    model, x = module("vae").train(), {name: value[:1].expand(20_000, -1) for name, value in vectors().items()}
    assert isinstance(model, GaussianExperts)
    everything = {name: torch.ones(20_000, dtype=torch.bool) for name in NAMES}
    with torch.no_grad():
        model.out.weight.copy_(torch.eye(WIDTH))
        torch.manual_seed(0)
        drawn = model(x, everything).vector
        alone = {name: model.coders.posterior(name, x[name][:1]) for name in NAMES}
        mean, variance = product_of_gaussians(alone, {name: torch.tensor([True]) for name in NAMES})
    torch.testing.assert_close(drawn.mean(0), mean[0], atol=0.03, rtol=0)
    torch.testing.assert_close(drawn.var(0), variance[0], atol=0.03, rtol=0)


def test_divergence_is_that_of_torch() -> None:
    mean, variance = torch.randn(5, 3).double(), torch.rand(5, 3).double() + 0.1
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, variance.sqrt()),
        torch.distributions.Normal(torch.zeros(5, 3).double(), torch.ones(5, 3).double()),
    ).mean(1)
    torch.testing.assert_close(divergence(mean, variance), expected)


@pytest.mark.parametrize("kind", DISENTANGLERS)
def test_what_is_missing_is_not_read(kind: str) -> None:
    model, x = module(kind), vectors()
    expected = model(x, PRESENT)
    poisoned = {n: torch.where(PRESENT[n].unsqueeze(1), v, torch.nan).requires_grad_() for n, v in x.items()}
    found = model(poisoned, PRESENT)
    assert torch.equal(found.vector, expected.vector)
    total = found.vector.sum()
    for name, value in found.losses.items():
        assert torch.equal(value, expected.losses[name]), name
        total = total + value
    total.backward()
    for name, v in poisoned.items():
        assert v.grad is not None and v.grad.isfinite().all(), name
        assert not v.grad[~PRESENT[name]].any()


@pytest.mark.parametrize("kind", DISENTANGLERS)
def test_a_modality_that_is_not_given_is_missing_for_all(kind: str) -> None:
    model, x = module(kind), vectors()
    nobody = {**PRESENT, "image": torch.zeros(ITEMS, dtype=torch.bool)}
    expected = model(x, nobody).vector
    del x["image"]
    found: Disentangled = model(x, PRESENT)
    torch.testing.assert_close(found.vector, expected)
    assert set(found.aligned) == {"identity", "text"}


@pytest.mark.parametrize("kind", DISENTANGLERS)
@pytest.mark.parametrize("items", [0, 1, 3])
def test_few_items_and_none_that_has_anything(kind: str, items: int) -> None:
    model = module(kind)
    x = {name: torch.randn(items, WIDTH, dtype=torch.float64, requires_grad=True) for name in NAMES}
    nothing = {name: torch.zeros(items, dtype=torch.bool) for name in NAMES}
    found = model(x, nothing)
    assert found.vector.shape == (items, WIDTH) and not found.vector.any()
    total = found.vector.sum() + sum(found.losses.values())
    assert total.item() == 0
    total.backward()
    assert all(v.grad is None or not v.grad.any() for v in x.values())


@pytest.mark.parametrize("kind", DISENTANGLERS)
def test_gradients(kind: str) -> None:
    model, x = module(kind), vectors()

    def run(*leaves: Tensor) -> tuple[Tensor, ...]:
        found = model(dict(zip(NAMES, leaves, strict=True)), PRESENT)
        # What is reconstructed is a target: it has no gradient, which differences would see.
        return (found.vector, *(v for name, v in found.losses.items() if name != "reconstruction"))

    check_gradients(run, [x[name] for name in NAMES])


@pytest.mark.parametrize("kind", DISENTANGLERS)
def test_the_order_of_items_does_not_matter(kind: str) -> None:
    model, x = module(kind), vectors()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    expected = model(x, PRESENT)
    found = model({n: v[order] for n, v in x.items()}, {n: m[order] for n, m in PRESENT.items()})
    torch.testing.assert_close(found.vector, expected.vector[order])
    for name, value in expected.losses.items():
        torch.testing.assert_close(found.losses[name], value)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="kind must be one of .*'contrast'.*, got 'magic'"):
        disentangler("magic", NAMES, WIDTH)
    with pytest.raises(ValueError, match="modalities must be distinct"):
        SharedPrivate(("a", "a"), WIDTH)
    with pytest.raises(ValueError, match="width must be at least 2, got 1"):
        SharedPrivate(NAMES, 1)
    with pytest.raises(ValueError, match="factors must be at least 2 and divide width = 8, got 3"):
        FactorAttention(NAMES, WIDTH, factors=3)
    with pytest.raises(ValueError, match="sample must be at least 2, got 1"):
        FactorAttention(NAMES, WIDTH, sample=1)
    with pytest.raises(ValueError, match="prototypes must be at least 2"):
        PrototypeExperts(NAMES, WIDTH, prototypes=1)
    with pytest.raises(ValueError, match="temperature must be in"):
        PrototypeExperts(NAMES, WIDTH, temperature=0)
    with pytest.raises(ValueError, match="latent must be at least 1, got 0"):
        GaussianExperts(NAMES, WIDTH, latent=0)
    model = module("contrast")
    with pytest.raises(ValueError, match="at least one of the modalities"):
        model({"sound": torch.zeros(2, WIDTH)}, PRESENT)
    with pytest.raises(ValueError, match=r"present\['text'\] must be bool \[6\], got torch.float32"):
        model({"text": vectors()["text"]}, {"text": torch.ones(6)})
    with pytest.raises(ValueError, match=r"present\['text'\] must be bool \[6\], got nothing"):
        model({"text": vectors()["text"]}, {})
