"""docs/troubleshooting.md quotes what the code says: every heading occurs in the sources, or is provoked here."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable

import pytest
import torch

from mmrec_kernels import Segment, cross_modal_attention, info_nce
from paths import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
HEADINGS = re.findall(r"^### `(.*)`$", PAGE, re.M)
ANY = "…"


def python_messages(text: str) -> list[str]:
    """All strings of a module, … in the place of what an f-string fills in."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else ANY for part in node.values)
            found.append("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


def cpp_messages(text: str) -> list[str]:
    """The literals of each check, … in the place of what stands between them."""
    checks = re.findall(r"MMREC_CHECK\((.*?)\);", text, re.S)
    return [ANY.join(re.findall(r'"((?:[^"\\]|\\.)*)"', check)) for check in checks]


def sources() -> list[str]:
    paths = [*(ROOT / "mmrec_kernels").rglob("*.py"), *(ROOT / "python_api").rglob("*.py"), ROOT / "setup.py"]
    found = [message for path in paths for message in python_messages(path.read_text(encoding="utf-8"))]
    found += [message for path in (ROOT / "csrc").rglob("*.cpp") for message in cpp_messages(path.read_text())]
    return [*found, *(ROOT / "Makefile").read_text(encoding="utf-8").splitlines()]


MESSAGES = sources()


def occurs(heading: str) -> bool:
    """Whether one message has the heading's words, in order; names and numbers may stand where the heading has …."""
    parts = [part.strip() for part in heading.split(ANY) if part.strip(" :;.")]
    pattern = re.compile(".*".join(map(re.escape, parts)), re.S)
    return any(pattern.search(message) for message in MESSAGES)


def _half() -> None:
    info_nce(torch.zeros(2, 3, dtype=torch.float16), torch.zeros(2, 3, dtype=torch.float16))


def _mixed() -> None:
    info_nce(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bfloat16))


def _twice() -> None:
    query = torch.randn(2, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(info_nce(query, torch.randn(2, 3)), query, create_graph=True)
    grad.sum().backward()


def _functional_grad() -> None:
    torch.func.grad(lambda query: info_nce(query, torch.randn(2, 3)))(torch.randn(2, 3))


def _vmap() -> None:
    offsets = torch.tensor([0, 2])
    segment = Segment(torch.randn(2, 1, 4), torch.randn(2, 1, 4), offsets)
    torch.func.vmap(lambda query: cross_modal_attention(query, [segment], offsets))(torch.randn(3, 2, 1, 4))


# What torch says, and what our own words are put together to.
PROVOKED: dict[str, Callable[[], None]] = {
    "query must be float32 or bfloat16 or float64, got float16": _half,
    "key must be float32, got bfloat16": _mixed,
    "trying to differentiate twice a function that was marked with @once_differentiable": _twice,
    "In order to use an autograd.Function with functorch transforms …": _functional_grad,
    "Batching rule not implemented for mmrec::_attention_forward …": _vmap,
}


@pytest.mark.parametrize("heading", [h for h in HEADINGS if h not in PROVOKED])
def test_message_is_in_the_code(heading):
    assert len(heading.replace(ANY, "").strip()) > 8, "too short to be found by anybody"
    assert occurs(heading)


@pytest.mark.parametrize("heading", PROVOKED)
def test_message_comes(heading):
    assert heading in HEADINGS
    with pytest.raises((TypeError, ValueError, RuntimeError), match=re.escape(heading.strip(f"{ANY} "))):
        PROVOKED[heading]()


def test_words_that_nobody_says_are_seen():
    assert occurs("… must have shape …, got …") and not occurs("… must have form …, got …")
    assert not occurs("MMREC_CPU_ISA must be base, avx2, avx512 or avx512_vnni, got …")
    assert len(HEADINGS) > 60 and len(set(HEADINGS)) == len(HEADINGS)
