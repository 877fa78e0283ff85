"""The pages that people read, and the blocks in them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from paths import ROOT

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


class Block(NamedTuple):
    """A block of a page: its language is what its fence says, "" for a fence without, "indented" for none."""

    where: str
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    """All fenced and indented blocks, in order."""
    found: list[Block] = []
    language: str | None = None
    start, lines, previous = 0, [], ""
    for number, line in enumerate([*page.read_text(encoding="utf-8").splitlines(), "end"], start=1):
        if language == "indented" and line.strip() and not line.startswith("    "):
            found.append(_block(page, start, language, lines))
            language = None
        fence = re.match(r"```(.*)", line)
        if language is None:
            if fence:
                language, start, lines = fence[1].strip(), number, []
            elif line.startswith("    ") and not previous.strip():
                language, start, lines = "indented", number, [line]
        elif fence and language != "indented":
            found.append(_block(page, start, language, lines))
            language = None
        else:
            lines.append(line)
        previous = line
    assert language is None, f"{page.name}:{start} is not closed"
    return found


def _block(page: Path, start: int, language: str, lines: list[str]) -> Block:
    text = "\n".join(line.removeprefix("    ") if language == "indented" else line for line in lines)
    return Block(f"{page.name}:{start}", language, text.rstrip() + "\n")


BLOCKS = [block for page in PAGES for block in blocks(page)]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
