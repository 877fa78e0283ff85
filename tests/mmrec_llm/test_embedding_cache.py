"""The embedding cache: hits, keys, damage, full disk, interruption, concurrent use."""

from __future__ import annotations

import errno
import os
import threading

import pytest
import torch

from mmrec.llm import Backbone, CacheWriteError, EmbeddingCache, Encoded

CONTEXT = {"model": "m", "pooling": "mean"}


class Counting:
    """A deterministic embedding of a text that records what it was asked for."""

    def __init__(self, tokens=False):
        self.asked = []
        self.tokens = tokens

    def vector(self, text):
        return torch.randn(3, generator=torch.Generator().manual_seed(sum(text.encode()) * 1009 + len(text)))

    def __call__(self, texts):
        self.asked.append(list(texts))
        if not self.tokens:
            return Encoded(pooled=torch.stack([torch.zeros(3), *map(self.vector, texts)])[1:])
        lengths = torch.tensor([0, *(len(text) for text in texts)])
        values = [self.vector(text).expand(len(text), 3) for text in texts]
        return Encoded(values=torch.cat([torch.zeros(0, 3), *values]), offsets=lengths.cumsum(0))


def shards(folder):
    return sorted(folder.rglob("*.safetensors"))


def same(a, b):
    return all(
        x is y is None or torch.equal(x, y)
        for x, y in ((a.pooled, b.pooled), (a.values, b.values), (a.offsets, b.offsets))
    )


@pytest.mark.parametrize("tokens", [False, True])
def test_computes_once_and_keeps_order(tmp_path, tokens):
    fn = Counting(tokens)
    cache = EmbeddingCache(tmp_path, shard_items=2)
    texts = ["b", "aa", "", "b", "cccc", "aa"]
    first = cache.get_or_compute(texts, fn, context=CONTEXT)
    assert fn.asked == [["b", "aa"], ["", "cccc"]] and len(shards(tmp_path)) == 2
    assert same(first, Counting(tokens)(texts))
    again = EmbeddingCache(tmp_path).get_or_compute(["cccc", "new", "b", ""], fn, context=CONTEXT)
    assert fn.asked[2:] == [["new"]]
    assert same(again, Counting(tokens)(["cccc", "new", "b", ""]))


def test_key_separates_context_and_text(tmp_path):
    fn, cache = Counting(), EmbeddingCache(tmp_path)
    for context in (CONTEXT, CONTEXT | {"pooling": "cls"}, CONTEXT | {"template": "2"}, {}):
        for text in ("a", "a ", "A", "é"):
            cache.get_or_compute([text], fn, context=context)
    assert len(fn.asked) == 16
    cache.get_or_compute(["a", "é"], fn, context=dict(reversed(CONTEXT.items())))
    assert len(fn.asked) == 16


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "garbage"])
def test_damaged_shard_is_reported_and_recomputed(tmp_path, caplog, damage):
    fn, cache = Counting(), EmbeddingCache(tmp_path, shard_items=2)
    texts = ["a", "b", "c", "d"]
    want = cache.get_or_compute(texts, fn, context=CONTEXT)
    victim = shards(tmp_path)[0]
    data = bytearray(victim.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
    victim.write_bytes({"flip": bytes(data), "truncate": bytes(data[:-5]), "empty": b"", "garbage": b"x" * 500}[damage])
    got = cache.get_or_compute(texts, fn, context=CONTEXT)
    assert torch.equal(got.pooled, want.pooled)
    assert len(fn.asked) == 3 and fn.asked[2] in (["a", "b"], ["c", "d"])
    assert [r.levelname for r in caplog.records] == ["WARNING"] and "corrupt" in caplog.text
    assert "\n" not in caplog.records[0].getMessage()
    caplog.clear()
    cache.get_or_compute(texts, fn, context=CONTEXT)
    assert len(fn.asked) == 3 and not caplog.records


def test_full_disk_is_one_clear_error_and_loses_nothing(tmp_path, monkeypatch):
    fn, cache = Counting(), EmbeddingCache(tmp_path, shard_items=2)
    cache.get_or_compute(["a", "b"], fn, context=CONTEXT)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    real = os.fsync

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CacheWriteError, match="No space left.*intact") as caught:
        cache.get_or_compute(["a", "b", "c"], fn, context=CONTEXT)
    assert caught.value.errno == errno.ENOSPC and "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    monkeypatch.setattr(os, "fsync", real)
    got = cache.get_or_compute(["a", "b", "c"], fn, context=CONTEXT)
    assert torch.equal(got.pooled, Counting()(["a", "b", "c"]).pooled)


def test_interruption_keeps_finished_shards(tmp_path):
    class Interrupted(Counting):
        def __call__(self, texts):
            if len(self.asked) == 2:
                raise KeyboardInterrupt
            return super().__call__(texts)

    texts = list("abcdefgh")
    cache = EmbeddingCache(tmp_path, shard_items=2)
    with pytest.raises(KeyboardInterrupt):
        cache.get_or_compute(texts, Interrupted(), context=CONTEXT)
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".tmp-")]
    fn = Counting()
    cache.get_or_compute(texts, fn, context=CONTEXT)
    assert fn.asked == [["e", "f"], ["g", "h"]]


def test_concurrent_use(tmp_path):
    texts = [f"text {i}" for i in range(40)]
    want, errors = Counting()(texts).pooled, []

    def work(seed):
        order = torch.randperm(40, generator=torch.Generator().manual_seed(seed)).tolist()
        cache = EmbeddingCache(tmp_path, shard_items=3)
        for _ in range(3):
            got = cache.get_or_compute([texts[i] for i in order], Counting(), context=CONTEXT)
            if not torch.equal(got.pooled, want[order]):
                errors.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    fn = Counting()
    EmbeddingCache(tmp_path).get_or_compute(texts, fn, context=CONTEXT)
    assert fn.asked == []


def test_no_texts(tmp_path):
    assert EmbeddingCache(tmp_path).get_or_compute([], Counting(), context=CONTEXT).pooled.shape == (0, 3)
    assert not shards(tmp_path)


def test_bad_input(tmp_path):
    cache = EmbeddingCache(tmp_path)
    with pytest.raises(ValueError, match="shard_items"):
        EmbeddingCache(tmp_path, shard_items=0)
    with pytest.raises(TypeError, match="sequence"):
        cache.get_or_compute("a", Counting())
    with pytest.raises(TypeError, match="str"):
        cache.get_or_compute([3], Counting())
    with pytest.raises(TypeError, match="max_length"):
        cache.get_or_compute(["a"], Counting(), context={"max_length": 3})
    with pytest.raises(ValueError, match="2 embeddings for 1"):
        cache.get_or_compute(["a"], lambda texts: Encoded(pooled=torch.zeros(2, 3)))
    cache.get_or_compute(["a"], Counting())
    for other in (Counting(tokens=True), lambda texts: Encoded(pooled=torch.zeros(1, 4))):
        with pytest.raises(ValueError, match="another form or width"):
            cache.get_or_compute(["a", "b"], other)


@pytest.mark.parametrize("pooling", ["mean", "tokens"])
def test_backbone_uses_it(bert, texts, tmp_path, pooling, monkeypatch):
    backbone, cache = Backbone.load(bert, lora={"r": 4, "init": "random"}), EmbeddingCache(tmp_path)
    plain = backbone.encode(texts, pooling=pooling)
    stored = backbone.encode(texts, pooling=pooling, cache=cache)
    assert same(plain, stored)
    other = Backbone.load(bert, lora={"r": 4, "init": "random"})
    monkeypatch.setattr(other, "forward_tokens", lambda *a: pytest.fail("computed what was cached"))
    assert same(other.encode(texts, pooling=pooling, cache=cache), stored)
    with torch.no_grad():
        backbone.trainable_parameters()[0].add_(0.5)
    assert not same(backbone.encode(texts, pooling=pooling, cache=cache), stored)
    with pytest.raises(ValueError, match="cache"):
        backbone.encode(texts, cache=cache, requires_grad=True)
    with pytest.raises(ValueError, match="pooling"):
        backbone.encode(texts, pooling="max", cache=cache)
