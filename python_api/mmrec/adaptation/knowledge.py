"""Attributes and triples of a knowledge graph as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

__all__ = ["triple_texts"]


def triple_texts(
    entities: Sequence[str | None], triples: Iterable[tuple[str, str, str]], *,
    labels: Mapping[str, str] | None = None, relations: Sequence[str] | None = None, max_values: int = 8,
    separator: str = "\n",
) -> tuple[list[str], np.ndarray]:  # fmt: skip
    """One text per item: a line per relation, "relation: tail, tail".

    Args:
        entities: of each item, the node of the graph that is it; None for an item that the graph does not have.
        triples: (head, relation, tail); those whose tail is an item's entity are written from that side too, as
            "relation of: head". Repeats count once.
        labels: what to write for nodes and relations; those that are not in it are written as they are, with blanks for
            underscores.
        relations: only these, in this order; None: all, the most frequent of the graph first, then by name.
        max_values: most tails that a line names, those in the order of the triples.
        separator: between lines.

    Returns:
        `(texts, mask)`: I strings and bool `[I]`; where the mask is False the graph says nothing and the text is empty.
    """
    if max_values < 1:
        raise ValueError(f"max_values must be at least 1, got {max_values}")
    if isinstance(relations, str):
        raise TypeError(f"relations must be a sequence of names, got one str; write [{relations!r}]")
    wanted = {entity for entity in entities if entity is not None}
    facts: dict[str, dict[tuple[str, bool], dict[str, None]]] = {}
    frequency: dict[str, int] = {}
    for head, relation, tail in dict.fromkeys(triples):
        frequency[relation] = frequency.get(relation, 0) + 1
        if relations is not None and relation not in relations:
            continue
        for node, other, back in ((head, tail, False), (tail, head, True)):
            if node in wanted and not (back and head == tail):
                facts.setdefault(node, {}).setdefault((relation, back), {})[other] = None
    if relations is None:
        order = sorted(frequency, key=lambda relation: (-frequency[relation], relation))
    else:
        order = list(dict.fromkeys(relations))

    def name(node: str) -> str:
        return " ".join((labels or {}).get(node, node.replace("_", " ")).split())

    texts, mask = [], np.zeros(len(entities), dtype=bool)
    for row, entity in enumerate(entities):
        own = {} if entity is None else facts.get(entity, {})
        lines = [
            f"{name(relation)}{' of' if back else ''}: {', '.join(map(name, list(own[relation, back])[:max_values]))}"
            for relation in order
            for back in (False, True)
            if (relation, back) in own
        ]
        texts.append(separator.join(lines))
        mask[row] = bool(lines)
    return texts, mask
