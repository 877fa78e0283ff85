"""No source file has a way to run what a file says."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
# What reads code out of a file, or of what came from one.
CALLS = {"eval", "exec", "compile", "__import__"}
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def ways_to_run_a_file(tree: ast.AST) -> list[str]:
    """Calls of eval and its like, modules of pickles, `torch.load` that may unpickle, `np.load(allow_pickle=True)`,
    `yaml.load`; transformers' `trust_remote_code` and `use_safetensors=False`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + (
                [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            )
            found += [name for name in names if name.split(".")[0] in MODULES]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given_ = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if name in CALLS:
            found.append(name)
        if name.endswith("yaml.load") or (name == "torch.load" and given_.get("weights_only") != "True"):
            found.append(name)
        if name in ("np.load", "numpy.load", "np.lib.format.read_array", "np.fromregex"):
            found += [name] if given_.get("allow_pickle", "False") != "False" else []
        found += [f"{name}({key}=…)" for key in ("trust_remote_code", "allow_pickle") if given_.get(key) == "True"]
        found += [f"{name}(use_safetensors=…)"] if given_.get("use_safetensors") == "False" else []
    return found


def test_no_source_runs_what_a_file_says() -> None:
    files = [path for folder in ("mmrec_kernels", "python_api", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    found = {path: ways_to_run_a_file(ast.parse(path.read_text(encoding="utf-8"))) for path in files}
    assert {str(path.relative_to(ROOT)): ways for path, ways in found.items() if ways} == {}


@pytest.mark.parametrize(
    "code",
    ["eval(text)", "exec(text)", "import pickle", "from pickle import load", "torch.load(path)", "yaml.load(text)",
     "torch.load(path, weights_only=False)", "np.load(path, allow_pickle=True)",
     "AutoModel.from_pretrained(x, trust_remote_code=True)"],
)  # fmt: skip
def test_each_way_is_seen(code: str) -> None:
    assert ways_to_run_a_file(ast.parse(code))
    assert not ways_to_run_a_file(
        ast.parse("model.eval(); np.load(p, allow_pickle=False); re.compile(x); ast.literal_eval(x)")
    )
