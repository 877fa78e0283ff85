"""Images as text: what is measured, what a model says, and the cache of both."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmrec.adaptation import (
    Captioner,
    CatalogueError,
    MeasuredDescriber,
    TextCache,
    generate_catalogue,
    image_texts,
)
from mmrec.adaptation.image_text import _lab


def saved(folder: Path, pixels: np.ndarray, name: str = "image.png") -> Path:
    Image.fromarray(pixels.astype(np.uint8)).save(folder / name)
    return folder / name


def flat(height: int, width: int, colour: tuple[int, int, int]) -> np.ndarray:
    return np.broadcast_to(np.array(colour), (height, width, 3)).copy()


@pytest.mark.parametrize(
    "rgb, lab", [((1, 1, 1), (100, 0, 0)), ((0, 0, 0), (0, 0, 0)), ((1, 0, 0), (53.24, 80.09, 67.20)),
                 ((0, 0, 1), (32.30, 79.19, -107.86)), ((0.5, 0.5, 0.5), (53.39, 0, 0))],
)  # fmt: skip
def test_lab(rgb, lab):
    """CIE's conversion, D65; the values are those of the sRGB primaries."""
    np.testing.assert_allclose(_lab(np.array(rgb, float)), lab, atol=0.03)


def test_what_is_measured(tmp_path):
    describe = MeasuredDescriber()
    white = flat(60, 90, (255, 255, 255))
    white[15:45, 22:68] = (200, 30, 40)  # a quarter
    half = flat(90, 60, (10, 10, 12))
    half[:30] = (90, 140, 230)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3))
    paths = [saved(tmp_path, pixels, f"{n}.png") for n, pixels in enumerate((white, half, noise))]
    found = describe(paths)
    assert re.fullmatch(
        r"landscape image, very bright, medium contrast, very colourful; mostly white \(7\d%\), red \(2\d%\); smooth, "
        r"plain white background\.",
        found[0],
    )
    assert found[1].startswith("portrait image, dark, high contrast") and "mostly black (6" in found[1]
    assert "blue (3" in found[1] and found[1].endswith("smooth, brightest at the top.")
    assert found[2].startswith("square image") and "much detail" in found[2] and "background" not in found[2]
    assert describe(paths) == found


@pytest.mark.parametrize(
    "colour, name",
    [((250, 250, 250), "white"), ((5, 5, 5), "black"), ((128, 128, 128), "grey"), ((220, 20, 30), "red"),
     ((30, 60, 200), "blue"), ((20, 120, 40), "green"), ((250, 230, 40), "yellow"), ((100, 60, 30), "brown"),
     ((250, 160, 180), "pink"), ((130, 40, 150), "purple"), ((250, 140, 20), "orange")],
)  # fmt: skip
def test_every_basic_colour_has_its_name(tmp_path, colour, name):
    (text,) = MeasuredDescriber()([saved(tmp_path, flat(20, 20, colour))])
    assert f"mostly {name} (100%)" in text and f"plain {name} background" in text


def test_images_of_a_catalogue_are_described_once(tmp_path):
    catalogue = generate_catalogue(tmp_path / "shop", users=40, items=40)
    rows = [row for row, path in enumerate(catalogue.images) if path is not None]
    cache = TextCache(tmp_path / "cache", shard_items=7)
    asked: list[Path] = []

    class Counting(MeasuredDescriber):
        def __call__(self, paths):
            asked.extend(paths)
            return super().__call__(paths)

    told: list[tuple[int, int]] = []
    texts, mask = image_texts(catalogue, Counting(), cache=cache, progress=lambda *done: told.append(done))
    distinct = len({Path(catalogue.images[row]).read_bytes() for row in rows})
    assert len(asked) == distinct and told[-1] == (distinct, distinct) and len(told) == -(-distinct // 7)
    assert mask.nonzero()[0].tolist() == rows and all(
        bool(text) == there for text, there in zip(texts, mask, strict=True)
    )
    again, _ = image_texts(catalogue, Counting(), cache=cache)
    plain, _ = image_texts(catalogue, MeasuredDescriber())
    assert len(asked) == distinct and again == texts == plain
    image_texts(catalogue, Counting(size=32), cache=cache)  # another context: written anew
    assert len(asked) == 2 * distinct


def test_an_interrupted_description_goes_on(tmp_path):
    catalogue = generate_catalogue(tmp_path / "shop", users=40, items=40)
    cache = TextCache(tmp_path / "cache", shard_items=5)

    class Interrupted(MeasuredDescriber):
        calls = 0

        def __call__(self, paths):
            type(self).calls += 1
            if self.calls == 3:
                raise KeyboardInterrupt
            return super().__call__(paths)

    with pytest.raises(KeyboardInterrupt):
        image_texts(catalogue, Interrupted(), cache=cache)
    stored = sum(len(json.loads(path.read_bytes())["texts"]) for path in (tmp_path / "cache").rglob("*.json"))
    assert stored == 10
    told: list[tuple[int, int]] = []
    image_texts(catalogue, MeasuredDescriber(), cache=cache, progress=lambda *done: told.append(done))
    rows = {Path(path).read_bytes() for path in catalogue.images if path is not None}
    assert told[-1] == (len(rows) - 10,) * 2


def test_damaged_shards_and_broken_images(tmp_path, caplog):
    path = saved(tmp_path, flat(20, 20, (1, 2, 3)))
    cache = TextCache(tmp_path / "cache")
    cache.get_or_compute(["a", "b"], lambda texts: [text.upper() for text in texts])
    (shard,) = (tmp_path / "cache").rglob("*.json")
    shard.write_bytes(shard.read_bytes()[:-3])
    assert cache.get_or_compute(["b"], lambda texts: ["new"]) == ["new"]
    assert "cache of texts" in caplog.text and "corrupt or truncated" in caplog.text
    with pytest.raises(ValueError, match="fn returned 1 texts for 2 texts"):
        cache.get_or_compute(["c", "d"], lambda texts: ["one"])
    with pytest.raises(TypeError, match="fn must return strings, got int"):
        cache.get_or_compute(["c"], lambda texts: [1])
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(CatalogueError, match=r"image.png: broken image"):
        MeasuredDescriber()([path])
    with pytest.raises(ValueError, match="size must be at least 8 pixels, got 4"):
        MeasuredDescriber(size=4)


@pytest.fixture(scope="module")
def blip(tmp_path_factory) -> Path:
    """A tiny BLIP with random weights, and a vocabulary of its own."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("blip")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *"a photo of red blue cat dog film".split()]
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizer(str(folder / "vocab.txt"), additional_special_tokens=["[DEC]"])
    text = {
        "vocab_size": len(words), "hidden_size": 16, "encoder_hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 2, "bos_token_id": 5, "sep_token_id": 3, "pad_token_id": 0,
        "eos_token_id": 3, "projection_dim": 16,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 16, "patch_size": 8, "projection_dim": 16,
    }  # fmt: skip
    config = transformers.BlipConfig(text_config=text, vision_config=vision, projection_dim=16)
    import torch

    torch.manual_seed(0)
    model = transformers.BlipForConditionalGeneration(config)
    model.save_pretrained(folder)
    images = transformers.BlipImageProcessor(size={"height": 16, "width": 16})
    transformers.BlipProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def test_captions_of_a_model(blip, tmp_path):
    """The same captions as the model's own `generate`, whatever the batch; prompt and weights are part of the key."""
    import torch
    import transformers

    random = np.random.default_rng(0)
    paths = [saved(tmp_path, random.integers(0, 256, (20, 30, 3)), f"{n}.png") for n in range(3)]
    captioner = Captioner(blip, max_new_tokens=5, batch_size=2)
    found = captioner(paths)
    model = transformers.BlipForConditionalGeneration.from_pretrained(blip).eval()
    processor = transformers.BlipProcessor.from_pretrained(blip)
    for path, text in zip(paths, found, strict=True):
        inputs = processor(images=Image.open(path), return_tensors="pt")
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        assert text == " ".join(processor.batch_decode(ids, skip_special_tokens=True)[0].split())
    prompted = Captioner(blip, prompt="a photo of", max_new_tokens=5)
    assert not any(text.startswith("a photo of") for text in prompted(paths))
    contexts = {json.dumps(c.context, sort_keys=True) for c in (captioner, prompted, Captioner(blip, max_new_tokens=6))}
    assert len(contexts) == 3 and captioner.context == Captioner(blip, max_new_tokens=5).context
    with pytest.raises(ValueError, match="max_new_tokens and batch_size must be ≥ 1, got 0 and 8"):
        Captioner(blip, max_new_tokens=0)
