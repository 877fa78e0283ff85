"""``mmrec recommend``: what to show to a user, or after a pasted history."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .console import print_rows, say, status, write_json
from .data import load_catalogue
from .runs import TrainedRun, open_run

if TYPE_CHECKING:
    from ..adaptation import Catalogue

__all__ = ["answer", "print_answer", "recommend_command"]

_HISTORY_SHOWN = 5


def recommend_command(
    *, run: Path, user: str | None, history: str | None, k: int, data: Path | None, layout: str, json_file: Path | None
) -> None:
    """See ``mmrec recommend --help``."""
    if (user is None) == (history is None):
        raise ValueError("give either --user or --history, one of them")
    pasted = None if history is None else _ids(history)
    opened = open_run(run)
    catalogue, fingerprint = load_catalogue(opened.data if data is None else data, layout)
    opened.check_data(catalogue, fingerprint)
    content = answer(opened, catalogue, k, user=user, history=pasted)
    print_answer(content)
    write_json(json_file, content)


def answer(
    run: TrainedRun, catalogue: Catalogue, k: int, *, user: str | None = None, history: Sequence[str] | None = None
) -> dict[str, Any]:
    """The ``k`` best items as JSON values.

    Args:
        user: a user of the catalogue; all its interactions are the history.
        history: item ids, oldest first, instead of a user; items that training never saw are read by their content.

    Raises:
        ValueError: an unknown user or item, a history without items, k beyond the catalogue.
    """
    rows = _history(catalogue, user, history)
    if k > catalogue.num_items:
        raise ValueError(f"-k: {catalogue.name!r} has {catalogue.num_items} items, got {k}")
    with status("ranking all items"):
        found = run.recommend(rows, k)
    titles = catalogue.item_titles
    trained = run.trained_items
    answers = [
        {
            "rank": place + 1,
            "item": catalogue.item_ids[item],
            "title": titles[item],
            "score": float(score),
            "mass": {name: float(share) for name, share in zip(run.modalities, mass, strict=True)},
            "seen_in_training": bool(trained[item]),
        }
        for place, (item, score, mass) in enumerate(zip(found.items[0], found.scores[0], found.mass[0], strict=True))
        if item >= 0
    ]
    return {
        "command": "recommend",
        "model": run.label,
        "run": str(run.folder),
        "protocol": run.protocol,
        "fingerprint": run.fingerprint,
        "seed": run.seed,
        "user": user,
        "history": [
            {"item": catalogue.item_ids[row], "title": titles[row], "seen_in_training": bool(trained[row])}
            for row in rows
        ],
        "answers": answers,
    }


def print_answer(content: dict[str, Any]) -> None:
    """The answers as a table, with the end of the history above it."""
    history = content["history"]
    shown = [_title(entry) for entry in history[-_HISTORY_SHOWN:]]
    who = "pasted history" if content["user"] is None else f"user {content['user']}"
    more = "… " if len(history) > len(shown) else ""
    say(f"{who}, {len(history)} item(s), latest last: {more}{' → '.join(shown)}")
    answers = content["answers"]
    names = list(answers[0]["mass"]) if answers else []
    rows = [
        [str(a["rank"]), a["item"], _title(a), f"{a['score']:.3f}", *(f"{a['mass'][name]:.0%}" for name in names)]
        for a in answers
    ]
    print_rows(
        ["", "item", "title", "score", *names],
        rows,
        left=3,
        title="recommended, with the attention mass of each modality",
    )
    if any(not entry["seen_in_training"] for entry in [*history, *answers]):
        say("(new): never seen in training, known by its content alone.")


def _title(entry: dict[str, Any]) -> str:
    return entry["title"] + ("" if entry["seen_in_training"] else " (new)")


def _ids(text: str) -> list[str]:
    ids = [part.strip() for part in text.split(",")]
    ids = [part for part in ids if part]
    if not ids:
        raise ValueError("--history is empty; it needs at least one item id")
    return ids


def _history(catalogue: Catalogue, user: str | None, history: Sequence[str] | None) -> np.ndarray:
    if user is not None:
        rows = catalogue.history(catalogue.user_row(user))
        if not len(rows):
            raise ValueError(f"user {user!r} has no interactions; give --history instead")
        return rows
    return np.array([catalogue.item_row(item) for item in history or ()], dtype=np.int32)
