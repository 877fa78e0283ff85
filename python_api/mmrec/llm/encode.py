"""Texts to vectors: batching, pooling, progress.

A batch is laid out in one of three ways: packed (one row, no padding, any lengths; `.packed`), exact (texts of one
length, no padding) or padded on the right. What holds for the bits of a row (inference, one machine, one thread
count, packed or exact): the result does not depend on the order of the texts, on duplicates among them, or on the
progress bar, and no row sees padding. Rows may still differ in the last bits between calls whose batches hold other
numbers of tokens, as the matrix product splits its work by row count (docs/backbone.md has measurements).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .encoded import Encoded
from .extras import progress_bar
from .packed import Prefix, packed_forward
from .slots import BoundSlots, Pieces
from .tokenizing import check_texts, token_ids

if TYPE_CHECKING:
    from .backbone import Backbone
    from .soft_prompt import Ids, SoftPrompt

LAYOUTS = ("packed", "exact", "padded")
POOLINGS = ("mean", "weighted", "last", "cls", "tokens")


class _Job(NamedTuple):
    """A distinct text: its tokens, which vectors of a soft prompt come before it, which prefix it goes on from, and
    which adapter reads it ("" for none)."""

    tokens: tuple[int, ...]
    soft: tuple[int, ...] = ()
    prefix: int = 0
    adapter: str = ""


def encode_texts(
    backbone: Backbone,
    texts: Sequence[Pieces],
    *,
    pooling: str = "mean",
    normalize: bool = False,
    batch_tokens: int = 4096,
    token_budget: int | None = None,
    progress: bool = True,
    requires_grad: bool = False,
    layout: str | None = None,
    soft_prompt: SoftPrompt | None = None,
    soft_ids: Mapping[str, Ids] | None = None,
    prefix: Prefix | None = None,
    prefix_ids: Sequence[int] | Tensor | None = None,
    adapters: Sequence[str | None] | None = None,
    slots: BoundSlots | None = None,
) -> Encoded:
    """Embed `texts` with `backbone`.

    Args:
        texts: n strings; longer ones are cut to `backbone.max_length` tokens, those of a soft prompt included. With
            `slots` also sequences of strings and `Slot`.
        pooling: "mean" over all tokens, special ones included (sentence-transformers' mean with attention mask);
            "weighted": the mean in which token i of a text has weight i + 1 (SGPT, Muennighoff 2022, arXiv:2202.08904);
            "last" token (causal LMs); "cls", the first token; "tokens": every token's vector. Vectors of a soft prompt
            and of a prefix are not pooled.
        normalize: divide each vector by max(its L2 norm, 1e-12).
        batch_tokens: upper bound on tokens per forward, padding and soft prompts included; a longer single text is its
            own batch.
        token_budget: with "tokens", keep only the first so many vectors of each text (the model still reads all).
        progress: show a bar on stderr, if that is a terminal.
        requires_grad: keep the graph to the adapter and the soft prompt; runs in the backbone's current mode (dropout
            in training mode). Otherwise the backbone runs in eval mode without a graph and its mode is restored, also
            after Ctrl-C.
        layout: "packed", "exact" or "padded" batches. None: packed where the backbone can, else exact, and for
            `requires_grad`, where few large batches matter more than bits, padded.
        soft_prompt: its vectors come before each text's tokens, by `soft_ids` (see `SoftPrompt.rows`).
        prefix: what each text goes on from (`Backbone.prefix`): it sees the prefix's tokens, and its own positions
            begin behind them. Special tokens are then not added to the texts.
        prefix_ids: which of several prefixes, `[n]`. None: the only one.
        adapters: the adapter that reads each text, or None for none, `[n]`. Texts of several share packed batches in
            inference where `Backbone.why_not_together` is None, else each batch has one. None: that in use reads all.
            With `requires_grad` the graph reaches the adapter in use alone.
        slots: what fills the slots of texts (`ModalitySlots.bind`). A slot's tokens are read, counted and pooled like
            those of words.

    Returns:
        Encoded: `pooled [n, d]` float32, or `values [sum_len, d]` in the backbone's dtype with `offsets [n + 1]`.
        On the CPU without `requires_grad`, on the backbone's device with it. A text without any token (an empty
        string, where the tokenizer adds no special tokens) has a zero vector, or no token vectors.

    Raises:
        TypeError, ValueError: an argument out of range, `prefix` or a packed layout where `backbone.why_not_packed`.
    """
    _check(texts, pooling, batch_tokens, token_budget, layout, slots)
    training = backbone.training
    if not requires_grad:
        backbone.eval()  # before anything is decided: some models can be packed in this mode only
    try:
        layout = _layout(backbone, layout, prefix, requires_grad)
        jobs = _jobs(backbone, texts, soft_prompt, soft_ids, prefix, prefix_ids, adapters, slots)
        settings = (pooling, normalize, batch_tokens, token_budget, progress, layout, soft_prompt, prefix, slots)
        if requires_grad:
            return _run(backbone, jobs, *settings, grad=True)
        unique, index = _deduplicate(jobs)
        with torch.no_grad():
            found = _run(backbone, unique, *settings, grad=False)
    finally:
        if not requires_grad:
            backbone.train(training)
    return found if len(unique) == len(jobs) and index == list(range(len(jobs))) else found.select(torch.tensor(index))


def _layout(backbone: Backbone, asked: str | None, prefix: Prefix | None, requires_grad: bool) -> str:
    why_not = backbone.why_not_packed
    if (prefix is not None or asked == "packed") and why_not is not None:
        name = "prefix" if prefix is not None else "layout"
        raise ValueError(f"{name}: this backbone cannot take packed texts: {why_not}")
    if prefix is not None and asked not in (None, "packed"):
        raise ValueError(f"layout must be None or 'packed' with a prefix, got {asked!r}")
    if asked is not None:
        return asked
    return "packed" if why_not is None else "padded" if requires_grad else "exact"


def encode_prefix(
    backbone: Backbone, texts: Sequence[Pieces], *, behind: Prefix | None, adapter: bool, slots: BoundSlots | None
) -> Prefix:
    """See `Backbone.prefix`."""
    check_texts(texts, slots)
    training = backbone.training
    backbone.eval()
    try:
        if backbone.why_not_packed is not None:
            raise ValueError(f"prefix: this backbone cannot take packed texts: {backbone.why_not_packed}")
        ids = token_ids(backbone, texts, slots, special=behind is None, most=backbone.max_length)
        if not ids or not all(ids):
            raise ValueError("texts: a prefix must have a token, got an empty one")
        if behind is not None and len(behind) != len(ids):
            raise ValueError(f"behind must have {len(ids)} texts, got {len(behind)}")
        kept: dict[int, tuple[Tensor, Tensor]] = {}
        offsets = offsets_of([len(row) for row in ids])
        flat = torch.tensor([token for row in ids for token in row]).to(backbone.device)
        counts = None if behind is None else torch.ones(len(behind), dtype=torch.int64)
        off = nullcontext() if adapter else backbone.under(None)
        with torch.no_grad(), off:
            packed_forward(
                backbone.model, offsets, input_ids=flat if slots is None else None,
                inputs_embeds=None if slots is None else _embedded(backbone, flat, slots),
                prefix=behind, counts=counts, kept=kept,
            )  # fmt: skip
    finally:
        backbone.train(training)
    found = Prefix(kept, offsets.to(backbone.device))
    return found if behind is None else found.behind(behind)


def pool(hidden: Tensor, offsets: Tensor, pooling: str) -> Tensor:
    """Pool the rows of each text, `hidden [T, d]` by `offsets` int64 `[n + 1]` (≥ 1 row each), to float32 `[n, d]`.

    Rows outside `[offsets[0], offsets[n])` are not read.
    """
    if pooling == "cls":
        return hidden.index_select(0, offsets[:-1]).float()
    if pooling == "last":
        return hidden.index_select(0, offsets[1:] - 1).float()
    first, end = int(offsets[0]), int(offsets[-1])
    hidden, offsets = hidden[first:end].float(), offsets - first
    lengths = offsets.diff()
    if pooling == "weighted":
        place = torch.arange(1, end - first + 1, device=hidden.device) - offsets[:-1].repeat_interleave(lengths)
        hidden = hidden * place.unsqueeze(1)
        lengths = lengths * (lengths + 1) // 2
    return torch.segment_reduce(hidden, "sum", offsets=offsets, unsafe=True) / lengths.unsqueeze(1)


def plan_batches(lengths: Sequence[int], batch_tokens: int, layout: str) -> list[list[int]]:
    """Group positions, longest first, ≤ `batch_tokens` per group: of one length (exact), or with the padding that their
    lengths ask for (padded), or without any (packed).

    The given order of equal lengths is kept. Empty texts are in no group.
    """
    order = sorted((i for i, n in enumerate(lengths) if n > 0), key=lambda i: -lengths[i])
    batches: list[list[int]] = []
    tokens = longest = 0
    for i in order:
        if layout == "packed":
            fits = tokens + lengths[i] <= batch_tokens
        else:
            fits = (len(batches[-1]) + 1) * longest <= batch_tokens if batches else False
            fits = fits and (layout == "padded" or longest == lengths[i])
        if batches and fits:
            batches[-1].append(i)
            tokens += lengths[i]
        else:
            batches.append([i])
            tokens = longest = lengths[i]
    return batches


def _run(
    backbone: Backbone, jobs: list[_Job], pooling: str, normalize: bool, batch_tokens: int, token_budget: int | None,
    progress: bool, layout: str, soft_prompt: SoftPrompt | None, prefix: Prefix | None, slots: BoundSlots | None, *,
    grad: bool,
) -> Encoded:  # fmt: skip
    home = backbone.device if grad else torch.device("cpu")
    soft = 0 if soft_prompt is None else soft_prompt.length
    batches: list[list[int]] = []
    for names in _together(backbone, jobs, layout, grad):
        lengths = [len(job.tokens) + soft if job.tokens and job.adapter in names else 0 for job in jobs]
        batches += plan_batches(lengths, batch_tokens, layout)
    batches = [sorted(batch, key=lambda i: jobs[i].prefix) for batch in batches]
    pieces: list[Tensor] = []
    with progress_bar("texts", sum(map(len, batches)), progress) as advance:
        for batch in batches:
            hidden, offsets = _hidden(backbone, [jobs[i] for i in batch], layout, soft_prompt, prefix, slots)
            if pooling != "tokens":
                piece = pool(hidden, offsets, pooling)
            elif token_budget is None:
                piece = hidden
            else:
                place = torch.arange(len(hidden), device=hidden.device)
                piece = hidden[place - offsets[:-1].repeat_interleave(offsets.diff()) < token_budget]
            if normalize:
                piece = piece / piece.norm(dim=1, keepdim=True).clamp_min(1e-12)
            pieces.append(piece.to(home))
            advance(len(batch))
    dtype = backbone.dtype if pooling == "tokens" else torch.float32
    empty = torch.zeros(0, backbone.hidden_size, dtype=dtype, device=home)
    found = torch.cat([empty, *pieces])
    return _restore(found, [i for batch in batches for i in batch], jobs, pooling, token_budget)


def _together(backbone: Backbone, jobs: list[_Job], layout: str, grad: bool) -> list[set[str]]:
    """The adapters whose texts may share a batch."""
    names = sorted({job.adapter for job in jobs})
    apart = grad or layout != "packed" or backbone.why_not_together([name or None for name in names]) is not None
    return [{name} for name in names] if len(names) > 1 and apart else [set(names)]


def _hidden(
    backbone: Backbone,
    jobs: list[_Job],
    layout: str,
    soft_prompt: SoftPrompt | None,
    prefix: Prefix | None,
    slots: BoundSlots | None,
) -> tuple[Tensor, Tensor]:
    """Last hidden states of the texts' own tokens, `[T, d]`, and their offsets `[n + 1]`, on the backbone's device."""
    device = backbone.device
    ids = torch.tensor([token for job in jobs for token in job.tokens], dtype=torch.int64).to(device)
    offsets = offsets_of([len(job.tokens) for job in jobs])
    counts = None if prefix is None else torch.bincount(torch.tensor([j.prefix for j in jobs]), minlength=len(prefix))
    rest: dict[str, Any] = {"prefix": prefix, "counts": counts, "adapters": [job.adapter or None for job in jobs]}
    if soft_prompt is None and slots is None:
        return backbone.forward_rows(offsets, input_ids=ids, layout=layout, **rest), offsets.to(device)
    embedded = _embedded(backbone, ids, slots)
    if soft_prompt is None:
        return backbone.forward_rows(offsets, inputs_embeds=embedded, layout=layout, **rest), offsets.to(device)
    before = soft_prompt(torch.tensor([job.soft for job in jobs], dtype=torch.int64))
    own, longer = _behind(offsets, soft_prompt.length)
    rows = embedded.new_empty(int(longer[-1]), embedded.shape[1])
    is_own = torch.zeros(len(rows), dtype=torch.bool)
    is_own[own] = True
    rows = rows.index_copy(0, own.to(device), embedded)
    rows = rows.index_copy(0, (~is_own).nonzero().squeeze(1).to(device), before.flatten(0, 1).to(embedded))
    hidden = backbone.forward_rows(longer, inputs_embeds=rows, layout=layout, **rest)
    return hidden.index_select(0, own.to(device)), offsets.to(device)


def _embedded(backbone: Backbone, ids: Tensor, slots: BoundSlots | None) -> Tensor:
    """`[T, d]` in the model's input space: of tokens, and of slots, whose ids are negative."""
    embedded: Tensor = backbone.model.get_input_embeddings()(ids.clamp(min=0))
    filled = (ids < 0).nonzero()[:, 0]
    if slots is None or not len(filled):
        return embedded
    return embedded.index_copy(0, filled, slots.vectors(ids[filled]).to(embedded))


def _behind(offsets: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Where the rows of `offsets` are once `length` rows stand before each text, and the longer texts' offsets."""
    longer = offsets + length * torch.arange(len(offsets))
    lengths = offsets.diff()
    return torch.arange(int(offsets[-1])) + length * torch.arange(1, len(offsets)).repeat_interleave(lengths), longer


def offsets_of(lengths: Sequence[int]) -> Tensor:
    """int64 `[n + 1]` from 0."""
    offsets = torch.zeros(len(lengths) + 1, dtype=torch.int64)
    torch.cumsum(torch.tensor(lengths, dtype=torch.int64), 0, out=offsets[1:])
    return offsets


def _restore(found: Tensor, order: list[int], jobs: list[_Job], pooling: str, token_budget: int | None) -> Encoded:
    # `found` holds the non-empty texts in batch order; the empty ones are appended at its end, then all are put back.
    empty = [i for i, job in enumerate(jobs) if not job.tokens]
    back = torch.empty(len(jobs), dtype=torch.int64)
    back[torch.tensor(order + empty, dtype=torch.int64)] = torch.arange(len(jobs))
    if pooling != "tokens":
        zeros = found.new_zeros(len(empty), found.shape[1])
        return Encoded(pooled=torch.cat([found, zeros])).select(back)
    budget = token_budget if token_budget is not None else sys.maxsize
    offsets = offsets_of([min(len(jobs[i].tokens), budget) for i in order + empty])
    return Encoded(values=found, offsets=offsets.to(found.device)).select(back)


def _deduplicate(jobs: list[_Job]) -> tuple[list[_Job], list[int]]:
    # Sorting by content makes the batches, hence the bits, a function of the set of texts alone.
    unique = sorted(set(jobs))
    position = {job: i for i, job in enumerate(unique)}
    return unique, [position[job] for job in jobs]


def _jobs(
    backbone: Backbone, texts: Sequence[Pieces], soft_prompt: SoftPrompt | None, soft_ids: Mapping[str, Ids] | None,
    prefix: Prefix | None, prefix_ids: Sequence[int] | Tensor | None, adapters: Sequence[str | None] | None,
    slots: BoundSlots | None,
) -> list[_Job]:  # fmt: skip
    soft: list[list[int]] = [[]] * len(texts)
    room = backbone.max_length
    if soft_prompt is not None:
        soft_prompt.check_fits(backbone.input_width, room)
        soft = soft_prompt.rows(len(texts), soft_ids).tolist()
        room -= soft_prompt.length
    elif soft_ids is not None:
        raise ValueError("soft_ids go with soft_prompt, got them without one")
    ids = token_ids(backbone, texts, slots, special=prefix is None, most=room)
    chosen = _prefix_ids(len(ids), prefix, prefix_ids)
    names = backbone.adapters_of(adapters, len(ids))
    return [_Job(tuple(row), tuple(s), p, a or "") for row, s, p, a in zip(ids, soft, chosen, names, strict=True)]


def _prefix_ids(n: int, prefix: Prefix | None, given: Sequence[int] | Tensor | None) -> list[int]:
    if prefix is None:
        if given is not None:
            raise ValueError("prefix_ids go with prefix, got them without one")
        return [0] * n
    if given is None:
        if len(prefix) != 1:
            raise ValueError(f"prefix_ids must be given where there are {len(prefix)} prefixes")
        return [0] * n
    ids = given.tolist() if isinstance(given, Tensor) else list(given)
    if len(ids) != n or not all(isinstance(i, int) and 0 <= i < len(prefix) for i in ids):
        raise ValueError(f"prefix_ids must be {n} integers in [0, {len(prefix)}), got {ids[:8]}")
    return ids


def _check(
    texts: Sequence[Pieces], pooling: str, batch_tokens: int, token_budget: int | None, layout: str | None,
    slots: BoundSlots | None,
) -> None:  # fmt: skip
    check_texts(texts, slots)
    if layout not in (None, *LAYOUTS):
        raise ValueError(f"layout must be one of {LAYOUTS} or None, got {layout!r}")
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {POOLINGS}, got {pooling!r}")
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens must be ≥ 1, got {batch_tokens}")
    if token_budget is not None and (pooling != "tokens" or token_budget < 1):
        raise ValueError(f"token_budget must be ≥ 1 and goes with pooling='tokens', got {token_budget} and {pooling!r}")
