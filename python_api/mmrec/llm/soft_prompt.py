"""`SoftPrompt`: trainable vectors before a text's tokens, per task, user or item (prompt tuning, arXiv:2104.08691)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..files import parse_json, write_atomic
from .extras import require
from .tokenizing import tokenize

if TYPE_CHECKING:
    from .backbone import Backbone

Ids = int | Sequence[int] | Tensor
_FILE, _METADATA = "soft_prompt.safetensors", "mmrec_soft_prompt"


class SoftPrompt(nn.Module):
    """Tables of vectors that stand before each text, in the model's input space.

    `SoftPrompt({"task": (1, 8), "user": (943, 2)}, width)`: eight vectors that all texts share, then two of the text's
    user. They train beside a LoRA adapter or without one (peft joins no prompt learning with LoRA). Id −1 is whoever is
    unknown: each table has one entry more for that, which trains wherever −1 is given (hide some ids while training).

    Args:
        tables: name → (how many entries, vectors of each); the vectors stand in this order.
        width: d of the model's input embeddings.
        init: `[m, d]` vectors to start from, in turn: every entry of a table starts with the same. None: normal, 0.02.
        seed: of the normal start.

    Attributes:
        tables: as given.
        length: vectors before each text.
    """

    def __init__(
        self, tables: Mapping[str, tuple[int, int]], width: int, *, init: Tensor | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        if not tables:
            raise ValueError("tables must name at least one table, got none")
        for name, (entries, vectors) in tables.items():
            if entries < 1 or vectors < 1:
                raise ValueError(f"tables[{name!r}] must be (entries ≥ 1, vectors ≥ 1), got {(entries, vectors)}")
        if init is not None and (init.ndim != 2 or init.shape[0] < 1 or init.shape[1] != width):
            raise ValueError(f"init must be [m ≥ 1, {width}], got {list(init.shape)}")
        self.tables = {name: (int(entries), int(vectors)) for name, (entries, vectors) in tables.items()}
        self.length = sum(vectors for _, vectors in self.tables.values())
        self.width = width
        if init is None:
            start = 0.02 * torch.randn(self.length, width, generator=torch.Generator().manual_seed(seed))
        else:
            start = init.detach().float()[torch.arange(self.length) % len(init)]
        parts = start.split([vectors for _, vectors in self.tables.values()])
        # A list: a ParameterDict would sort the names, and refuse some ("items").
        self._tables = nn.ParameterList(
            part.expand(entries + 1, -1, -1).clone()
            for (entries, _), part in zip(self.tables.values(), parts, strict=True)
        )

    @classmethod
    def of(
        cls, backbone: Backbone, tables: Mapping[str, tuple[int, int]], *, init: str | None = None, seed: int = 0
    ) -> SoftPrompt:
        """See `Backbone.soft_prompt`."""
        embed = backbone.model.get_input_embeddings()  # called, not indexed: some models scale what they look up
        if init is None:
            generator = torch.Generator().manual_seed(seed)
            chosen = torch.randint(len(embed.weight), (sum(n for _, n in tables.values()),), generator=generator)
        else:
            chosen = torch.tensor(tokenize(backbone, [init], special=False)[0], dtype=torch.int64)
            if not len(chosen):
                raise ValueError(f"init must have a token, got {init!r}")
        return cls(tables, backbone.input_width, init=embed(chosen.to(backbone.device))).to(backbone.device)

    @property
    def vectors(self) -> dict[str, nn.Parameter]:
        """Name → parameter `[entries + 1, vectors, d]`, float32; the last entry is that of id −1."""
        return dict(zip(self.tables, self._tables, strict=True))

    def rows(self, n: int, ids: Mapping[str, Ids] | None = None) -> Tensor:
        """int64 `[n, tables]`, the entry of each table for each of n texts, the last one for −1.

        `ids`: name → one id for all texts, or `[n]`. A table of one entry need not be named.

        Raises:
            ValueError: a name that is no table, a table of several entries not named, an id out of range.
        """
        given = dict(ids or {})
        unknown = sorted(set(given) - set(self.tables))
        if unknown:
            raise ValueError(f"soft_ids: there is no table {unknown[0]!r}; there are {', '.join(self.tables)}")
        columns = []
        for name, (entries, _) in self.tables.items():
            if name not in given and entries > 1:
                raise ValueError(f"soft_ids must name {name!r}, which has {entries} entries")
            found = torch.as_tensor(given.get(name, 0), device="cpu")
            if found.numel() and (found.is_floating_point() or found.dtype == torch.bool):
                raise ValueError(f"soft_ids[{name!r}] must be integers, got {found.dtype}")
            found = found.to(torch.int64)
            if found.shape not in ((), (n,)):
                raise ValueError(f"soft_ids[{name!r}] must be one id or {n}, got {list(found.shape)}")
            if found.numel() and not (int(found.min()) >= -1 and int(found.max()) < entries):
                raise ValueError(f"soft_ids[{name!r}] must be in [-1, {entries}), got {found.flatten()[:8].tolist()}")
            columns.append(torch.where(found < 0, entries, found).expand(n))
        return torch.stack(columns, dim=1)

    def forward(self, rows: Tensor) -> Tensor:
        """`rows` as `self.rows` gives them, int64 `[n, tables]`, to `[n, length, d]` float32."""
        return torch.cat([t[rows[:, i].to(t.device)] for i, t in enumerate(self._tables)], dim=1)

    def check_fits(self, width: int, max_length: int) -> None:
        """Raises ValueError if the vectors are not of `width`, or leave no room for a text in `max_length` tokens."""
        if width != self.width:
            raise ValueError(f"soft_prompt must have vectors of width {width}, got {self.width}")
        if self.length >= max_length:
            raise ValueError(f"soft_prompt must have fewer vectors than max_length, {max_length}, got {self.length}")

    def save(self, folder: str | Path) -> None:
        """Write `soft_prompt.safetensors` into `folder`, atomically."""
        from safetensors.torch import save

        state = {name: value.detach().cpu().contiguous() for name, value in self.vectors.items()}
        metadata = {"format": "pt", _METADATA: json.dumps({"tables": self.tables, "width": self.width})}
        write_atomic(Path(folder) / _FILE, save(state, metadata=metadata))

    @classmethod
    def load(cls, folder: str | Path) -> SoftPrompt:
        """Read what `save` wrote; ValueError where it is missing or damaged."""
        safetensors = require("safetensors")
        path = Path(folder) / _FILE
        if not path.is_file():
            raise ValueError(f"folder: no {_FILE} in {str(folder)!r}; SoftPrompt.save writes one")
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                content = parse_json((file.metadata() or {})[_METADATA])
                state = {name: file.get_tensor(name) for name in file.keys()}
            tables, width = {name: tuple(sizes) for name, sizes in content["tables"].items()}, content["width"]
            needed = {name: (entries + 1, vectors, width) for name, (entries, vectors) in tables.items()}
            if needed != {name: tuple(value.shape) for name, value in state.items()}:
                raise ValueError(f"it holds {sorted(state)}, which are not the tables {tables} of width {width}")
            found = cls(tables, width)
            for name, vectors in found.vectors.items():
                vectors.data.copy_(state[name])
        except (
            OSError, KeyError, TypeError, ValueError, AttributeError, RuntimeError, safetensors.SafetensorError,
        ) as error:  # fmt: skip
            raise ValueError(f"folder: the soft prompt in {str(folder)!r} is damaged: {error}") from error
        return found
