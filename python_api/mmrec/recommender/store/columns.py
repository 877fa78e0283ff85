"""Items as columns, in memory and in files: what a store holds of each, and how its files are written and mapped."""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...fusion.tokens import Tokens

__all__ = [
    "CHUNK",
    "CONTENT_BYTES",
    "DTYPES",
    "Columns",
    "ItemRows",
    "Meta",
    "Ragged",
    "encode",
    "map_file",
    "write_file",
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
# Whatever a str holds: ids come from outside.
UTF8 = ("utf-8", "surrogatepass")
# Bytes that one checksum covers.
CHUNK = 1 << 24
# Files name tensors "<name>" (a row per item), and "<name>.values" with "<name>.offsets" where an item has any number.
_VALUES, _OFFSETS = ".values", ".offsets"
_PADDING, _ALIGN = "padding.", 64
_NAMES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int8: "I8", torch.uint8: "U8",
    torch.int64: "I64", torch.bool: "BOOL",
}  # fmt: skip
CONTENT_BYTES = 16  # of the hash of an item's content


@dataclass(frozen=True)
class Meta:
    """What all items of a store have in common.

    Attributes:
        width: d of the vectors.
        dtype: "float32", "bfloat16" or "int8" (a scale per item) as stored.
        modalities: names of the columns of `mass`.
        model: what made the vectors: a store serves that model only.
        tokens: width of the token rows of each modality that has them.
    """

    width: int
    dtype: str
    modalities: tuple[str, ...]
    model: str
    tokens: Mapping[str, int]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "width": self.width, "dtype": self.dtype, "modalities": list(self.modalities), "model": self.model,
            "tokens": dict(self.tokens),
        }  # fmt: skip

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Meta:
        """The inverse of `to_dict`."""
        return cls(value["width"], value["dtype"], tuple(value["modalities"]), value["model"], dict(value["tokens"]))


@dataclass(frozen=True, eq=False)
class ItemRows:
    """n items on their way into a store.

    Attributes:
        ids: distinct, not empty.
        vectors: `[n, d]`, finite.
        mass: `[n, M]`, attention share of each modality.
        known: bool `[n]`: training interacted with the item.
        content: uint8 `[n, 16]`, a hash of what the vector was made of.
        titles: for people; "" where there is none.
        tokens: token rows of modalities, of n items each; a store keeps those that its `Meta` names.
    """

    ids: Sequence[str]
    vectors: Tensor
    mass: Tensor
    known: Tensor
    content: Tensor
    titles: Sequence[str]
    tokens: Mapping[str, Tokens]

    def __len__(self) -> int:
        return len(self.ids)


class Ragged(NamedTuple):
    """`values [T, …]`; item i owns rows `offsets[i]:offsets[i + 1]` (int64 `[n + 1]`)."""

    values: Tensor
    offsets: Tensor

    def select(self, rows: Tensor) -> Ragged:
        """The items `rows` (int64 `[m]`, any order, repeats allowed). Its time depends on them alone."""
        begin = self.offsets.index_select(0, rows)
        lengths = self.offsets.index_select(0, rows + 1) - begin
        ends = lengths.cumsum(0)
        at = torch.arange(int(ends[-1]) if len(rows) else 0) + (begin - ends + lengths).repeat_interleave(lengths)
        return Ragged(self.values.index_select(0, at), torch.cat([ends.new_zeros(1), ends]))

    def strings(self) -> list[str]:
        """Of UTF-8 bytes."""
        data, ends = self.values.numpy().tobytes(), self.offsets.tolist()
        return [data[a:b].decode(*UTF8) for a, b in zip(ends[:-1], ends[1:], strict=True)]


@dataclass(frozen=True, eq=False)
class Columns:
    """n items by column: `fixed[name] [n, …]`, and `ragged[name]`."""

    fixed: dict[str, Tensor]
    ragged: dict[str, Ragged]

    def __len__(self) -> int:
        return len(self.fixed["vectors"])

    def select(self, rows: Tensor) -> Columns:
        """The items `rows` (int64 `[m]`, any order, repeats allowed)."""
        return Columns(
            {name: column.index_select(0, rows) for name, column in self.fixed.items()},
            {name: column.select(rows) for name, column in self.ragged.items()},
        )

    @staticmethod
    def concat(parts: Sequence[Columns]) -> Columns:
        """Their items one after another; at least one part."""
        if len(parts) == 1:
            return parts[0]
        ragged = {}
        for name in parts[0].ragged:
            lengths = torch.cat([part.ragged[name].offsets.diff() for part in parts])
            offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
            ragged[name] = Ragged(torch.cat([part.ragged[name].values for part in parts]), offsets)
        return Columns({name: torch.cat([part.fixed[name] for part in parts]) for name in parts[0].fixed}, ragged)

    def tensors(self) -> dict[str, Tensor]:
        """As a file names them."""
        found = dict(self.fixed)
        for name, (values, offsets) in self.ragged.items():
            found |= {name + _VALUES: values, name + _OFFSETS: offsets}
        return found

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> Columns:
        """The inverse of `tensors`."""
        ragged = {
            name.removesuffix(_VALUES): Ragged(values, tensors[name.removesuffix(_VALUES) + _OFFSETS])
            for name, values in tensors.items()
            if name.endswith(_VALUES)
        }
        fixed = {name: x for name, x in tensors.items() if not name.endswith((_VALUES, _OFFSETS))}
        return Columns(fixed, ragged)


def encode(items: ItemRows, meta: Meta) -> Columns:
    """Columns of `items` as the store of `meta` keeps them; ValueError or TypeError says what does not fit.

    int8: each vector over its largest absolute element / 127, rounded to nearest even.
    """
    n = len(items)
    if len(set(items.ids)) != n or not all(isinstance(i, str) and i for i in items.ids):
        raise ValueError("ids must be distinct strings, none empty")
    for name, got, wanted in (
        ("vectors", items.vectors, (n, meta.width)), ("mass", items.mass, (n, len(meta.modalities))),
        ("known", items.known, (n,)), ("content", items.content, (n, CONTENT_BYTES)),
    ):  # fmt: skip
        if tuple(got.shape) != wanted:
            raise ValueError(f"{name} must be {list(wanted)}, got {list(got.shape)}")
    if len(items.titles) != n:
        raise ValueError(f"titles must be {n}, got {len(items.titles)}")
    kept = {name: tokens for name, tokens in items.tokens.items() if name in meta.tokens}
    widths = {name: tokens.values.shape[1] for name, tokens in kept.items()}
    if widths != dict(meta.tokens):
        raise ValueError(f"tokens must be of widths {dict(meta.tokens)}, got {widths}")
    for name, tokens in kept.items():
        _check_tokens(name, tokens, n)
    vectors = items.vectors.detach().float().cpu()
    finite = (vectors.bfloat16() if meta.dtype == "bfloat16" else vectors).isfinite().all(1)
    if not bool(finite.all()):
        first = items.ids[int(finite.int().argmin())]
        raise ValueError(f"vectors must be finite in {meta.dtype}, that of item {first!r} is not")
    fixed = {
        "vectors": vectors.to(DTYPES[meta.dtype]) if meta.dtype != "int8" else vectors,
        "mass": items.mass.detach().cpu().to(torch.float16),
        "known": items.known.cpu().bool(),
        "content": items.content.cpu().to(torch.uint8),
    }
    if meta.dtype == "int8":
        scales = vectors.abs().amax(1) / 127 if meta.width else vectors.new_zeros(n)
        # The reciprocal of a smaller one than this is not finite.
        scales = torch.where(scales > torch.finfo(torch.float32).tiny, scales, 1.0)
        fixed |= {"vectors": (vectors / scales.unsqueeze(1)).round().to(torch.int8), "scales": scales}
    ragged = {"id": ragged_strings(items.ids), "title": ragged_strings(items.titles)}
    for name, tokens in kept.items():
        values, offsets, kind = (t.detach().cpu() for t in tokens)
        ragged[f"tokens.{name}"] = Ragged(values.to(torch.bfloat16), offsets)
        ragged[f"kinds.{name}"] = Ragged(kind.to(torch.int64), offsets)
    return Columns(fixed, ragged)


def _check_tokens(name: str, tokens: Tokens, n: int) -> None:
    values, offsets, kind = tokens
    if offsets.shape != (n + 1,) or offsets.dtype != torch.int64:
        raise ValueError(f"tokens[{name!r}] needs offsets int64 [{n + 1}], got {offsets.dtype} {list(offsets.shape)}")
    ends = (int(offsets[0]), int(offsets[-1]))
    if ends != (0, len(values)) or len(kind) != len(values) or bool((offsets.diff() < 0).any()):
        raise ValueError(
            f"tokens[{name!r}] needs offsets that rise from 0 to its {len(values)} values and a kind for each, got "
            f"offsets from {ends[0]} to {ends[1]} and {len(kind)} kinds"
        )


def ragged_strings(texts: Sequence[str]) -> Ragged:
    """Their UTF-8 bytes."""
    data = [text.encode(*UTF8) for text in texts]
    offsets = torch.zeros(len(data) + 1, dtype=torch.int64)
    torch.cumsum(torch.tensor([len(one) for one in data], dtype=torch.int64), 0, out=offsets[1:])
    return Ragged(torch.from_numpy(np.frombuffer(b"".join(data), np.uint8).copy()), offsets)


class Column(NamedTuple):
    """A tensor of a file that is written in parts: `parts` gives its bytes in order."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Callable[[], Iterable[Tensor]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Column]:
    """Tensors that are there at once, as columns."""

    def column(x: Tensor) -> Column:
        return Column(x.dtype, tuple(x.shape), lambda: [x])

    return {name: column(x) for name, x in tensors.items()}


def write_file(path: Path, columns: Mapping[str, Column]) -> list[int]:
    """Writes a safetensors file whose tensors need not fit memory, and gives the CRC-32 of each `CHUNK` bytes of it.

    The format's own writer wants all tensors at once; this one asks for them part by part.
    """
    header, end = {}, 0
    columns = dict(_aligned(columns))
    for name, column in columns.items():
        size = column.nbytes
        header[name] = {"dtype": _NAMES[column.dtype], "shape": column.shape, "data_offsets": (end, end + size)}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGN)
    sums = _Checksums()
    with open(path, "xb") as file:
        for data in chain((len(text).to_bytes(8, "little"), text), _bytes_of(columns)):
            file.write(data)
            sums.add(data)
        if file.tell() != 8 + len(text) + end:
            raise ValueError(f"{path.name}: columns gave {file.tell() - 8 - len(text)} bytes, announced {end}")
    return sums.close()


def _aligned(columns: Mapping[str, Column]) -> Iterator[tuple[str, Column]]:
    """Each behind as many bytes as let it begin where a cache line does; the format has no gaps."""
    end = 0
    for name, column in columns.items():
        if end % _ALIGN:
            filler = torch.zeros(-end % _ALIGN, dtype=torch.uint8)
            yield from whole({f"{_PADDING}{name}": filler}).items()
            end += len(filler)
        yield name, column
        end += column.nbytes


def _bytes_of(columns: Mapping[str, Column]) -> Iterator[bytes | memoryview]:
    for column in columns.values():
        for part in column.parts():
            if part.numel():
                yield part.contiguous().view(-1).view(torch.uint8).numpy().data


class _Checksums:
    def __init__(self) -> None:
        self.done: list[int] = []
        self.now, self.filled = 0, 0

    def add(self, data: bytes | memoryview) -> None:
        data = memoryview(data)
        while len(data):
            part = data[: CHUNK - self.filled]
            self.now, self.filled = zlib.crc32(part, self.now), self.filled + len(part)
            data = data[len(part) :]
            if self.filled == CHUNK:
                self.done.append(self.now)
                self.now, self.filled = 0, 0

    def close(self) -> list[int]:
        return [*self.done, self.now] if self.filled else self.done


def map_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, mapped, not read. The mapping is private: what is written to them stays in memory, page by
    page, and nobody else sees it."""
    from safetensors import safe_open

    with safe_open(os.fspath(path), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys() if not name.startswith(_PADDING)}
