"""Texts to vectors: batching by length, pooling, progress.

What holds for the bits of a row (inference, one machine, one thread count): the result does not depend on the order
of the texts, on duplicates among them, or on the progress bar; texts of different token counts never share a batch, so
no row sees padding. Rows may still differ in the last bits between calls whose batches hold other numbers of texts of
that length, as the matrix product splits its work by row count (docs/backbone.md has measurements).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .encoded import Encoded

if TYPE_CHECKING:
    from .backbone import Backbone

POOLINGS = ("mean", "last", "cls", "tokens")
_TOKENIZE_CHUNK = 4096


def encode_texts(
    backbone: Backbone,
    texts: Sequence[str],
    *,
    pooling: str = "mean",
    normalize: bool = False,
    batch_tokens: int = 4096,
    token_budget: int | None = None,
    progress: bool = True,
    requires_grad: bool = False,
    padding: bool | None = None,
) -> Encoded:
    """Embed `texts` with `backbone`.

    Args:
        texts: n strings; longer ones are cut to `backbone.max_length` tokens.
        pooling: "mean" over all tokens, special ones included (sentence-transformers' mean with attention mask);
            "last" token (causal LMs); "cls", the first token; "tokens": every token's vector.
        normalize: divide each vector by max(its L2 norm, 1e-12).
        batch_tokens: upper bound on tokens per forward, padding included; a longer single text is its own batch.
        token_budget: with "tokens", keep only the first so many vectors of each text (the model still reads all).
        progress: show a bar on stderr, if that is a terminal.
        requires_grad: keep the graph to the adapter; runs in the backbone's current mode (dropout in training mode).
            Otherwise the backbone runs in eval mode without a graph and its mode is restored, also after Ctrl-C.
        padding: let texts of different lengths share a batch, padded on the right. None means only for
            `requires_grad`, where few large batches matter more than bits.

    Returns:
        Encoded: `pooled [n, d]` float32, or `values [sum_len, d]` in the backbone's dtype with `offsets [n + 1]`.
        On the CPU without `requires_grad`, on the backbone's device with it. A text without any token (an empty
        string, where the tokenizer adds no special tokens) has a zero vector, or no token vectors.
    """
    _check(texts, pooling, batch_tokens, token_budget)
    ids = _tokenize(backbone, texts)
    padding = requires_grad if padding is None else padding
    settings = (pooling, normalize, batch_tokens, token_budget, progress, padding)
    if requires_grad:
        return _run(backbone, ids, *settings, grad=True)
    unique, index = _deduplicate(ids)
    training = backbone.training
    backbone.eval()
    try:
        with torch.no_grad():
            found = _run(backbone, unique, *settings, grad=False)
    finally:
        backbone.train(training)
    return found if len(unique) == len(ids) and index == list(range(len(ids))) else found.select(torch.tensor(index))


def pool(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Pool right-padded hidden states `[B, L, d]` under `mask [B, L]` (≥ 1 token per row) to float32 `[B, d]`."""
    hidden = hidden.float()
    if pooling == "cls":
        return hidden[:, 0]
    lengths = mask.sum(1)
    if pooling == "last":
        return hidden.gather(1, (lengths - 1).view(-1, 1, 1).expand(-1, 1, hidden.shape[2])).squeeze(1)
    # where, not a product: what padding rows hold must not matter, NaN included.
    kept = torch.where(mask.unsqueeze(2).bool(), hidden, hidden.new_zeros(()))
    return kept.sum(1) / lengths.unsqueeze(1)


def plan_batches(lengths: Sequence[int], batch_tokens: int, padding: bool) -> list[list[int]]:
    """Group positions of nearly (`padding`) or exactly equal length, longest first, ≤ `batch_tokens` per group.

    The given order of equal lengths is kept. Empty texts are in no group.
    """
    order = sorted((i for i, n in enumerate(lengths) if n > 0), key=lambda i: -lengths[i])
    batches: list[list[int]] = []
    for i in order:
        longest = lengths[batches[-1][0]] if batches else 0
        fits = bool(batches) and (len(batches[-1]) + 1) * longest <= batch_tokens
        if fits and (padding or longest == lengths[i]):
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def _run(
    backbone: Backbone, ids: list[list[int]], pooling: str, normalize: bool, batch_tokens: int,
    token_budget: int | None, progress: bool, padding: bool, *, grad: bool,
) -> Encoded:  # fmt: skip
    device = backbone.device
    home = device if grad else torch.device("cpu")
    batches = plan_batches([len(row) for row in ids], batch_tokens, padding)
    pieces: list[Tensor] = []
    with progress_bar("texts", sum(map(len, batches)), progress) as advance:
        for batch in batches:
            input_ids, mask = _pad([ids[i] for i in batch], device)
            hidden = backbone.forward_tokens(input_ids, None if bool(mask.all()) else mask)
            if pooling == "tokens":
                kept = mask.bool()
                if token_budget is not None:
                    kept[:, token_budget:] = False
                piece = hidden[kept.to(device)]
            else:
                piece = pool(hidden, mask.to(device), pooling)
            if normalize:
                piece = piece / piece.norm(dim=1, keepdim=True).clamp_min(1e-12)
            pieces.append(piece.to(home))
            advance(len(batch))
    dtype = backbone.dtype if pooling == "tokens" else torch.float32
    empty = torch.zeros(0, backbone.hidden_size, dtype=dtype, device=home)
    found = torch.cat([empty, *pieces])
    return _restore(found, [i for batch in batches for i in batch], ids, pooling, token_budget)


def _restore(found: Tensor, order: list[int], ids: list[list[int]], pooling: str, token_budget: int | None) -> Encoded:
    # `found` holds the non-empty texts in batch order; the empty ones are appended at its end, then all are put back.
    empty = [i for i, row in enumerate(ids) if not row]
    back = torch.empty(len(ids), dtype=torch.int64)
    back[torch.tensor(order + empty, dtype=torch.int64)] = torch.arange(len(ids))
    if pooling != "tokens":
        zeros = found.new_zeros(len(empty), found.shape[1])
        return Encoded(pooled=torch.cat([found, zeros])).select(back)
    budget = token_budget if token_budget is not None else sys.maxsize
    lengths = torch.tensor([min(len(ids[i]), budget) for i in order + empty], dtype=torch.int64)
    offsets = torch.zeros(len(ids) + 1, dtype=torch.int64)
    torch.cumsum(lengths, 0, out=offsets[1:])
    return Encoded(values=found, offsets=offsets.to(found.device)).select(back)


def _pad(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    # The mask stays on the CPU so that asking whether it is full costs no synchronisation. The id under padding is
    # arbitrary but must exist: 0 does in every vocabulary.
    longest = max(map(len, rows))
    mask = torch.arange(longest).unsqueeze(0) < torch.tensor([len(row) for row in rows]).unsqueeze(1)
    input_ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], dtype=torch.int64)
    return input_ids.to(device), mask


def _deduplicate(ids: list[list[int]]) -> tuple[list[list[int]], list[int]]:
    # Sorting by content makes the batches, hence the bits, a function of the set of texts alone.
    unique = sorted({tuple(row) for row in ids})
    position = {row: i for i, row in enumerate(unique)}
    return [list(row) for row in unique], [position[tuple(row)] for row in ids]


def _tokenize(backbone: Backbone, texts: Sequence[str]) -> list[list[int]]:
    ids: list[list[int]] = []
    for start in range(0, len(texts), _TOKENIZE_CHUNK):
        batch = backbone.tokenizer(
            list(texts[start : start + _TOKENIZE_CHUNK]), truncation=True, max_length=backbone.max_length,
            padding=False, return_attention_mask=False, return_token_type_ids=False,
        )  # fmt: skip
        ids.extend(batch["input_ids"])
    return ids


def _check(texts: Sequence[str], pooling: str, batch_tokens: int, token_budget: int | None) -> None:
    if isinstance(texts, str):
        raise TypeError("texts must be a sequence of str, got one str; write [text]")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts[{i}] must be a str, got {type(text).__name__}")
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {POOLINGS}, got {pooling!r}")
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens must be ≥ 1, got {batch_tokens}")
    if token_budget is not None and (pooling != "tokens" or token_budget < 1):
        raise ValueError(f"token_budget must be ≥ 1 and goes with pooling='tokens', got {token_budget} and {pooling!r}")


@contextmanager
def progress_bar(label: str, total: int, wanted: bool) -> Iterator[Any]:
    """Yield `advance(n)`: a bar on stderr if it is wanted and that is a terminal, else a function that does nothing."""
    if not wanted or not sys.stderr.isatty() or total == 0:
        yield lambda n: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda n: bar.advance(task, n)
