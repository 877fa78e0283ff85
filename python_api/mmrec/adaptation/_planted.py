"""The hidden factors of a generated catalogue, and the choices that follow from them."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

THEMES, STYLES, LOOKS, BANDS = 8, 4, 4, 4
_FIRST_DAY = 1_600_000_000
_DAY = 86_400
_SHORTEST = 5


@dataclass(frozen=True)
class Behaviour:
    """What drives a choice: weights in logits, and probabilities.

    Attributes:
        theme: weight of the log share of the item's themes in the user's taste.
        style, look, band: weight of the item having the user's favourite trait (words, picture, table).
        popularity: exponent of the Zipf-like popularity.
        succession: weight of the item's theme being the successor of the previous item's theme.
        follow_up: probability of simply taking the previous item's follow-up, if not taken before.
        cold: probability that a user's last interaction is a cold item.
        tie: probability that an interaction other than the last has the time of the one before it.
    """

    theme: float = 1.6
    style: float = 1.6
    look: float = 1.6
    band: float = 1.6
    popularity: float = 0.9
    succession: float = 1.8
    follow_up: float = 0.15
    cold: float = 0.15
    tie: float = 0.02


@dataclass(frozen=True)
class World:
    """The factors. I items, U users.

    ``themes`` float64 ``[I, 8]`` (rows sum to 1); ``style``, ``look``, ``band`` int64 ``[I]``; ``popularity`` float64
    ``[I]`` (rank-based, log); ``taste`` float64 ``[U, 8]``; ``favourite`` int64 ``[U, 3]`` (style, look, band);
    ``successor`` int64 ``[8]``; ``follow_up`` int64 ``[I]``; ``cold`` bool ``[I]``.
    """

    themes: np.ndarray
    style: np.ndarray
    look: np.ndarray
    band: np.ndarray
    popularity: np.ndarray
    taste: np.ndarray
    favourite: np.ndarray
    successor: np.ndarray
    follow_up: np.ndarray
    cold: np.ndarray

    @property
    def theme(self) -> np.ndarray:
        """int64 ``[I]``: each item's main theme."""
        return self.themes.argmax(axis=1)

    def arrays(self) -> dict[str, np.ndarray]:
        """All factors by name."""
        return asdict(self)


def plant(rng: np.random.Generator, *, users: int, items: int, cold_items: int) -> World:
    """Draws the factors."""
    main = rng.permutation(np.arange(items) % THEMES)
    second = (main + rng.integers(1, THEMES, items)) % THEMES
    share = rng.uniform(0.0, 0.35, items)
    themes = np.zeros((items, THEMES))
    themes[np.arange(items), main] = 1 - share
    themes[np.arange(items), second] = share
    cold = np.zeros(items, dtype=bool)
    cold[rng.permutation(items)[:cold_items]] = True
    cycle = rng.permutation(THEMES)
    successor = np.empty(THEMES, dtype=np.int64)
    successor[cycle] = np.roll(cycle, -1)
    return World(
        themes=themes,
        style=rng.integers(0, STYLES, items),
        look=rng.integers(0, LOOKS, items),
        band=rng.integers(0, BANDS, items),
        popularity=-np.log1p(rng.permutation(items)),
        taste=rng.dirichlet(np.full(THEMES, 0.4), users),
        favourite=np.stack([rng.integers(0, n, users) for n in (STYLES, LOOKS, BANDS)], axis=1),
        successor=successor,
        follow_up=_follow_ups(rng, main, successor, cold),
        cold=cold,
    )


def _follow_ups(rng: np.random.Generator, theme: np.ndarray, successor: np.ndarray, cold: np.ndarray) -> np.ndarray:
    """For each item a warm one of the successor theme; any other warm one where that theme has none."""
    warm = np.flatnonzero(~cold)
    follow_up = np.empty(len(theme), dtype=np.int64)
    for item in range(len(theme)):
        fitting = warm[(theme[warm] == successor[theme[item]]) & (warm != item)]
        follow_up[item] = rng.choice(fitting if len(fitting) else warm[warm != item])
    return follow_up


def affinity(world: World, behaviour: Behaviour, user: int) -> np.ndarray:
    """float64 ``[I]``: how much ``user`` likes each item for its content alone."""
    style, look, band = world.favourite[user]
    liked = behaviour.theme * np.log(world.themes @ world.taste[user] + 0.02)
    liked += behaviour.style * (world.style == style)
    liked += behaviour.look * (world.look == look)
    return liked + behaviour.band * (world.band == band)


def sample_events(
    rng: np.random.Generator, world: World, behaviour: Behaviour, *, mean_length: float
) -> dict[str, np.ndarray]:
    """All users' interactions in parallel arrays: user, item, rating (1–5), timestamp (seconds)."""
    users, longest = len(world.taste), int((~world.cold).sum()) // 2
    extra = rng.exponential(mean_length - _SHORTEST, users)
    lengths = np.minimum(_SHORTEST + np.rint(extra).astype(np.int64), max(_SHORTEST, longest))
    items, ratings, times = [], [], []
    for user, length in enumerate(lengths):
        liked = affinity(world, behaviour, user)
        history = _walk(rng, world, behaviour, liked, int(length))
        standing = np.searchsorted(np.sort(liked), liked[history]) / len(liked)
        stars = 1 + 4 * standing + rng.normal(0, 0.6, len(history))
        items.append(history)
        ratings.append(np.clip(np.rint(stars), 1, 5))
        times.append(_times(rng, behaviour, len(history)))
    return {
        "user": np.repeat(np.arange(users), lengths),
        "item": np.concatenate(items),
        "rating": np.concatenate(ratings),
        "timestamp": np.concatenate(times),
    }


def _walk(rng: np.random.Generator, world: World, behaviour: Behaviour, liked: np.ndarray, length: int) -> np.ndarray:
    """One user's items in order, none twice; cold ones only at the end."""
    theme = world.theme
    base = liked + behaviour.popularity * world.popularity
    free = ~world.cold
    history: list[int] = []
    for step in range(length):
        if step == length - 1 and world.cold.any() and rng.random() < behaviour.cold:
            free = world.cold
        previous = history[-1] if history else None
        follow = rng.random() < behaviour.follow_up
        if previous is not None and follow and free[world.follow_up[previous]]:
            choice = int(world.follow_up[previous])
        else:
            logits = base + rng.gumbel(size=len(base))
            if previous is not None:
                logits += behaviour.succession * (theme == world.successor[theme[previous]])
            choice = int(np.where(free, logits, -np.inf).argmax())
        history.append(choice)
        free = free.copy()
        free[choice] = False
    return np.array(history)


def _times(rng: np.random.Generator, behaviour: Behaviour, length: int) -> np.ndarray:
    gaps = 60 + rng.exponential(2 * _DAY, length).astype(np.int64)
    tied = rng.random(length) < behaviour.tie
    # A tie is ordered by item row, which could move a cold item from the end into the training part.
    tied[-1] = False
    gaps[tied] = 0
    return _FIRST_DAY + rng.integers(0, 365 * _DAY) + np.cumsum(gaps)
