"""A recommender of one language model that reads texts: a prompt of a history for the user, a title for the item."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmrec_kernels import info_nce

from ..evaluation.ragged import Ragged
from ..evaluation.ranking import rank
from ..prompting import HardPrompt, special_tokens

if TYPE_CHECKING:
    from ..evaluation.protocols import Seen, Split, Stage
    from ..llm import Backbone

__all__ = ["Examples", "PromptedConfig", "PromptedRecommender"]

PROMPTS = ("plain", "hard", "soft", "hybrid")
PLACEMENTS = ("all-linear", "attention", "last")
ORDERS = ("joint", "prompt-first", "adapter-first")
_USER, _ITEM = 0, 1  # entries of the soft prompt's table


@dataclass(frozen=True)
class PromptedConfig:
    """How a history becomes a prompt, and what trains.

    Attributes:
        prompt: "plain", the titles, latest first; "hard", an instruction around them (`HardPrompt`); "soft", trained
            vectors before the titles; "hybrid", trained vectors before the instruction. Items have trained vectors of
            their own before their texts where histories have them.
        soft_tokens: trained vectors before a text.
        rank: of the LoRA adapter; 0 = none.
        placement: its layers: "all-linear", "attention", or "last", all linear layers of the last `last_layers` blocks.
        order: "joint", or what trains in the first half of the steps; the other one trains in the second half.
        steps, batch_size: of training; 0 steps = frozen.
        learning_rate, prompt_learning_rate: of the adapter and of the vectors, AdamW without decay.
        scale: factor on the cosine of user and item.
        history: last items of which the prompt tells.
        max_length: tokens of titles: of an item's, and of a history's together. What stands around them, an instruction
            or trained vectors, comes on top, so that every prompt tells of the same titles.
        backbone, quantize: as in `Backbone.load`.
        seed: of the vectors, the adapter, the batches and dropout.
    """

    prompt: str = "hard"
    soft_tokens: int = 8
    rank: int = 8
    placement: str = "all-linear"
    last_layers: int = 2
    order: str = "joint"
    steps: int = 60
    batch_size: int = 32
    learning_rate: float = 1e-3
    prompt_learning_rate: float = 3e-2
    scale: float = 20.0
    history: int = 5
    max_length: int = 128
    backbone: str | None = None
    quantize: str | None = "nf4"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in {"prompt": PROMPTS, "placement": PLACEMENTS, "order": ORDERS}.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        least = {
            "soft_tokens": 1, "rank": 0, "last_layers": 1, "steps": 0, "batch_size": 2, "history": 1, "max_length": 1,
        }  # fmt: skip
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"{name} must be ≥ {minimum}, got {getattr(self, name)}")
        if self.order != "joint" and not (self.is_soft and self.rank):
            raise ValueError(f"order {self.order!r} needs trained vectors and an adapter, got {self.prompt!r}, rank 0")

    @property
    def is_soft(self) -> bool:
        """Whether there are trained vectors."""
        return self.prompt in ("soft", "hybrid")

    @property
    def is_hard(self) -> bool:
        """Whether there is an instruction."""
        return self.prompt in ("hard", "hybrid")


@dataclass(frozen=True)
class Examples:
    """Histories and what came next: `histories` (item rows, oldest first) and `targets int64 [n]`."""

    histories: Ragged
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.targets)

    @classmethod
    def of(cls, split: Split, history: int, *, most: int | None = None, seed: int = 0) -> Examples:
        """Every training interaction but each user's first, with up to `history` items before it; `most` of them, drawn
        by `seed`."""
        rows = [split.train.ids[a:b] for a, b in zip(split.train.offsets[:-1], split.train.offsets[1:], strict=True)]
        places = [(user, place) for user, row in enumerate(rows) for place in range(1, len(row))]
        if most is not None and most < len(places):
            chosen = np.sort(np.random.default_rng(seed).choice(len(places), most, replace=False))
            places = [places[n] for n in chosen]
        histories = Ragged.from_lists([rows[user][max(0, place - history) : place] for user, place in places])
        return cls(histories, np.array([rows[user][place] for user, place in places], dtype=np.int64))

    def rows(self, chosen: np.ndarray) -> tuple[list[np.ndarray], Tensor]:
        """Some of them: the histories, and targets `[m]`."""
        part = self.histories.rows(chosen)
        spans = zip(part.offsets[:-1], part.offsets[1:], strict=True)
        return [part.ids[a:b] for a, b in spans], torch.from_numpy(self.targets[chosen])


@dataclass
class PromptedRecommender:
    """Scores items by scale · cos(text of the history, text of the item), both read by one backbone, mean-pooled.

    Trains by InfoNCE of histories against the items of their batch (those that are the same item as a row's own target
    are left out).

    Args:
        config: see there.
        texts: one per item, such as `Catalogue.item_titles`. They are untrusted.
        template: of the instruction; None: a short one of its own.

    Attributes:
        backbone: the model, with its adapter.
        soft_prompt: the trained vectors, or None.
        losses: of each step of `fit`.

    Raises:
        ValueError: an item without text, no room for `max_length` tokens of titles in what the model reads beside the
            rest of a prompt, or what `Backbone.load` refuses.
    """

    config: PromptedConfig
    texts: Sequence[str]
    template: HardPrompt | None = None
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        from ..llm import Backbone, LoRAConfig

        config = self.config
        if not self.texts or not all(isinstance(text, str) and text.strip() for text in self.texts):
            raise ValueError("texts must have a text for every item")
        lora = None
        if config.rank:
            last = config.last_layers if config.placement == "last" else None
            targets = "attention" if config.placement == "attention" else "all-linear"
            lora = LoRAConfig(config.rank, targets=targets, last_layers=last, seed=config.seed)
        self.backbone: Backbone = Backbone.load(config.backbone, quantize=config.quantize, lora=lora)
        self.soft_prompt = None
        if config.is_soft:
            self.soft_prompt = self.backbone.soft_prompt({"side": (2, config.soft_tokens)}, seed=config.seed)
        if self.template is None:
            self.template = HardPrompt(
                intro="Someone chose these items, one after another:", question="The next item is:",
                history=config.history, value_chars=max(map(len, self.texts)),
            )  # fmt: skip
        self._special = special_tokens(self.backbone.tokenizer)
        around = config.soft_tokens if config.is_soft else 0
        around += self._count([self.template.build([]).text if config.is_hard else ""])[0]
        positions = self.backbone.max_length
        if config.max_length + around > positions:
            raise ValueError(
                f"max_length must be at most {positions - around}, what the model reads ({positions} tokens) less what "
                f"stands around titles ({around}), got {config.max_length}"
            )
        self._titles = [self._cut(text) for text in self.texts]
        self._sizes = self._count([f"; {title}" for title in self._titles]) - self._count([""])[0]

    @property
    def num_trained(self) -> int:
        """How many numbers train."""
        soft = [] if self.soft_prompt is None else list(self.soft_prompt.parameters())
        return sum(p.numel() for p in [*soft, *self.backbone.trainable_parameters()])

    def titles(self, history: Sequence[int] | np.ndarray) -> list[str]:
        """What a prompt tells of a history of item rows, oldest first: the last titles that fit `max_length` tokens
        together, the last one always."""
        rows = np.asarray(history, dtype=np.int64)[-self.config.history :]
        fit = int((self._sizes[rows[::-1]].cumsum() <= self.config.max_length).sum())
        return [self._titles[item] for item in rows[len(rows) - max(fit, 1) :]] if len(rows) else []

    def prompt(self, history: Sequence[int] | np.ndarray) -> str:
        """What the model reads of a history of item rows, oldest first."""
        titles = self.titles(history)
        assert self.template is not None
        if self.config.is_hard:
            # Quotes and line breaks take room too, for which a model of few positions may have to leave out a title.
            room = self.backbone.max_length - (self.config.soft_tokens if self.config.is_soft else 0)
            return self.template.build(titles, budget=room, count=self._counted, special=self._special).text
        return "; ".join(reversed(titles))

    def fit(self, examples: Examples, progress: Callable[[int, int, float], None] | None = None) -> None:
        """Trains on `examples` in `config.steps` batches: in a new order as often as it takes, each once per time.

        Raises:
            ValueError: no examples, or a loss that is not finite.
        """
        config = self.config
        parts = self._parts()
        if not config.steps or not parts:
            return
        if not len(examples):
            raise ValueError("examples must not be empty")
        rows = _shuffled(len(examples), config.steps * config.batch_size, config.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.backbone.train()
            try:
                for step, chosen in enumerate(np.split(rows, config.steps)):
                    loss = self._loss(*examples.rows(chosen))
                    if not torch.isfinite(loss):
                        raise ValueError(f"the loss became {loss.item()} in step {step + 1}; lower learning rates help")
                    loss.backward()
                    for name, optimizer in parts.items():
                        if self._trains(name, step):
                            optimizer.step()
                        optimizer.zero_grad(set_to_none=True)
                    self.losses.append(loss.item())
                    if progress is not None:
                        progress(step + 1, config.steps, self.losses[-1])
            finally:
                self.backbone.eval()

    def item_vectors(self) -> Tensor:
        """`[I, d]`, of length 1."""
        return self._vectors(self._titles, _ITEM)

    def user_vectors(self, histories: Ragged) -> Tensor:
        """`[n, d]`, of length 1, of histories of item rows, oldest first."""
        spans = zip(histories.offsets[:-1], histories.offsets[1:], strict=True)
        return self._vectors([self.prompt(histories.ids[a:b]) for a, b in spans], _USER)

    def __call__(
        self, split: Split, stage: Stage, k: int, *, mask: Seen | None = None, candidates: np.ndarray | None = None
    ) -> np.ndarray:
        """The best k items of every evaluated user, see `evaluation.Ranker`."""
        query = self.user_vectors(split.history(stage).rows(split.users(stage)))
        return rank(query, self.item_vectors(), split, stage, k, mask=mask, candidates=candidates)

    def _parts(self) -> dict[str, torch.optim.Optimizer]:
        found: dict[str, torch.optim.Optimizer] = {}
        if self.soft_prompt is not None:
            rate = self.config.prompt_learning_rate
            found["prompt"] = torch.optim.AdamW(self.soft_prompt.parameters(), lr=rate, weight_decay=0.0)
        adapter = self.backbone.trainable_parameters()
        if adapter:
            found["adapter"] = torch.optim.AdamW(adapter, lr=self.config.learning_rate, weight_decay=0.0)
        return found

    def _trains(self, part: str, step: int) -> bool:
        first = {"prompt-first": "prompt", "adapter-first": "adapter"}.get(self.config.order)
        return first is None or (part == first) == (step < self.config.steps // 2)

    def _loss(self, histories: list[np.ndarray], targets: Tensor) -> Tensor:
        query = self._vectors([self.prompt(history) for history in histories], _USER, grad=True)
        key = self._vectors([self._titles[item] for item in targets.tolist()], _ITEM, grad=True)
        return info_nce(query, key, scale=self.config.scale, symmetric=False, key_ids=targets)

    def _vectors(self, texts: list[str], side: int, *, grad: bool = False) -> Tensor:
        soft: dict[str, Any] = {}
        if self.soft_prompt is not None:
            soft = {"soft_prompt": self.soft_prompt, "soft_ids": {"side": side}}
        found = self.backbone.encode(texts, requires_grad=grad, progress=False, **soft).pooled
        assert found is not None
        return F.normalize(found.float(), dim=1)

    def _cut(self, text: str) -> str:
        """The longest beginning of at most `max_length` tokens."""
        most = self.config.max_length + self._count([""])[0]
        if self._count([text])[0] <= most:
            return text
        fits, too_long = 0, len(text)
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            fits, too_long = (middle, too_long) if self._count([text[:middle]])[0] <= most else (fits, middle)
        return text[:fits].rstrip()

    def _count(self, texts: Sequence[str]) -> np.ndarray:
        return np.array(self._counted(texts))

    def _counted(self, texts: Sequence[str]) -> list[int]:
        return [len(row) for row in self.backbone.tokenizer(list(texts), verbose=False)["input_ids"]]


def _shuffled(count: int, most: int, seed: int) -> np.ndarray:
    """So many rows of `count`: one order of all after the other."""
    random = np.random.default_rng(seed)
    return np.concatenate([random.permutation(count) for _ in range(-(-most // count))])[:most]
