"""One small generated catalogue for all tests, and command lines run in this process."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

for package in ("typer", "rich", "polars", "PIL"):
    pytest.importorskip(package)

from cli_helpers import Mmrec, Outcome  # noqa: E402

from mmrec.cli import run  # noqa: E402


@pytest.fixture
def mmrec(capfd: pytest.CaptureFixture[str]) -> Mmrec:
    """``mmrec("evaluate", "--data", folder, …)`` runs a command line and returns its :class:`Outcome`."""

    def call(*arguments: object) -> Outcome:
        capfd.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a generated catalogue with every modality; not to be changed."""
    from mmrec.adaptation import generate_catalogue

    folder = tmp_path_factory.mktemp("data") / "shop"
    generate_catalogue(folder, users=60, items=48, cold_items=6, mean_length=8.0, image_size=16, seed=3)
    return folder


@pytest.fixture
def own_copy(generated: Path, tmp_path: Path) -> Path:
    """A copy of the generated catalogue that a test may break."""
    return Path(shutil.copytree(generated, tmp_path / "shop"))


# Small enough for seconds; the language model is a tiny one with random weights, read from a folder like any other.
TINY = (
    "--epochs", "3", "--set", "width=16", "--set", "item_heads=1", "--set", "heads=1", "--set", "expert_hidden=16",
    "--set", "table_pooled=true", "--set", "image_size=16", "--set", "image_patch=16",
    "--set", "batch_size=16", "--set", "text_max_length=32",
    "--set", "learning_rate=0.01",
)  # fmt: skip


@pytest.fixture(scope="session")
def tiny_options() -> tuple[str, ...]:
    """Of a training of seconds."""
    return TINY


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved BERT with random weights: 1 layer, width 64 (wide enough for NF4's blocks)."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("model") / "tiny-bert"
    folder.mkdir()
    letters = [chr(code) for code in range(33, 127)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    transformers.BertTokenizer(str(folder / "vocab.txt"), model_max_length=32).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=40,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved Qwen2 with random weights and a tokenizer of bytes."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("model") / "tiny-qwen2"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    config = transformers.Qwen2Config(
        vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=2048, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Embeddings of these tests stay out of the user's cache, and nothing is looked for on a network."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMREC_CACHE", str(folder))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield folder


@pytest.fixture(scope="session")
def trained(generated: Path, tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on all modalities, with NF4 and LoRA; not to be changed."""
    out = tmp_path_factory.mktemp("runs") / "all"
    arguments = ["train", "--data", generated, "--out", out, "--backbone", tiny_backbone, "--lora", 2, *TINY]
    assert run([*map(str, arguments), "--json", str(out.parent / "train.json")]) == 0
    return out


@pytest.fixture
def tiny(tiny_backbone: Path) -> tuple[str, ...]:
    """Options that make a training small."""
    return (*TINY, "--backbone", str(tiny_backbone), "--lora", "2")


@pytest.fixture
def real_data() -> Callable[[str], Path]:
    """Folder of a real data set by name; skips the test where it is absent."""
    root = Path(os.environ.get("MMREC_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))

    def find(name: str) -> Path:
        if not (root / name).is_dir():
            pytest.skip(f"{name} is not there: set MMREC_DATA to the folder that holds it")
        return root / name

    return find
