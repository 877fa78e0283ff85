"""A frozen causal model that is asked by hard prompts, under protocol C: the item that came next among drawn ones."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..console import say, status
from ..data import Data
from ..kept import read_kept
from .base import Context, Findings, Table, means, pairs, sentence

if TYPE_CHECKING:
    import numpy as np

    from ...evaluation import CandidateSets
    from ...llm import Backbone
    from ...prompting import HardPrompt, Item

__all__ = ["PromptingSettings", "check_settings", "prompting_run"]

METRICS = ("HR@1", "HR@5", "NDCG@5", "MRR@5")
_USERS_AT_ONCE = 4
_TEXT, _LIKELY, _PRIOR = "text, yes or no", "text, likelihood", "likelihood without history"
_LESS = "text, likelihood less that without history"
# One user has no interval. METRICS read 5 places. An instruction and one long title fill more than half of 128 tokens;
# with less room prompts would lose their histories, and candidates their ends, without a word.
_LEAST = {"users": 2, "negatives": 4, "history": 1, "shots": 0, "neighbours": 1, "max_length": 128}


@dataclass(frozen=True)
class PromptingSettings:
    """What is asked, and whom.

    Attributes:
        users: test users, drawn.
        negatives: candidates beside the target.
        history: last items of which a prompt tells.
        shots, neighbours: examples, and retrieved items, in the prompts that have them.
        backbone, quantize: the model; a causal one.
        max_length: tokens of a prompt.
    """

    users: int = 48
    negatives: int = 20
    history: int = 8
    shots: int = 2
    neighbours: int = 5
    backbone: str = "smollm2"
    quantize: str = "nf4"
    max_length: int = 512


@dataclass(frozen=True)
class _Way:
    """A way to ask: a template, what it is given, and how the answer is read ("yes-no", "likelihood", "prior")."""

    template: HardPrompt
    columns: bool = False
    shots: int = 0
    context: bool = False
    answer: str = "yes-no"


def prompting_run(context: Context) -> tuple[Data, Findings]:
    """Asks in every way; beside it, what needs no language model, on the same candidates."""
    from ...evaluation import bootstrap, candidate_sets

    settings: PromptingSettings = context.settings
    check_settings(settings, _LEAST)
    data = context.load("S")
    sets = candidate_sets(data.split, negatives=settings.negatives, most_users=settings.users, seed=context.seeds[0])
    if len(sets.users) < 2:
        raise ValueError(f"{data.catalogue.name!r} has one test user; intervals are over users and need two at least")
    asker = _Asker(settings, data, sets)
    scores: dict[str, np.ndarray] = {}
    costs: dict[str, dict[str, float]] = {}
    for name, way in _ways(settings).items():
        identity = _identity(way, settings, data, sets)
        found, costs[name] = _kept(context.out / "cells" / f"{name}.json", identity, asker, way)
        scores[name] = found
        say(f"{name}: AUC {sets.auc(found).mean():.3f}, {costs[name]['seconds per user']:.2f} s per user")
    scores[_LESS] = scores[_LIKELY] - scores.pop(_PRIOR)
    costs[_LESS] = {what: costs[_LIKELY][what] + more for what, more in costs.pop(_PRIOR).items()}  # both are asked
    scores |= _without_model(data, sets)
    named = {"dataset": data.catalogue.name, "fingerprint": data.fingerprint, "metrics": METRICS}
    results = {name: [sets.evaluate(found, model=name, **named)] for name, found in scores.items()}  # type: ignore[arg-type]
    chance = {"HR@1": 1 / (settings.negatives + 1), "HR@5": min(5 / (settings.negatives + 1), 1.0), "AUC": 0.5}
    rows: list[dict[str, Any]] = []
    for name, values in means(results, METRICS).items():
        rows.append({"way": name, "values": {**values, "AUC": bootstrap(sets.auc(scores[name]))}})
    rows.append({"way": "by chance", "values": chance})
    compared = pairs(results, _TEXT, METRICS)
    tables = [
        Table(f"{len(sets.users)} users, {settings.negatives + 1} candidates", ("way",), rows),
        Table(f"Minus {_TEXT}", ("way",), [{"way": n, "values": v} for n, v in compared.items()], signed=True),
        Table("What it takes", ("way",), [{"way": name, "values": cost} for name, cost in costs.items()]),
    ]
    sentences = [
        sentence(name, _TEXT, "NDCG@5", values["NDCG@5"]) for name, values in compared.items() if name in costs
    ]
    sentences += [_against_chance(name, sets.auc(scores[name])) for name in costs]
    question = "What does a frozen language model know of what comes next, and how should it be asked?"
    rule = f"{data.split.origin}; {len(sets.users)} users, {settings.negatives} drawn items beside the target"
    return data, Findings(
        question, tables, sentences, facts={"users": len(sets.users)}, protocol="C", split=sets.id, split_rule=rule,
        seeds=context.seeds[:1],
    )  # fmt: skip


def check_settings(settings: Any, least: Mapping[str, int]) -> None:
    """Refuses numbers below their least, and a `quantize` that `Backbone.load` will not know, before data are read."""
    for name, value in least.items():
        if getattr(settings, name) < value:
            raise ValueError(f"--set {name} must be at least {value}, got {getattr(settings, name)}")
    if settings.quantize not in ("nf4", "none"):
        raise ValueError(f"--set quantize must be nf4 or none, got {settings.quantize!r}")


def _against_chance(name: str, auc: np.ndarray) -> str:
    from ...evaluation import bootstrap

    above = bootstrap(auc - 0.5)
    if above.excludes_zero:
        return f"{name}: the target is {'above' if above.mean > 0 else 'below'} other candidates (AUC − ½ {above})."
    return f"{name}: not told from chance (AUC − ½ {above})."


def _ways(settings: PromptingSettings) -> dict[str, _Way]:
    from ...prompting import HardPrompt

    text = HardPrompt(history=settings.history)
    likely = HardPrompt(
        history=settings.history, intro="Someone chose these items, one after another:", question="The next item:"
    )
    return {
        _TEXT: _Way(text),
        "JSON, yes or no": _Way(HardPrompt(history=settings.history, format="json")),
        "text with columns, yes or no": _Way(HardPrompt(history=settings.history, value_chars=80), columns=True),
        "text, examples, yes or no": _Way(text, shots=settings.shots),
        "text, retrieved items, yes or no": _Way(text, context=True),
        _LIKELY: _Way(likely, answer="likelihood"),
        _PRIOR: _Way(likely, answer="prior"),
    }


def _identity(way: _Way, settings: PromptingSettings, data: Data, sets: CandidateSets) -> dict[str, Any]:
    return {
        "settings": asdict(settings), "fingerprint": data.fingerprint, "candidates": sets.id,
        "way": {**asdict(way), "template": way.template.key()},
    }  # fmt: skip


def _kept(
    path: Path, identity: dict[str, Any], asker: Callable[[_Way], tuple[np.ndarray, dict[str, float]]], way: _Way
) -> tuple[np.ndarray, dict[str, float]]:
    """What is there already for the same question, or the answers, which are then there."""
    import numpy as np

    from ...files import write_atomic

    kept = read_kept(path)
    if isinstance(kept, dict) and kept.get("identity") == json.loads(json.dumps(identity)):
        return np.array(kept["scores"]), kept["cost"]
    with status(path.stem):
        scores, cost = asker(way)
    write_atomic(path, json.dumps({"identity": identity, "scores": scores.tolist(), "cost": cost}).encode())
    return scores, cost


class _Asker:
    """Scores of all candidates of all users, and what they took; the model is loaded when it is asked first."""

    def __init__(self, settings: PromptingSettings, data: Data, sets: CandidateSets) -> None:
        self.settings, self.data, self.sets = settings, data, sets
        self.titles = data.catalogue.item_titles
        self._backbone: Backbone | None = None

    @property
    def backbone(self) -> Backbone:
        from ...llm import Backbone

        if self._backbone is None:
            name, quantize = self.settings.backbone, self.settings.quantize
            self._backbone = Backbone.load(
                name, quantize=None if quantize == "none" else quantize, max_length=self.settings.max_length
            )
        return self._backbone

    def __call__(self, way: _Way) -> tuple[np.ndarray, dict[str, float]]:
        import numpy as np

        from ...prompting import special_tokens

        special = special_tokens(self.backbone.tokenizer)
        prompts, tokens = self._prompts(way, special)
        shown = self._shown(way)
        texts = [[self._candidate(way, shown(item), special) for item in row] for row in self.sets.items]
        score = self._scorer(way)
        rows: list[np.ndarray] = []
        began = time.perf_counter()
        for start in range(0, len(prompts), _USERS_AT_ONCE):
            part = slice(start, start + _USERS_AT_ONCE)
            rows += [found.numpy().astype(np.float64) for found in score(prompts[part], texts[part])]
        seconds = (time.perf_counter() - began) / max(len(prompts), 1)
        read = sum(self._count([text for row in texts for text in row])) / max(len(texts), 1)
        cost = {"tokens of a prompt": float(np.mean(tokens)), "tokens of its candidates": read}
        return np.stack(rows), {**cost, "seconds per user": seconds}

    def _prompts(self, way: _Way, special: Sequence[str]) -> tuple[list[str], list[int]]:
        shown, histories = self._shown(way), self.sets.histories
        retrieved = self._retrieved() if way.context else [[]] * len(histories)
        examples = self._shots(way.shots)
        built = []
        for n, (a, b) in enumerate(zip(histories.offsets[:-1], histories.offsets[1:], strict=True)):
            rows = [] if way.answer == "prior" else histories.ids[a:b].tolist()
            found = way.template.build(
                [shown(item) for item in rows], examples=examples, special=special,
                context=[self.titles[item] for item in retrieved[n]], budget=self.settings.max_length,
                count=self._count,
            )  # fmt: skip
            built.append(found)
        return [one.text for one in built], [one.tokens or 0 for one in built]

    def _shown(self, way: _Way) -> Callable[[int], Item]:
        if not way.columns:
            return lambda item: self.titles[item]
        schema = self.data.catalogue.schema
        names = [name for name in (schema.title, *schema.categorical, *schema.multi) if name]
        columns = {name: self.data.catalogue.items[name].to_list() for name in names}
        return lambda item: {name: values[item] for name, values in columns.items()}

    def _candidate(self, way: _Way, item: Item, special: Sequence[str]) -> str:
        from ...prompting import quoted

        if way.answer == "yes-no":
            return way.template.candidate(item, special=special)
        return f"- {quoted(str(item), limit=way.template.value_chars, special=special)}"

    def _scorer(self, way: _Way) -> Callable[[list[str], list[list[str]]], Any]:
        from ...llm import LikelihoodScorer, YesNoScorer

        if way.answer == "yes-no":
            return YesNoScorer(self.backbone)
        likely = LikelihoodScorer(self.backbone)
        return lambda prompts, texts: likely(prompts, texts, normalize="mean")

    def _shots(self, count: int) -> list[Any]:
        """What users who are not asked chose, and items that they never did, in turn."""
        import numpy as np

        from ...prompting import Example

        split, found = self.data.split, []
        random = np.random.default_rng(self.sets.seed)
        chosen = split.train.concat(split.valid).concat(split.test).unique()
        able = (split.train.lengths >= 3) & (chosen.lengths < split.num_items)
        others = np.setdiff1d(np.flatnonzero(able), self.sets.users)
        for n, user in enumerate(random.choice(others, min(count, len(others)), replace=False).tolist()):
            row, right = split.train[user][-4:], n % 2 == 0
            never = np.setdiff1d(np.arange(split.num_items), chosen[user])
            item = int(row[-1] if right else random.choice(never))
            history = [self.titles[i] for i in row[:-1].tolist()]
            found.append(Example(history, self.titles[item], "Yes" if right else "No"))
        return found

    def _retrieved(self) -> list[list[int]]:
        """Items whose titles lie nearest to each history's, by the default text encoder."""
        import torch
        from torch.nn import functional as F

        from mmrec_kernels import top_k

        from ...evaluation.ragged import Ragged
        from ...llm import Backbone, EmbeddingCache
        from ..runs import cache_folder

        encoder = Backbone.load()
        vectors = encoder.encode(self.titles, cache=EmbeddingCache(cache_folder()), progress=False).pooled
        assert vectors is not None
        vectors = F.normalize(vectors.float(), dim=1)
        histories: Ragged = self.sets.histories
        spans = list(zip(histories.offsets[:-1], histories.offsets[1:], strict=True))
        query = torch.stack([vectors[histories.ids[max(a, b - 5) : b]].mean(0) for a, b in spans])
        seen = (torch.from_numpy(histories.offsets), torch.from_numpy(histories.ids.astype("int64")))
        found = top_k(query, vectors, self.settings.neighbours, exclude=seen)
        return [[item for item in row if item >= 0] for row in found.ids.tolist()]

    def _count(self, texts: Sequence[str]) -> list[int]:
        return [len(row) for row in self.backbone.tokenizer(list(texts), verbose=False)["input_ids"]]


def _without_model(data: Data, sets: CandidateSets) -> dict[str, np.ndarray]:
    """Popularity, item kNN and the cosine of titles, on the same candidates."""
    import numpy as np

    from ...evaluation.floors import cosine_neighbours
    from ...recommender.prompted import PromptedConfig, PromptedRecommender

    split = data.split
    history = split.history("test")
    counts = np.bincount(history.ids, minlength=split.num_items).astype(np.float64)
    similar = cosine_neighbours(history, split.num_items, 20).transposed().sum_rows(history.unique().rows(sets.users))
    reader = PromptedRecommender(PromptedConfig(prompt="plain", rank=0), data.catalogue.item_titles)
    cosine = reader.user_vectors(sets.histories) @ reader.item_vectors().T
    return {
        "most-popular": counts[sets.items],
        "item-knn-20": np.take_along_axis(similar, sets.items, axis=1),
        "cosine of titles": np.take_along_axis(cosine.numpy(), sets.items, axis=1).astype(np.float64),
    }
