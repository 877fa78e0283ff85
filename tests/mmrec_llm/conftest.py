"""Tiny random-weight models, made in a temporary folder: no test of this folder touches a network."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

WORDS = "red blue green big small shoe hat phone film night star war a the of for with and new old".split()


def _save_word_tokenizer(folder: Path) -> None:
    """One token per word, [CLS] and [SEP] around the text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)


def _save_byte_tokenizer(folder: Path) -> None:
    """Byte-level BPE as causal LMs have it: no special tokens, no token at all for an empty text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False, min_frequency=1)
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def _make_bert(folder: Path, *, hidden: int = 64, seed: int = 0) -> Path:
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=64, hidden_size=hidden, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, initializer_range=0.2,
    )  # fmt: skip
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    _save_word_tokenizer(folder)
    return folder


def _make_qwen2(folder: Path) -> Path:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=384, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    _save_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _make_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _make_qwen2(tmp_path_factory.mktemp("qwen2"))


@pytest.fixture
def make_bert() -> Callable[..., Path]:
    return _make_bert


@pytest.fixture
def save_byte_tokenizer() -> Callable[[Path], None]:
    return _save_byte_tokenizer


@pytest.fixture(params=["bert", "qwen2"])
def model_folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture
def texts() -> list[str]:
    return [
        "red shoe", "the big blue hat", "star war", "a new phone with a small green hat", "old film", "red shoe",
        "night of the big star and the old war film", "hat",
    ]  # fmt: skip


@pytest.fixture
def eager_bitsandbytes():
    """bitsandbytes compiles its generic decode, which takes half a minute and gives the same bits."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="session")
def _dense_folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder_of(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
        return made[family]

    return folder_of


@pytest.fixture
def load(_dense_folders):
    """Loads a tiny NF4 model of a family: `load(family, rank=0, dtype=torch.float32, **lora)`."""
    from swap_models import load_quantised

    return lambda family, rank=0, dtype=torch.float32, **lora: load_quantised(
        family, _dense_folders(family), rank, dtype, **lora
    )
