from __future__ import annotations

import subprocess
import sys


def test_fusion_needs_torch_numpy_and_the_ops_only() -> None:
    code = (
        "import sys, mmrec.fusion\n"
        "heavy = {'transformers', 'peft', 'bitsandbytes', 'polars', 'PIL', 'safetensors', 'rich', 'matplotlib'}\n"
        "inside = {'mmrec.recommender', 'mmrec.evaluation', 'mmrec.adaptation', 'mmrec.llm'}\n"
        "print(sorted((heavy | inside) & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
