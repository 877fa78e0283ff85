"""Which interactions a model may learn from, and which it must predict.

Protocols: ``S`` leave-last-out, ``G`` MMRec's random split per user, ``T`` one cut in time for everybody.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np

from .ragged import Ragged

if TYPE_CHECKING:
    from ..adaptation.catalogue import Catalogue

__all__ = ["Split", "Stage", "Seen", "split", "hold_out_items", "leave_last_out", "general", "labelled", "global_time"]

Stage = Literal["valid", "test"]
Seen = Literal["none", "train", "train+valid"]

_TRAIN, _VALID, _TEST = 0, 1, 2
_DROPPED = 3


@dataclass(frozen=True, eq=False)
class Split:
    """The three parts of every user's interactions; row ``u`` of each part belongs to user ``u``.

    Args:
        protocol: "S", "G" or "T".
        num_users, num_items: sizes of the whole catalogue, whatever the parts hold.
        train, valid, test: item rows per user, in the order of time where the data has one.
        origin: the rule that made the parts, in words.
        dropped_users: users whose interactions were left out because they have no training part (G).
    """

    protocol: Literal["S", "G", "T"]
    num_users: int
    num_items: int
    train: Ragged
    valid: Ragged
    test: Ragged
    origin: str
    dropped_users: int = 0

    def __post_init__(self) -> None:
        if self.protocol not in ("S", "G", "T"):
            raise ValueError(f"protocol must be 'S', 'G' or 'T', got {self.protocol!r}")
        for name in ("train", "valid", "test"):
            part: Ragged = getattr(self, name)
            if len(part) != self.num_users:
                raise ValueError(f"{name} has {len(part)} rows for {self.num_users} users")
            if len(part.ids) and (part.ids.min() < 0 or part.ids.max() >= self.num_items):
                raise ValueError(
                    f"{name} has item rows {part.ids.min()} to {part.ids.max()}, outside [0, {self.num_items})"
                )

    def history(self, stage: Stage) -> Ragged:
        """What a model may see of each user when it predicts ``stage``.

        For "valid": the training part. For "test": training, then validation, except under G, where the order means
        nothing and MMRec keeps validation items out of the model.
        """
        _check_stage(stage)
        return self._train_valid if stage == "test" and self.protocol != "G" else self.train

    def default_mask(self, stage: Stage) -> Seen:
        """The mask that the protocol's published tables use."""
        _check_stage(stage)
        return "train+valid" if stage == "test" and self.protocol != "G" else "train"

    def mask(self, stage: Stage, seen: Seen | None = None) -> Ragged:
        """Items that are left out of each user's ranking; ``None`` takes the protocol's default."""
        seen = self.default_mask(stage) if seen is None else seen
        if seen not in ("none", "train", "train+valid"):
            raise ValueError(f"mask must be 'none', 'train' or 'train+valid', got {seen!r}")
        if seen == "train+valid" and stage == "valid":
            raise ValueError("mask 'train+valid' would hide the very items that stage 'valid' asks for")
        return {"none": self._nothing, "train": self.train, "train+valid": self._train_valid}[seen]

    def target(self, stage: Stage) -> Ragged:
        """The items to predict, for all users."""
        _check_stage(stage)
        return self.valid if stage == "valid" else self.test

    def users(self, stage: Stage) -> np.ndarray:
        """int64: users that are evaluated, ascending: those with a target and with a history."""
        return np.flatnonzero((self.target(stage).lengths > 0) & (self.history(stage).lengths > 0))

    def relevant(self, stage: Stage) -> Ragged:
        """The targets of ``users(stage)``, one row each, sorted, without repeats."""
        return self.target(stage).rows(self.users(stage)).unique()

    def unreachable(self, stage: Stage, seen: Seen | None = None) -> int:
        """How many targets the mask hides (a user came back to a known item): they count as misses."""
        users = self.users(stage)
        target, hidden = self.relevant(stage), self.mask(stage, seen).rows(users).unique()
        return int(len(target.ids) + len(hidden.ids) - len(target.concat(hidden).unique().ids))

    @cached_property
    def popularity(self) -> np.ndarray:
        """int64 ``[num_items]``: training interactions per item."""
        return np.bincount(self.train.ids, minlength=self.num_items)

    @property
    def cold_items(self) -> np.ndarray:
        """bool ``[num_items]``: items without a training interaction."""
        return self.popularity == 0

    @cached_property
    def id(self) -> str:
        """Protocol and a hash of the parts: two results can be compared only if this is the same."""
        digest = hashlib.sha256(f"{self.protocol} {self.num_users} {self.num_items}".encode())
        for part in (self.train, self.valid, self.test):
            digest.update(part.offsets.astype("<i8").tobytes())
            digest.update(part.ids.astype("<i4").tobytes())
        return f"{self.protocol}-{digest.hexdigest()[:16]}"

    @cached_property
    def _train_valid(self) -> Ragged:
        return self.train.concat(self.valid)

    @cached_property
    def _nothing(self) -> Ragged:
        return Ragged.empty(self.num_users)


def hold_out_items(split: Split, share: float, *, seed: int = 0) -> Split:
    """Makes items cold on purpose: a random ``share`` of the trained items leaves the training and validation parts.

    They stay in the test part and among the candidates, so the rows "cold-among-all" and "cold-among-cold" of a result
    say whether content alone can recommend them. In 5-core data hardly an item is cold by itself.

    Args:
        share: of the items with a training interaction, in (0, 1); at least one item.
        seed: which items.
    """
    if not 0 < share < 1:
        raise ValueError(f"share must be in (0, 1), got {share}")
    trained = np.flatnonzero(split.popularity)
    if not len(trained):
        raise ValueError("split must have training interactions to hold items out of, got none")
    held = np.zeros(split.num_items, dtype=bool)
    held[np.random.default_rng(seed).choice(trained, max(1, round(share * len(trained))), replace=False)] = True
    origin = f"{split.origin}; {int(held.sum())} items held out of training (share {share}, seed {seed})"
    train, valid = (part.keep(~held[part.ids]) for part in (split.train, split.valid))
    return dataclasses.replace(split, train=train, valid=valid, origin=origin)


def split(catalogue: Catalogue, protocol: str, *, seed: int = 0, quantiles: tuple[float, float] = (0.8, 0.9)) -> Split:
    """Splits a catalogue's interactions.

    Args:
        protocol: "S" leave-last-out; "G" MMRec's general split, with the labels that the data brings or else drawn
            with ``seed``; "T" global time, cut at ``quantiles`` of all timestamps.
    """
    events = catalogue.interactions
    sizes = (len(catalogue.user_ids), len(catalogue.item_ids))
    if protocol == "S":
        return leave_last_out(events.user, events.item, *sizes, time=events.timestamp)
    if protocol == "G":
        if events.split is not None:
            return labelled(events.user, events.item, events.split, *sizes, time=events.timestamp)
        return general(events.user, events.item, *sizes, seed=seed, time=events.timestamp)
    if protocol == "T":
        if events.timestamp is None:
            raise ValueError(f"protocol 'T' needs timestamps, and {catalogue.name!r} has none")
        return global_time(events.user, events.item, events.timestamp, *sizes, quantiles=quantiles)
    raise ValueError(f"protocol must be 'S', 'G' or 'T', got {protocol!r}")


def leave_last_out(
    user: np.ndarray, item: np.ndarray, num_users: int, num_items: int, *, time: np.ndarray | None = None
) -> Split:
    """S: a user's last interaction is the test, the one before it the validation, the rest training.

    Order is (time, then item row); without ``time`` the order of the arrays. Users with fewer than three interactions
    only train.
    """
    user, item, _ = _sorted(user, item, time, num_users, num_items)
    count = np.bincount(user, minlength=num_users)
    from_end = count[user] - 1 - _position(user, count)
    label = np.full(len(user), _TRAIN)
    label[(count[user] >= 3) & (from_end == 1)] = _VALID
    label[(count[user] >= 3) & (from_end == 0)] = _TEST
    order = "order of the file" if time is None else "time, then item row"
    return _build("S", user, item, label, num_users, num_items, f"leave-last-out, {order}", 0)


def general(
    user: np.ndarray, item: np.ndarray, num_users: int, num_items: int, *, seed: int, time: np.ndarray | None = None
) -> Split:
    """G: each user's interactions in random order; MMRec's rule for how many go where.

    Fewer than 10 interactions: 1 validation, 1 test. Otherwise v + t = ⌊n/5⌋ with v = ⌊(v + t)/2⌋. Users left without
    training interactions are dropped. The rule is MMRec's; its random order is not, so tables made from MMRec's own
    files need the labels stored there.
    """
    user, item, _ = _sorted(user, item, time, num_users, num_items)
    count = np.bincount(user, minlength=num_users)
    held_out = np.where(count < 10, 2, count // 5)
    valid = held_out // 2
    shuffled = np.lexsort((np.random.default_rng(seed).random(len(user)), user))
    place = np.empty(len(user), np.int64)
    place[shuffled] = _position(user, count)
    label = np.full(len(user), _TRAIN)
    label[place < held_out[user]] = _TEST
    label[place < valid[user]] = _VALID
    return _without_train_dropped(user, item, label, num_users, num_items, f"MMRec's rule, seed {seed}")


def labelled(
    user: np.ndarray,
    item: np.ndarray,
    label: np.ndarray,
    num_users: int,
    num_items: int,
    *,
    time: np.ndarray | None = None,
) -> Split:
    """G with the parts that the data brings: ``label`` is 0 training, 1 validation, 2 test."""
    label = np.asarray(label)
    if label.shape != np.shape(user):
        raise ValueError(f"label must have one entry per interaction {np.shape(user)}, got {label.shape}")
    if not np.isin(label, (_TRAIN, _VALID, _TEST)).all():
        raise ValueError(f"label must hold 0, 1 and 2 only, got {np.unique(label).tolist()}")
    user, item, order = _sorted(user, item, time, num_users, num_items)
    return _without_train_dropped(user, item, label[order], num_users, num_items, "labels of the data")


def global_time(
    user: np.ndarray,
    item: np.ndarray,
    time: np.ndarray,
    num_users: int,
    num_items: int,
    *,
    quantiles: tuple[float, float] = (0.8, 0.9),
) -> Split:
    """T: interactions before the first cut train, from the second cut on they are the test.

    The cuts are quantiles of all timestamps (the next timestamp of the data, where one falls between two), so equal
    timestamps always lie on the same side. Users without a history at a stage are not evaluated there.
    """
    low, high = quantiles
    if not 0 < low < high < 1:
        raise ValueError(f"quantiles must satisfy 0 < first < second < 1, got {quantiles}")
    time = np.asarray(time)
    user, item, order = _sorted(user, item, time, num_users, num_items)
    first, second = np.quantile(time, quantiles, method="higher") if len(time) else (0, 0)
    stamp = time[order]
    label = np.where(stamp < first, _TRAIN, np.where(stamp < second, _VALID, _TEST))
    origin = f"global time, cuts at {int(first)} and {int(second)} (quantiles {low:g} and {high:g})"
    return _build("T", user, item, label, num_users, num_items, origin, 0)


def _check_stage(stage: str) -> None:
    if stage not in ("valid", "test"):
        raise ValueError(f"stage must be 'valid' or 'test', got {stage!r}")


def _sorted(
    user: np.ndarray, item: np.ndarray, time: np.ndarray | None, num_users: int, num_items: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Checks the interactions and orders them by (user, time, item); returns users, items and that order."""
    user, item = np.asarray(user), np.asarray(item)
    for name, values in (("item", item), ("time", time)):
        if values is not None and np.shape(values) != user.shape:
            raise ValueError(f"{name} must have one entry per interaction {user.shape}, got {np.shape(values)}")
    for name, values, size in (("user", user, num_users), ("item", item, num_items)):
        if len(values) and (values.min() < 0 or values.max() >= size):
            raise ValueError(f"{name} must lie in [0, {size}), got {values.min()} to {values.max()}")
    order = np.argsort(user, kind="stable") if time is None else np.lexsort((item, time, user))
    return user[order], item[order], order


def _position(user: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Place of each interaction inside its user, for arrays sorted by user."""
    start = np.cumsum(count) - count
    return np.arange(len(user)) - start[user]


def _without_train_dropped(
    user: np.ndarray, item: np.ndarray, label: np.ndarray, num_users: int, num_items: int, origin: str
) -> Split:
    trained = np.bincount(user[label == _TRAIN], minlength=num_users) > 0
    dropped = int(np.sum(~trained & (np.bincount(user, minlength=num_users) > 0)))
    label = np.where(trained[user], label, _DROPPED)
    return _build("G", user, item, label, num_users, num_items, origin, dropped)


def _build(
    protocol: Literal["S", "G", "T"],
    user: np.ndarray,
    item: np.ndarray,
    label: np.ndarray,
    num_users: int,
    num_items: int,
    origin: str,
    dropped: int,
) -> Split:
    train, valid, test = (
        Ragged.from_pairs(user[label == part], item[label == part], num_users) for part in (_TRAIN, _VALID, _TEST)
    )
    return Split(protocol, num_users, num_items, train, valid, test, origin, dropped)
