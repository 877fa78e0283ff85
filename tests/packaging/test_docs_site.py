"""The site builds without a warning, asks nobody for anything when it is read, and shows what the pages mean."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mmrec
import mmrec_kernels
from paths import ROOT

yaml = pytest.importorskip("yaml")
OPS = ("attention", "infonce", "routing", "nf4", "retrieval")
# What each op's page has a heading for; one of several where the pages have words of their own.
SECTIONS = (
    ("Formula", "Formulas"),
    ("Arguments", "Shapes and dtypes"),
    ("When to use it",),
    ("When not",),
    ("Limits",),
    ("Speed", "Measured", "Measured on a CPU"),
)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_there(site):
    names = {path.stem for path in (ROOT / "docs").glob("*.md")} | {"index", "changelog", "contributing", "security"}
    assert names <= {path.stem for path in site.glob("*.html")}


def test_nothing_is_fetched_when_it_is_read(site):
    for page in [*site.glob("*.html"), *site.glob("assets/stylesheets/*.css")]:
        text = page.read_text(encoding="utf-8")
        fetched = re.findall(r"<(?:script|img|iframe)[^>]+src=\"?([^\" >]+)", text)
        fetched += re.findall(r"<link[^>]+rel=\"?(?:stylesheet|preconnect|icon|preload)[^>]*href=\"?([^\" >]+)", text)
        fetched += re.findall(r"(?:url\(|@import )[\"']?(https?:[^\"')]+)", text)
        outside = [address for address in fetched if re.match(r"(https?:)?//", address)]
        assert not outside, (page.name, outside)


def test_lists_and_tables_are_shown_as_such(site):
    """A list without a blank line before it is one on GitHub, and a paragraph with hyphens here."""
    for page in site.glob("*.html"):
        article = re.sub(r"<pre.*?</pre>", "", page.read_text(encoding="utf-8").partition("<article")[2], flags=re.S)
        raw = re.findall(r"^\s*(?:- |\d{1,2}\. |\|).*$|```", article.partition("</article")[0], re.M)
        assert not raw, (page.name, raw[:3])


def test_root_pages_are_not_written_twice(site):
    for name in ("index", "changelog", "contributing", "security"):
        links = re.findall(r'href="([^"#]+)', (site / f"{name}.html").read_text(encoding="utf-8"))
        assert "quickstart.html" in links and not [link for link in links if link.startswith("docs/")]
    assert "How one request flows" in (site / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("op", OPS)
def test_op_pages_answer_the_same_questions(op):
    headings = re.findall(r"^## (.*)$", (ROOT / "docs" / f"{op}.md").read_text(encoding="utf-8"), re.M)
    assert all(any(name in headings for name in names) for names in SECTIONS), headings


def test_every_public_name_is_in_the_reference():
    listed = re.findall(r"^::: mmrec_kernels\.(\w+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.M)
    assert sorted(listed) == sorted(mmrec_kernels.__all__)


def test_the_reference_of_the_recommender_names_public_names():
    listed = re.findall(r"^::: mmrec\.(\w+)\.(\w+)$", (ROOT / "docs" / "api-mmrec.md").read_text(), re.M)
    assert len(listed) > 40
    for wing, name in listed:
        module = ast.parse((ROOT / "python_api" / "mmrec" / wing / "__init__.py").read_text(encoding="utf-8"))
        (public,) = (n.value for n in module.body if isinstance(n, ast.Assign) and n.targets[0].id == "__all__")
        assert name in ast.literal_eval(public), f"mmrec.{wing}.{name}"


def test_versions_agree():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (version,) = re.findall(r'^version = "(.*)"$', project, re.M)
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert version == mmrec.__version__ == mmrec_kernels.__version__ and version in changes
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys() and citation["cff-version"] == "1.2.0"
    assert citation["version"] == version and f'license = "{citation["license"]}"' in project
