"""Vision models from tiny random configurations: a ViT, a CLIP tower, a ConvNeXt."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
from PIL import Image

from mmrec.llm import EmbeddingCache, VisionEncoder


def save(folder, model, processor):
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8,
        initializer_range=0.2,
    )  # fmt: skip
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    return save(tmp_path_factory.mktemp("vit"), ViTModel(config, add_pooling_layer=False), processor)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**tower, "vocab_size": 32}, vision_config={**tower, "image_size": 32, "patch_size": 16}
    )
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return save(tmp_path_factory.mktemp("clip"), CLIPModel(config), processor)


@pytest.fixture(scope="module")
def convnext(tmp_path_factory):
    from transformers import ConvNextConfig, ConvNextImageProcessorPil, ConvNextModel

    torch.manual_seed(0)
    config = ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=32)
    processor = ConvNextImageProcessorPil(size={"shortest_edge": 384})
    return save(tmp_path_factory.mktemp("convnext"), ConvNextModel(config), processor)


@pytest.fixture
def images(tmp_path):
    drawn = np.random.default_rng(0).integers(0, 256, (5, 40, 30, 3), dtype=np.uint8)
    made = []
    for i, pixels in enumerate(drawn):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        made.append(tmp_path / f"{i}.png")
    return made


def reference(folder, path):
    from transformers import AutoImageProcessor, AutoModel

    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    pixels = processor(Image.open(path).convert("RGB"), return_tensors="pt")
    with torch.no_grad():
        return AutoModel.from_pretrained(folder).eval()(**pixels).last_hidden_state[0]


def test_tokens_and_pooled_equal_image_by_image(vit, images):
    encoder = VisionEncoder.load(vit)
    want = [reference(vit, path) for path in images]
    tokens = encoder.encode(images, batch_size=2)
    assert tokens.offsets.tolist() == [0, 17, 34, 51, 68, 85] and tokens.dim == encoder.hidden_size == 32
    torch.testing.assert_close(tokens.values, torch.cat(want), atol=1e-5, rtol=1e-5)
    mean = encoder.encode(images, pooling="mean", normalize=True).pooled
    expected = torch.stack([w.mean(0) / w.mean(0).norm() for w in want])
    torch.testing.assert_close(mean, expected, atol=1e-5, rtol=1e-5)
    cls = encoder.encode([Image.open(path) for path in images], pooling="cls").pooled
    torch.testing.assert_close(cls, torch.stack([w[0] for w in want]), atol=1e-5, rtol=1e-5)
    assert not any(p.requires_grad for p in encoder.model.parameters())


def test_two_tower_checkpoint_gives_its_vision_tower(clip, images):
    from transformers import CLIPImageProcessorPil, CLIPModel

    encoder = VisionEncoder.load(clip)
    tokens = encoder.encode(images[:2])
    assert tokens.values.shape == (2 * 5, 32)
    pictures = [Image.open(path).convert("RGB") for path in images[:2]]
    pixels = CLIPImageProcessorPil.from_pretrained(clip)(pictures, return_tensors="pt")
    with torch.no_grad():
        want = CLIPModel.from_pretrained(clip).eval().vision_model(**pixels).last_hidden_state
    torch.testing.assert_close(tokens.values, want.flatten(0, 1), atol=1e-5, rtol=1e-5)
    assert encoder.encode(images[:2], pooling="cls").pooled.shape == (2, 32)


def test_feature_maps_become_tokens_row_by_row(convnext, images):
    encoder = VisionEncoder.load(convnext)
    tokens = encoder.encode(images[:1])
    want = reference(convnext, images[0])
    assert want.ndim == 3 and want.shape[0] == encoder.hidden_size == 16
    torch.testing.assert_close(tokens.values, want.flatten(1).T, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="class token"):
        encoder.encode(images[:1], pooling="cls")


def test_no_images(vit):
    encoder = VisionEncoder.load(vit)
    assert encoder.encode([], pooling="mean").pooled.shape == (0, 32)
    assert encoder.encode([]).offsets.tolist() == [0]


def test_cache_is_keyed_by_pixels(vit, images, tmp_path, monkeypatch):
    encoder, cache = VisionEncoder.load(vit), EmbeddingCache(tmp_path / "cache")
    first = encoder.encode(images, cache=cache)
    assert torch.equal(first.values, encoder.encode(images).values)
    copy = tmp_path / "renamed.png"
    copy.write_bytes(images[2].read_bytes())
    monkeypatch.setattr(encoder, "forward_tokens", lambda pixels: pytest.fail("computed what was cached"))
    again = encoder.encode([copy, images[0]], cache=cache)
    assert torch.equal(again.values, first.select(torch.tensor([2, 0])).values)


def test_bad_input(vit, bert, images, tmp_path):
    encoder = VisionEncoder.load(vit)
    broken = tmp_path / "broken.png"
    broken.write_bytes(images[0].read_bytes()[:100])
    for bad in (broken, tmp_path / "absent.png", tmp_path):
        with pytest.raises(ValueError, match=r"images\[1\].*" + bad.name) as caught:
            encoder.encode([images[0], bad])
        assert "\n" not in str(caught.value)
    with pytest.raises(TypeError, match=r"images\[0\]"):
        encoder.encode([3])
    with pytest.raises(TypeError, match="sequence"):
        encoder.encode(str(images[0]))
    with pytest.raises(ValueError, match="pooling"):
        encoder.encode(images, pooling="last")
    with pytest.raises(ValueError, match="batch_size"):
        encoder.encode(images, batch_size=0)
    with pytest.raises(ValueError, match="image processor|does not take images"):
        VisionEncoder.load(bert)
    with pytest.raises(ValueError, match="name_or_path"):
        VisionEncoder.load(tmp_path / "nothing")
