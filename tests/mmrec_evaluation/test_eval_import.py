"""Importing the wing costs numpy and nothing else."""

import subprocess
import sys


def test_import_is_light():
    heavy = "torch, polars, rich, matplotlib, transformers, PIL, mmrec_kernels"
    code = f"import sys, mmrec.evaluation; print([m for m in '{heavy}'.split(', ') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_exists():
    import mmrec.evaluation as wing

    assert wing.__all__ == sorted(wing.__all__, key=lambda name: (not name.isupper(), name[0].islower(), name))
    assert all(hasattr(wing, name) for name in wing.__all__)
