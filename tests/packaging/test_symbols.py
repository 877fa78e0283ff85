"""ISA objects keep to themselves; a weak symbol compiled for AVX-512 kept by the linker crashes other machines."""

from __future__ import annotations

import subprocess

import pytest

from paths import ROOT

OBJECTS = sorted((ROOT / "build/cmake/CMakeFiles").glob("mmrec_*.dir/**/*.o"))


@pytest.mark.skipif(not OBJECTS, reason="no objects of an in-tree build (pip install -e .)")
def test_isa_objects_define_no_weak_or_unique_symbol():
    assert len(OBJECTS) % len({o.relative_to(ROOT / "build/cmake/CMakeFiles").parts[0] for o in OBJECTS}) == 0
    for path in OBJECTS:
        listing = subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True, check=True).stdout
        isa = path.relative_to(ROOT / "build/cmake/CMakeFiles").parts[0].removeprefix("mmrec_").removesuffix(".dir")
        for line in listing.splitlines():
            kind, name = line[17:18], line[19:]
            assert kind not in "WVu", (path.name, line)
            if kind == "T":
                assert name.startswith(f"mmrec::{isa}::"), (path.name, line)
