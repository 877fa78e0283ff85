"""`ClipLoss` and `MultipleNegativesRankingLoss` beside the originals: values, gradients, refused options, two ranks."""

from __future__ import annotations

import importlib.util
import os
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from mmrec.fusion import ClipLoss, MultipleNegativesRankingLoss


def open_clip_losses() -> ModuleType:
    """OpenCLIP's losses alone: its package wants a torchvision that fits torch's build."""
    package = importlib.util.find_spec("open_clip")
    if package is None or package.origin is None:
        pytest.skip("open-clip-torch is not installed")
    spec = importlib.util.spec_from_file_location("open_clip_loss", Path(package.origin).with_name("loss.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def features(rows: int = 7, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(rows, 5, dtype=torch.float64, generator=generator) for _ in range(2)]
    return [nn.functional.normalize(x).requires_grad_() for x in made]


def same(ours: Tensor, theirs: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("options", [{}, {"local_loss": True}, {"cache_labels": True}, {"gather_with_grad": True}])
def test_clip_loss_is_open_clips(options: dict[str, Any], shape: tuple[int, ...]) -> None:
    image, text = features()
    scale = torch.full(shape, 14.3, dtype=torch.float64, requires_grad=True)
    original = open_clip_losses().ClipLoss(**options)
    same(ClipLoss(**options)(image, text, scale), original(image, text, scale), [image, text, scale])


def test_clip_loss_takes_a_bias_and_returns_a_dict() -> None:
    image, text = features()
    bias = torch.tensor(-10.0, dtype=torch.float64, requires_grad=True)
    original = open_clip_losses().ClipLoss()
    ours = ClipLoss()(image, text, 20.0, logit_bias=bias, output_dict=True)
    theirs = original(image, text, 20.0, logit_bias=bias, output_dict=True)
    assert ours.keys() == theirs.keys() == {"contrastive_loss"}
    same(ours["contrastive_loss"], theirs["contrastive_loss"], [image, text, bias])


def test_clip_loss_refuses_what_is_not_the_gradient_of_one_loss() -> None:
    with pytest.raises(ValueError, match="gather_with_grad must be True"):
        ClipLoss(world_size=2)
    with pytest.raises(ValueError, match="use_horovod must be False"):
        ClipLoss(use_horovod=True)
    with pytest.raises(ValueError, match="world_size must be that of torch.distributed"):
        ClipLoss(world_size=2, gather_with_grad=True)(*features(), 1.0)


RANKING = [
    {},
    {"scale": 3.0, "partition_mode": "per_direction"},
    {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
    {"directions": ("query_to_query", "query_to_doc")},
]


@pytest.mark.parametrize("similarity", ["cos_sim", "dot_score"])
@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("options", RANKING, ids=str)
def test_ranking_loss_is_that_of_sentence_transformers(options: dict[str, Any], columns: int, similarity: str) -> None:
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import util
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss as Original

    embeddings = [torch.randn(6, 5, dtype=torch.float64).requires_grad_() for _ in range(columns + 1)]
    function = getattr(util, similarity)
    original = Original(nn.Identity(), similarity_fct=function, **options)
    for chosen in (similarity, function):
        ours = MultipleNegativesRankingLoss(None, similarity_fct=chosen, **options)
        same(
            ours.compute_loss_from_embeddings(embeddings),
            original.compute_loss_from_embeddings(embeddings, torch.empty(0)),
            embeddings,
        )
    assert ours.get_config_dict().keys() == original.get_config_dict().keys()


def test_ranking_loss_runs_a_model_over_columns() -> None:
    class Model(nn.Module):
        def forward(self, columns: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"sentence_embedding": 2 * columns["x"]}

    embeddings = [torch.randn(6, 5) for _ in range(3)]
    loss = MultipleNegativesRankingLoss(Model(), similarity_fct="dot_score")
    expected = loss.compute_loss_from_embeddings([2 * x for x in embeddings])
    assert torch.equal(loss([{"x": x} for x in embeddings], torch.empty(0)), expected)
    with pytest.raises(ValueError, match="model must be given"):
        MultipleNegativesRankingLoss(None)([{"x": x} for x in embeddings])
    with pytest.raises(ValueError, match="got 1 columns"):
        loss.compute_loss_from_embeddings(embeddings[:1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"directions": ("query_to_doc", "doc_to_query")}, "directions must be"),
        ({"directions": ("doc_to_query",)}, "directions must be"),
        ({"directions": ("query_to_doc", "doc_to_doc")}, "directions must be"),
        ({"partition_mode": "both"}, "partition_mode must be"),
        ({"hardness_mode": "all_negatives", "hardness_strength": 1.0}, "hardness_mode must be None"),
        ({"similarity_fct": torch.cdist}, "similarity_fct must be cos_sim or dot_score, got cdist"),
        ({"similarity_fct": partial(torch.cdist, p=1)}, "similarity_fct must be cos_sim or dot_score, got functools"),
        ({"scale": 0.0}, "scale must be positive"),
    ],
    ids=str,
)
def test_ranking_loss_refuses_what_it_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultipleNegativesRankingLoss(None, **options)


def _gradients(loss: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The value, and a shared parameter's gradient averaged over ranks as DDP does."""
    weight = weight.clone().requires_grad_()
    value = loss(x @ weight, x.flip(1) @ weight.T)
    value.backward()
    dist.all_reduce(weight.grad)
    return value.detach(), weight.grad / dist.get_world_size()


def _rank(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    whole, weight = torch.randn(8, 5, dtype=torch.float64), torch.randn(5, 5, dtype=torch.float64)
    mine = whole[4 * rank : 4 * rank + 4]
    reference = weight.clone().requires_grad_()
    expected = ClipLoss()(whole @ reference, whole.flip(1) @ reference.T, 3.0)
    expected.backward()
    for local in (False, True):
        ours = ClipLoss(local, True, rank=rank, world_size=2)
        theirs = open_clip_losses().ClipLoss(local, True, rank=rank, world_size=2)
        for loss in (ours, theirs):
            value, gradient = _gradients(lambda a, b, loss=loss: loss(a, b, 3.0), mine, weight)
            torch.testing.assert_close(gradient, reference.grad)
            if not local:
                torch.testing.assert_close(value, expected.detach())
    ranking = MultipleNegativesRankingLoss(None, similarity_fct="dot_score", gather_across_devices=True)
    alone = weight.clone().requires_grad_()
    plain = MultipleNegativesRankingLoss(None, similarity_fct="dot_score")
    plain.compute_loss_from_embeddings([whole @ alone, whole.flip(1) @ alone.T]).backward()
    _, gradient = _gradients(lambda a, b: ranking.compute_loss_from_embeddings([a, b]), mine, weight)
    torch.testing.assert_close(gradient, alone.grad)
    dist.barrier()  # nobody leaves while another still talks
    dist.destroy_process_group()
    os._exit(0)  # all is said: an interpreter that shuts down beside gloo's threads aborts once in a while


def test_two_ranks_get_the_gradients_of_the_whole_batch(tmp_path: Path) -> None:
    open_clip_losses()
    spawn(_rank, (str(tmp_path / "store"),), nprocs=2)
