"""docs/survey.md names what exists: every test file, and every dotted name."""

from __future__ import annotations

import importlib
import re

import pytest

from paths import ROOT

PAGE = (ROOT / "docs" / "survey.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`(tests/[\w/]+\.py)`", PAGE))))
def test_the_test_is_there(path):
    assert (ROOT / path).is_file()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(mmrec(?:\.\w+)+)", PAGE))))
def test_the_component_is_there(name):
    module, _, attribute = name.rpartition(".")
    assert hasattr(importlib.import_module(module), attribute)


def test_there_are_enough_of_them_to_see():
    assert len(re.findall(r"`tests/", PAGE)) > 20 and len(re.findall(r"`mmrec\.", PAGE)) > 15
