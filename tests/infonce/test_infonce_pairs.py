"""`info_nce_pairs`: several modalities, some rows missing."""

from __future__ import annotations

import pytest
import torch
from infonce_oracle import naive
from torch import Tensor

from mmrec_kernels.infonce import info_nce, info_nce_pairs

pytestmark = pytest.mark.usefixtures("provider")

NAMES = ("text", "image", "table")


def modalities(rows: int = 8, width: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(11)
    return {name: torch.randn(rows, width, dtype=torch.float64, generator=generator).requires_grad_() for name in NAMES}


def masks(rows: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(12)
    return {name: torch.rand(rows, generator=generator) < 0.7 for name in ("text", "image")}


PAIRS = [("text", "image"), ("table", "text"), ("image", "image")]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_each_pair_is_an_info_nce_over_the_rows_that_both_have(symmetric: bool, reduction: str) -> None:
    embeddings, mask = modalities(), masks()
    weight, ids = torch.rand(8, dtype=torch.float64), torch.tensor([0, 1, 1, 2, -1, -1, 0, 3])
    scale, pair_weight = torch.tensor([2.0, 3.0, 1.0]), torch.tensor([1.0, 0.5, 2.0])
    actual = info_nce_pairs(
        embeddings, PAIRS, mask=mask, scale=scale, pair_weight=pair_weight, symmetric=symmetric, ids=ids, weight=weight,
        normalize=True, label_smoothing=0.1, reduction=reduction,
    )  # fmt: skip
    expected = []
    for p, (a, b) in enumerate(PAIRS):
        everyone = torch.ones(8, dtype=torch.bool)
        rows = (mask.get(a, everyone) & mask.get(b, everyone)).nonzero()[:, 0]
        value, _ = naive(
            embeddings[a][rows], embeddings[b][rows], scale=scale[p].double(), symmetric=symmetric, key_ids=ids[rows],
            weight=weight[rows], normalize=True, label_smoothing=0.1, reduction="sum" if reduction == "sum" else "mean",
        )  # fmt: skip
        expected.append(pair_weight[p] * value)
    total = torch.stack(expected) if reduction == "none" else sum(expected)
    torch.testing.assert_close(actual, total)
    inputs = list(embeddings.values())
    ours, theirs = torch.autograd.grad(actual.sum(), inputs), torch.autograd.grad(total.sum(), inputs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


def test_none_gives_the_terms_of_the_sum() -> None:
    embeddings = modalities()
    options = {"mask": masks(), "scale": 3.0, "pair_weight": torch.tensor([1.0, 0.0, 2.0])}
    terms = info_nce_pairs(embeddings, PAIRS, reduction="none", **options)
    assert terms.shape == (3,) and terms[1] == 0
    torch.testing.assert_close(terms.sum(), info_nce_pairs(embeddings, PAIRS, **options))


def test_one_pair_without_masks_is_info_nce() -> None:
    embeddings = modalities()
    pair = info_nce_pairs(embeddings, [("text", "image")], scale=4.0)
    assert torch.equal(pair, info_nce(embeddings["text"], embeddings["image"], scale=4.0))


@pytest.mark.parametrize("normalize", [True, False])
def test_a_missing_row_is_not_read_and_gets_no_gradient(normalize: bool) -> None:
    def run(embeddings: dict[str, Tensor]) -> list[Tensor]:
        value = info_nce_pairs(embeddings, PAIRS, mask=mask, scale=2.0, normalize=normalize)
        return [value, *torch.autograd.grad(value, list(embeddings.values()))]

    mask = masks()
    clean = run(modalities())
    poisoned = modalities()
    with torch.no_grad():
        for name, present in mask.items():
            poisoned[name][~present] = float("nan")
    for a, b in zip(clean, run(poisoned), strict=True):
        assert torch.equal(a, b)
    for name, gradient in zip(NAMES, clean[1:], strict=True):
        if name in mask:
            assert gradient[~mask[name]].count_nonzero() == 0


def test_a_modality_that_nobody_has_gives_zero() -> None:
    embeddings = {name: tensor.detach().fill_(float("nan")).requires_grad_() for name, tensor in modalities().items()}
    value = info_nce_pairs(embeddings, [("text", "image")], mask={"image": torch.zeros(8, dtype=torch.bool)})
    assert value == 0
    for gradient in torch.autograd.grad(value, [embeddings["text"], embeddings["image"]]):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_scale_and_pair_weight_share_or_split_over_pairs() -> None:
    embeddings = modalities()
    shared = torch.tensor(3.0, requires_grad=True)
    split = torch.full((3,), 3.0, requires_grad=True)
    first, second = (info_nce_pairs(embeddings, PAIRS, scale=s) for s in (shared, split))
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(torch.autograd.grad(first, shared)[0], torch.autograd.grad(second, split)[0].sum())
    half = torch.tensor(0.5, requires_grad=True)
    value = info_nce_pairs(embeddings, PAIRS, pair_weight=half)
    torch.testing.assert_close(torch.autograd.grad(value, half)[0].double(), value.detach() * 2)


def test_empty_batch() -> None:
    assert info_nce_pairs(modalities(0), PAIRS) == 0


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"embeddings": [torch.zeros(8, 4)]}, TypeError, "embeddings must be a dict"),
        ({"embeddings": {}}, ValueError, "embeddings must name at least one"),
        ({"embeddings": {"text": torch.zeros(8, 4), "image": torch.zeros(7, 4)}}, ValueError, r"embeddings\['image'\]"),
        ({"embeddings": {"text": torch.zeros(8, 4), "image": torch.zeros(8, 5)}}, ValueError, r"embeddings\['image'\]"),
        ({"embeddings": {"text": torch.zeros(8, 4), "image": torch.zeros(8, 4).double()}}, TypeError, "image"),
        ({"embeddings": {"text": "hello"}}, TypeError, r"embeddings\['text'\] must be a tensor, got str"),
        ({"pairs": []}, ValueError, "pairs"),
        ({"pairs": "ab"}, TypeError, "pairs"),
        ({"pairs": ["ab"]}, ValueError, "pairs"),
        ({"pairs": [("text", "sound")]}, ValueError, "pairs must name one of .*'sound'"),
        ({"mask": {"sound": torch.ones(8).bool()}}, ValueError, "mask must name one of .*'sound'"),
        ({"mask": {"text": torch.ones(7).bool()}}, ValueError, r"mask\['text'\]"),
        ({"mask": {"text": torch.ones(8)}}, TypeError, r"mask\['text'\]"),
        ({"mask": torch.ones(8).bool()}, TypeError, "mask must be a dict"),
        ({"scale": torch.ones(2)}, ValueError, "scale"),
        ({"pair_weight": torch.ones(2)}, ValueError, "pair_weight"),
        ({"pair_weight": "much"}, TypeError, "pair_weight"),
        ({"ids": torch.zeros(8)}, TypeError, "ids"),
        ({"weight": torch.zeros(7)}, ValueError, "weight"),
        ({"reduction": "median"}, ValueError, "reduction"),
        ({"symmetric": 1}, TypeError, "symmetric"),
        ({"workspace_bytes": 0}, ValueError, "workspace_bytes"),
        ({"group": "world"}, TypeError, "group"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(options: dict[str, object], error: type[Exception], words: str) -> None:
    arguments = {"embeddings": {n: torch.zeros(8, 4) for n in NAMES}, "pairs": [("text", "image")], **options}
    with pytest.raises(error, match=words):
        info_nce_pairs(**arguments)
