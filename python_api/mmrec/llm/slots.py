"""`ModalitySlots`: vectors of other modalities as tokens of a prompt: images, tables, what a user did.

Each slot of a text becomes tokens of the model's input space by a projector of its modality (LLaVA, Liu et al., 2023,
arXiv:2304.08485; in recommenders CoLLM, arXiv:2310.19488, LLaRA, arXiv:2312.02445, VIP5, arXiv:2305.14302).
"""

from __future__ import annotations

import dataclasses
import json
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn

from ..files import parse_json, write_atomic
from .extras import require
from .projectors import SlotSpec, projector

if TYPE_CHECKING:
    from .backbone import Backbone

__all__ = ["BoundSlots", "ModalitySlots", "Pieces", "Slot", "SlotSpec", "Values", "slot_pieces", "slot_placeholder"]

_FILE, _METADATA = "modality_slots.safetensors", "mmrec_modality_slots"
# JSON escapes it and `str.split` drops it, so neither a quoted text nor an answer of a HardPrompt can hold one.
_MARK = "\x1e"

Values: TypeAlias = "Tensor | tuple[Tensor, Tensor]"
"""Vectors of S rows: `[S, width]`, or `(values [R, width], offsets int64 [S + 1])` where rows have several, or none."""


@dataclass(frozen=True)
class Slot:
    """A place in a text that row `row` of the vectors of modality `name` fills; −1: the modality is missing."""

    name: str
    row: int

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "row", operator.index(self.row))
        except TypeError:
            raise TypeError(f"row must be an integer, got {self.row!r}") from None


Pieces: TypeAlias = "str | Sequence[str | Slot]"
"""A text, or its pieces. What is in a string is text, whatever it says: only a `Slot` is a slot."""


def slot_placeholder(name: str) -> str:
    """What the words of a template hold where a slot of modality `name` goes, for `slot_pieces`."""
    if not name or _MARK in name:
        raise ValueError(f"name must have characters other than {_MARK!r}, got {name!r}")
    return f"{_MARK}{name}{_MARK}"


def slot_pieces(text: str, rows: Mapping[str, Sequence[int]]) -> list[str | Slot]:
    """The pieces of a text made from a template with placeholders; the i-th one of `name` is of row `rows[name][i]`.

    Texts of items must be quoted in it (`mmrec.prompting.quoted`, and so `HardPrompt` as text): they cannot hold a
    placeholder then. One that is not meant is an error, as there must be as many as rows.

    Raises:
        ValueError: a placeholder that does not end, or more or fewer of a modality than rows.
    """
    parts = text.split(_MARK)
    words, names = parts[::2], parts[1::2]
    if len(words) == len(names):
        raise ValueError(f"text: a placeholder does not end: {names[-1][:40]!r}")
    for name in {**dict.fromkeys(names), **rows}:
        if names.count(name) != len(rows.get(name, ())):
            raise ValueError(
                f"text must have a placeholder of {name!r} for each of {len(rows.get(name, ()))} rows, "
                f"got {names.count(name)}"
            )
    left = {name: iter(given) for name, given in rows.items()}
    pieces: list[str | Slot] = [words[0]]
    for name, word in zip(names, words[1:], strict=True):
        pieces += [Slot(name, next(left[name])), word]
    return [piece for piece in pieces if piece != ""]


class ModalitySlots(nn.Module):
    """Projectors from the vectors of modalities to tokens of a model, and trained tokens for what is missing.

    What a projector gives is scaled to a root mean square that is learned per modality and starts at that of the
    model's own token embeddings: these are small, and tokens of another size would drown the text, or drown in it.

    Args:
        specs: by modality.
        width: d of the model's input embeddings (`Backbone.input_width`).
        size: root mean square of an entry of those, at the start.
        seed: of the projectors.

    Raises:
        ValueError: no modality, or a size that is not positive.
    """

    def __init__(self, specs: Mapping[str, SlotSpec], width: int, *, size: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        if not specs:
            raise ValueError("specs must name at least one modality, got none")
        if not 0 < size < float("inf"):
            raise ValueError(f"size must be positive and finite, got {size}")
        self.specs, self.width = dict(specs), width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            # Lists: a ModuleDict refuses some names.
            self._projectors = nn.ModuleList(projector(spec, width) for spec in specs.values())
            self._missing = nn.ParameterList(size * torch.randn(spec.tokens, width) for spec in specs.values())
            self._markers = nn.ParameterDict(  # by place: names may be any
                {str(n): size * torch.randn(2, width) for n, spec in enumerate(specs.values()) if spec.markers}
            )
        self._size = nn.ParameterList(torch.tensor(float(size)) for _ in specs)

    @classmethod
    def of(cls, backbone: Backbone, specs: Mapping[str, SlotSpec], *, seed: int = 0) -> ModalitySlots:
        """For `backbone`, on its device, at the size of its token embeddings."""
        embed = backbone.model.get_input_embeddings()
        some = torch.arange(min(len(embed.weight), 1024), device=backbone.device)
        with torch.no_grad():
            size = float(embed(some).float().square().mean().sqrt())
        return cls(specs, backbone.input_width, size=size, seed=seed).to(backbone.device)

    def bind(self, values: Mapping[str, Values]) -> BoundSlots:
        """These slots with the vectors that fill them, for `Backbone.encode(slots=…)`. Gradients reach both.

        Raises:
            ValueError: a modality that there is not, or vectors of another width or form.
        """
        return BoundSlots(self, dict(values))

    def forward(self, name: str, values: Tensor, offsets: Tensor | None = None) -> Tensor:
        """`[n, length, d]` of vectors `[n, width]`, or of `values [R, width]` with `offsets int64 [n + 1]`."""
        place = self._place(name)
        spec, project, missing = self.specs[name], self._projectors[place], self._missing[place]
        if spec.kind == "resampler":
            if offsets is None:
                offsets = torch.arange(len(values) + 1, device=values.device)
            found = project(values, offsets)
            there: Tensor | None = offsets.diff() > 0
        else:
            found, there = project(values).unflatten(1, (spec.tokens, self.width)), None
        mean_square = found.square().mean(2, keepdim=True)
        found = found * (mean_square + torch.finfo(found.dtype).eps).rsqrt() * self._size[place]
        return self._marked(place, found if there is None else torch.where(there.view(-1, 1, 1), found, missing))

    def missing(self, name: str) -> Tensor:
        """`[length, d]` that stand for what is missing."""
        place = self._place(name)
        return self._marked(place, self._missing[place].unsqueeze(0))[0]

    def _place(self, name: str) -> int:
        if name not in self.specs:
            raise ValueError(f"name: there are no slots {name!r}; there are {', '.join(self.specs)}")
        return list(self.specs).index(name)

    def _marked(self, place: int, tokens: Tensor) -> Tensor:
        """`tokens [n, tokens, d]` between their markers, if they have any."""
        if str(place) not in self._markers:
            return tokens
        first, last = self._markers[str(place)].to(tokens.dtype).expand(len(tokens), 2, -1).split(1, dim=1)
        return torch.cat([first, tokens, last], dim=1)

    def save(self, folder: str | Path) -> None:
        """Write `modality_slots.safetensors` into `folder`, atomically."""
        from safetensors.torch import save

        state = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        specs = {name: dataclasses.asdict(spec) for name, spec in self.specs.items()}
        metadata = {"format": "pt", _METADATA: json.dumps({"specs": specs, "width": self.width})}
        write_atomic(Path(folder) / _FILE, save(state, metadata=metadata))

    @classmethod
    def load(cls, folder: str | Path) -> ModalitySlots:
        """Read what `save` wrote; ValueError where it is missing or damaged."""
        safetensors = require("safetensors")
        path = Path(folder) / _FILE
        if not path.is_file():
            raise ValueError(f"folder: no {_FILE} in {str(folder)!r}; ModalitySlots.save writes one")
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                content = parse_json((file.metadata() or {})[_METADATA])
                state = {name: file.get_tensor(name) for name in file.keys()}
            specs, width = {name: SlotSpec(**spec) for name, spec in content["specs"].items()}, content["width"]
            with torch.device("meta"):  # sizes first, which a damaged file may make huge
                needed = {name: value.shape for name, value in cls(specs, width).state_dict().items()}
            if needed != {name: value.shape for name, value in state.items()}:
                raise ValueError("its tensors are not those of its specs")
            found = cls(specs, width)
            found.load_state_dict(state)
        except (
            OSError, KeyError, TypeError, ValueError, AttributeError, RuntimeError, safetensors.SafetensorError,
        ) as error:  # fmt: skip
            raise ValueError(f"folder: the slots in {str(folder)!r} are damaged: {error}") from error
        return found


class BoundSlots:
    """`ModalitySlots` with the vectors of their modalities.

    A slot's tokens are named by negative ids: −1 − v is entry v of a table that holds, per modality, the tokens for
    what is missing and then those of every row.
    """

    def __init__(self, slots: ModalitySlots, values: dict[str, Values]) -> None:
        self.slots = slots
        self.values: dict[str, tuple[Tensor, Tensor | None]] = {}
        unknown = sorted(set(values) - set(slots.specs))
        if unknown:
            raise ValueError(f"values name {unknown[0]!r}, which has no slots; there are {', '.join(slots.specs)}")
        self._begin: dict[str, int] = {}
        begin = 0
        for name, spec in slots.specs.items():
            vectors, offsets = _checked(name, spec, values.get(name))
            self.values[name] = (vectors, offsets)
            self._begin[name] = begin
            begin += (self._rows(name) + 1) * spec.length

    def check_fits(self, width: int) -> None:
        """Raises ValueError unless the tokens are of `width`."""
        if width != self.slots.width:
            raise ValueError(f"slots must have tokens of width {width}, got {self.slots.width}")

    def ids(self, slot: Slot, where: str) -> list[int]:
        """The negative ids of a slot's tokens; `where` it stands, for errors."""
        if slot.name not in self.slots.specs:
            raise ValueError(f"{where}: there are no slots {slot.name!r}; there are {', '.join(self.slots.specs)}")
        rows = self._rows(slot.name)
        if not -1 <= slot.row < rows:
            raise ValueError(f"{where}: slot {slot.name!r} must be of a row in [-1, {rows}), got {slot.row}")
        tokens = self.slots.specs[slot.name].length
        first = self._begin[slot.name] + (slot.row + 1) * tokens
        return [-1 - (first + n) for n in range(tokens)]

    def vectors(self, ids: Tensor) -> Tensor:
        """`[m, d]` of negative ids int64 `[m]`; only rows that they name are read."""
        entries = -1 - ids.cpu()
        parts: list[Tensor] = []
        order: list[Tensor] = []
        for name, spec in self.slots.specs.items():
            begin, rows = self._begin[name], self._rows(name)
            own = ((entries >= begin) & (entries < begin + (rows + 1) * spec.length)).nonzero()[:, 0]
            if not len(own):
                continue
            place = entries[own] - begin
            row, token = place // spec.length - 1, place % spec.length
            used, which = row.unique(return_inverse=True)
            table = torch.stack([self.slots.missing(name)]) if int(used[0]) < 0 else None
            known = used[used >= 0]
            if len(known):
                projected = self._projected(name, known)
                table = projected if table is None else torch.cat([table.to(projected.dtype), projected])
            assert table is not None
            parts.append(table[which.to(table.device), token.to(table.device)])
            order.append(own)
        back = torch.cat(order).argsort()
        found = torch.cat([part.to(parts[0].dtype) for part in parts])
        return found[back.to(found.device)]

    def _projected(self, name: str, rows: Tensor) -> Tensor:
        values, offsets = self.values[name]
        device = self.slots.missing(name).device
        dtype = self.slots.missing(name).dtype
        if offsets is None:
            return self.slots(name, values[rows.to(values.device)].to(device, dtype))
        lengths = offsets.diff()[rows]
        ends = lengths.cumsum(0)
        source = torch.arange(int(ends[-1])) + (offsets[rows] - (ends - lengths)).repeat_interleave(lengths)
        chosen = torch.cat([ends.new_zeros(1), ends])
        return self.slots(name, values[source.to(values.device)].to(device, dtype), chosen.to(device))

    def _rows(self, name: str) -> int:
        values, offsets = self.values[name]
        return len(values) if offsets is None else len(offsets) - 1


def _checked(name: str, spec: SlotSpec, given: Values | None) -> tuple[Tensor, Tensor | None]:
    if given is None:
        return torch.zeros(0, spec.width), None
    values, offsets = (given, None) if isinstance(given, Tensor) else given
    if values.ndim != 2 or values.shape[1] != spec.width:
        raise ValueError(f"values[{name!r}] must be [.., {spec.width}], got {list(values.shape)}")
    if offsets is None:
        return values, None
    if spec.kind != "resampler":
        raise ValueError(f"values[{name!r}] must be [S, {spec.width}]: only a resampler takes several per row")
    offsets = offsets.cpu()
    if (
        offsets.dtype != torch.int64 or offsets.ndim != 1 or not len(offsets) or int(offsets[0]) < 0
        or bool((offsets.diff() < 0).any()) or int(offsets[-1]) > len(values)
    ):  # fmt: skip
        raise ValueError(f"values[{name!r}]: offsets must be int64 and rise from 0 to {len(values)}, got {offsets[:8]}")
    return values, offsets
