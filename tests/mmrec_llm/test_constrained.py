"""Tries, beam search over them, and a language model that names items of a catalogue and nothing else."""

from __future__ import annotations

import math
import random

import pytest
import torch
from test_scorer import _save

from mmrec.llm import Backbone, CatalogueDecoder, LikelihoodScorer, Trie, beam_search, valid_ratio
from mmrec.llm.tokenizing import tokenize

PROMPTS = ["red blue green shoe hat", "s", "the star war film of old night and new hat"]
TITLES = [" red", " red hat", " blue film", " red", " star war", " star", " phone with a hat", " red hat night"]


def sequences_of(seed: int, count: int, alphabet: int = 3, longest: int = 4) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(alphabet) for _ in range(draw.randint(1, longest))] for _ in range(count)]


# The trie


@pytest.mark.parametrize("count", [0, 1, 2, 40])
def test_a_trie_holds_every_beginning(count):
    sequences = sequences_of(count, count)
    trie = Trie(sequences)
    beginnings = {tuple(row[:n]) for row in sequences for n in range(len(row) + 1)} | {()}
    found = {}

    def walk(node, path):
        assert path not in found
        tokens, nodes = trie.children(node)
        found[path] = (tokens.tolist(), trie.items_at(node).tolist())
        below = trie.items[int(trie.own_end[node]) : int(trie.end[node])].tolist()
        assert sorted(below) == [
            i for i, row in enumerate(sequences) if tuple(row[: len(path)]) == path and len(row) > len(path)
        ]
        for token, child in zip(tokens.tolist(), nodes.tolist(), strict=True):
            assert int(trie.token[child]) == token
            walk(child, (*path, token))

    walk(0, ())
    assert set(found) == beginnings and len(trie) == len(beginnings)
    for path, (tokens, items) in found.items():
        assert items == [i for i, row in enumerate(sequences) if tuple(row) == path]
        assert tokens == sorted(
            {row[len(path)] for row in sequences if len(row) > len(path) and tuple(row[: len(path)]) == path}
        )
    assert trie.depth == max(map(len, sequences), default=0)
    if count:
        nodes = torch.tensor([0, len(trie) - 1, 0])
        parents, children = trie.expand(nodes)
        wanted = [(i, int(child)) for i, node in enumerate(nodes.tolist()) for child in trie.children(node)[1]]
        assert list(zip(parents.tolist(), children.tolist(), strict=True)) == wanted
        who, place = trie.ending(nodes)
        wanted = [(i, int(item)) for i, node in enumerate(nodes.tolist()) for item in trie.items_at(node)]
        assert list(zip(who.tolist(), trie.items[place].tolist(), strict=True)) == wanted


def test_sequences_that_are_none():
    with pytest.raises(ValueError, match=r"sequences\[1\] must be one or more tokens ≥ 0, got \[\]"):
        Trie([[1], []])
    with pytest.raises(ValueError, match=r"sequences\[0\] must be one or more tokens ≥ 0, got \[3, -1\]"):
        Trie([[3, -1]])


# The search, over probabilities drawn at random for each path


def drawn(query: int, path: tuple[int, ...], token: int, ties: bool) -> float:
    draw = random.Random(f"{query} {path} {token}")
    return float(-draw.randint(0, 2)) if ties else -draw.expovariate(1.0)


def searched(sequences, queries, *, ties=False, seen=None, **arguments):
    def step(query, paths, row, token):
        assert bool((query.diff() >= 0).all()) and paths.shape[0] == len(query)
        if seen is not None:
            seen.append(list(zip(query.tolist(), map(tuple, paths.tolist()), strict=True)))
        found = [
            drawn(int(query[r]), tuple(paths[r].tolist()), t, ties)
            for r, t in zip(row.tolist(), token.tolist(), strict=True)
        ]
        return torch.tensor(found, dtype=torch.float64)

    return beam_search(step, Trie(sequences), queries, **arguments)


def score(query, sequence, ties=False):
    return sum(drawn(query, tuple(sequence[:n]), token, ties) for n, token in enumerate(sequence))


def ranked(sequences, query, exclude=(), ties=False):
    rows = [(-score(query, row, ties), i) for i, row in enumerate(sequences) if i not in exclude]
    return [(i, -value) for value, i in sorted(rows)]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("k", [1, 4, 15, 50])
def test_with_all_beams_it_is_exact(ties, k):
    sequences = sequences_of(7, 40)
    exclude = [[], [3, 5, 3, -1, 99], list(range(40)), [i for i in range(40) if i != 11]]
    found = searched(sequences, 4, ties=ties, k=k, beams=40, exclude=exclude)
    assert found.items.shape == found.log_probs.shape == (4, k) and found.items.dtype == torch.int64
    for query, gone in enumerate(exclude):
        wanted = ranked(sequences, query, gone, ties)[:k]
        wanted += [(-1, -math.inf)] * (k - len(wanted))
        assert found.items[query].tolist() == [i for i, _ in wanted]
        torch.testing.assert_close(found.log_probs[query].tolist(), [value for _, value in wanted])
    assert torch.equal(searched(sequences, 4, ties=ties, k=k, beams=40).items[0], found.items[0])


@pytest.mark.parametrize("beams", [1, 2, 5])
def test_with_few_beams_it_is_beam_search(beams):
    """Against the textbook: per query, a list of beginnings, sorted, cut."""
    sequences = sequences_of(3, 60, alphabet=4, longest=5)
    exclude = [[i for i in range(60) if i % 3 == query] for query in range(3)]
    seen = []
    found = searched(sequences, 3, k=60, beams=beams, exclude=exclude, seen=seen)
    for query in range(3):
        allowed = {i: tuple(row) for i, row in enumerate(sequences) if i not in exclude[query]}
        live, done = [()], {}
        while live:
            longer = {
                path + (row[len(path)],)
                for path in live
                for row in allowed.values()
                if row[: len(path)] == path and len(row) > len(path)
            }
            done |= {i: score(query, row) for i, row in allowed.items() if row in longer}
            onward = [p for p in longer if any(r[: len(p)] == p and len(r) > len(p) for r in allowed.values())]
            live = sorted(onward, key=lambda path: (-score(query, path), path))[:beams]
        wanted = sorted(done.items(), key=lambda entry: (-entry[1], entry[0]))
        found_here = [i for i in found.items[query].tolist() if i >= 0]
        assert found_here == [i for i, _ in wanted] and len(found_here) < len(allowed)
    assert max(sum(query == 1 for query, _ in step) for step in seen) == beams


def test_what_cannot_come_among_the_best_is_not_gone_on_from():
    sequences = sequences_of(5, 80, alphabet=4, longest=6)
    few, all_ = [], []
    found = searched(sequences, 2, k=20, beams=80, seen=few)
    whole = searched(sequences, 2, k=80, beams=80, seen=all_)
    assert torch.equal(found.items, whole.items[:, :20]) and torch.equal(found.log_probs, whole.log_probs[:, :20])
    assert sum(map(len, few)) < sum(map(len, all_))


def test_excluded_beginnings_take_no_beam():
    """The likeliest beginning holds excluded items only; one beam must find what is left."""
    sequences = [[0, 0], [0, 1], [1, 0]]

    def step(query, paths, row, token):
        return torch.where(token == 0, -0.1, -3.0)

    found = beam_search(step, Trie(sequences), 1, k=3, beams=1, exclude=[[0, 1]])
    assert found.items.tolist() == [[2, -1, -1]]
    assert beam_search(step, Trie(sequences), 1, k=3, beams=1).items.tolist() == [[0, 1, -1]]
    # Nor do those of which only what ends there is left.
    found = beam_search(step, Trie([[0], [0, 0], [1, 0]]), 1, k=3, beams=1, exclude=[[1]])
    assert found.items.tolist() == [[0, 2, -1]]


@pytest.mark.parametrize("bad", [-math.inf, math.nan])
def test_what_is_impossible_or_nan_is_not_given(bad):
    sequences = [[0], [1, 0], [1, 1], [2, 0], [1]]

    def step(query, paths, row, token):
        assert 1 not in paths  # nor gone on from
        return torch.where(token == 1, bad, -1.0)

    found = beam_search(step, Trie(sequences), 1, k=4, beams=4)
    assert found.items.tolist() == [[0, 3, -1, -1]] and found.log_probs.tolist()[0][:2] == [-1.0, -2.0]


def test_ties_go_to_the_lower_item_whatever_its_sequence():
    found = beam_search(
        lambda *given: torch.zeros(len(given[3])), Trie([[2], [0, 1], [1], [0, 1], [0]]), 2, k=5, beams=5
    )
    assert found.items.tolist() == [[0, 1, 2, 3, 4]] * 2 and bool((found.log_probs == 0).all())


def test_nothing_to_search():
    def never(*_):
        raise AssertionError("nothing can be asked")

    assert beam_search(never, Trie([]), 2, k=3, beams=1).items.tolist() == [[-1] * 3] * 2
    assert beam_search(never, Trie([[1]]), 0, k=3, beams=1).items.shape == (0, 3)
    for arguments in ({"k": 0, "beams": 1}, {"k": 1, "beams": 0}):
        with pytest.raises(ValueError, match="k and beams must be at least 1"):
            beam_search(never, Trie([[1]]), 1, **arguments)
    with pytest.raises(ValueError, match="exclude must have a list for each of 2 queries, got 1"):
        beam_search(never, Trie([[1]]), 2, k=1, beams=1, exclude=[[0]])


# The language model


@pytest.mark.parametrize("family", ["qwen2 tied", "llama", "gemma2"])
@pytest.mark.parametrize("end", ["\n", None, 7])
def test_with_all_beams_it_ranks_as_likelihoods_do(tmp_path, family, end, save_byte_tokenizer):
    _save(tmp_path, family, save_byte_tokenizer)
    backbone = Backbone.load(tmp_path, quantize=None, lora={"r": 4, "init": "random"})
    decoder = CatalogueDecoder(backbone, TITLES, end=end)
    ending = {"\n": backbone.tokenizer("\n")["input_ids"], None: [], 7: [7]}[end]
    assert decoder.sequences == [(*row, *ending) for row in tokenize(backbone, TITLES, special=False)]
    exclude = [[], [1, 0], [2, 2, 44]]
    found = decoder.decode(PROMPTS, k=10, beams=len(TITLES), exclude=exclude)
    scores = LikelihoodScorer(backbone)(PROMPTS, [decoder.sequences] * 3)
    for row, gone in enumerate(exclude):
        allowed = [i for i in range(len(TITLES)) if i not in gone]
        items = found.items[row].tolist()
        assert items[len(allowed) :] == [-1] * (10 - len(allowed))
        assert sorted(items[: len(allowed)]) == allowed
        torch.testing.assert_close(
            found.log_probs[row, : len(allowed)], scores[row][items[: len(allowed)]].double(), rtol=1e-6, atol=1e-5
        )
        assert bool((found.log_probs[row].diff()[: len(allowed) - 1] <= 0).all())
        assert bool((found.log_probs[row, len(allowed) :] == -torch.inf).all())
        if not gone:  # the same text: the lower item first
            assert items.index(0) + 1 == items.index(3) and scores[row][0] == scores[row][3]
    # Not renormalised: what is no item has its share.
    assert float(found.log_probs[0][: len(TITLES)].exp().sum()) < 0.5
    again = decoder.decode(PROMPTS, k=10, beams=len(TITLES), exclude=exclude)
    assert torch.equal(again.items, found.items) and torch.equal(again.log_probs, found.log_probs)


@pytest.mark.parametrize("beams", [1, 3])
def test_nothing_but_items(qwen2, beams):
    backbone = Backbone.load(qwen2)
    decoder = CatalogueDecoder(backbone, TITLES)
    exclude = [[i for i in range(len(TITLES)) if i % 2 == row % 2] for row in range(3)]
    found = decoder.decode(PROMPTS, k=6, beams=beams, exclude=exclude)
    scores = LikelihoodScorer(backbone)(PROMPTS, [decoder.sequences] * 3)
    answers = []
    for row in range(3):
        items = [i for i in found.items[row].tolist() if i >= 0]
        assert 1 <= len(items) <= 4 and len(set(items)) == len(items) and not set(items) & set(exclude[row])
        torch.testing.assert_close(
            found.log_probs[row, : len(items)], scores[row][items].double(), rtol=1e-6, atol=1e-5
        )
        answers += [TITLES[i] for i in items]
    assert valid_ratio(answers, TITLES) == 1.0


def test_the_prompt_is_read_once(qwen2, monkeypatch):
    """Behind it, only the tokens that beams have so far."""
    backbone = Backbone.load(qwen2, quantize=None)
    decoder = CatalogueDecoder(backbone, TITLES)
    lengths = []
    real = backbone.forward_rows
    monkeypatch.setattr(
        backbone,
        "forward_rows",
        lambda offsets, **given: [lengths.extend(offsets.diff().tolist()), real(offsets, **given)][1],
    )
    decoder.decode(PROMPTS[2:], k=8, beams=8)
    assert sorted(set(lengths)) == list(range(1, decoder.trie.depth)) and max(lengths) < 10


def test_nothing_to_decode(qwen2):
    backbone = Backbone.load(qwen2, quantize=None)
    assert CatalogueDecoder(backbone, TITLES).decode([], k=2).items.shape == (0, 2)
    assert CatalogueDecoder(backbone, []).decode(["red"], k=2).items.tolist() == [[-1, -1]]
    given = CatalogueDecoder(backbone, [[5, 6], torch.tensor([5])], end=None)
    assert given.sequences == [(5, 6), (5,)]
    with pytest.raises(TypeError, match="texts must be a sequence of texts, got one str"):
        CatalogueDecoder(backbone, "red")
    with pytest.raises(ValueError, match="texts: a text must have a token"):
        CatalogueDecoder(backbone, ["red", ""])
    with pytest.raises(ValueError, match="end: a text must have a token"):
        CatalogueDecoder(backbone, ["red"], end="")
    with pytest.raises(ValueError, match=r"end: token ids must be in \[0, 384\), got \[384\]"):
        CatalogueDecoder(backbone, ["red"], end=384)
    with pytest.raises(ValueError, match="k and beams must be at least 1, got 0 and 20"):
        CatalogueDecoder(backbone, ["red"]).decode(["red"], k=0)
    with pytest.raises(ValueError, match="prompts: a prompt must have a token"):
        CatalogueDecoder(backbone, ["red"]).decode([""])


def test_valid_ratio():
    catalogue = ["Alien", "Toy Story 2", "...", "Heat!"]
    answers = [" alien.\n", '"Toy  Story 2"', "Toy Story", "", "...", "heat", "I would say Alien"]
    assert valid_ratio(answers, catalogue) == 4 / 7
    assert valid_ratio(["Alien"], iter(catalogue)) == 1.0 and valid_ratio(["x"], []) == 0.0
    with pytest.raises(ValueError, match="texts must hold an answer"):
        valid_ratio([], catalogue)
    with pytest.raises(TypeError, match="one str"):
        valid_ratio("Alien", catalogue)
