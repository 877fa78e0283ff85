"""The package laid out for Hugging Face's `kernels`, loaded as it loads it, and used through it.

`kernels` itself is installed apart, by the test that needs it: where it can be imported, bitsandbytes asks the hub for
a kernel of its own.
"""

from __future__ import annotations

import ast
import json
import os
import platform
import re
import sys
from pathlib import Path

import pytest
from subprocesses import SAFE, run

from mmrec_kernels import hub, library
from paths import ROOT

# What `kernels` does, without its choice of a folder.
LOAD = """
import importlib.util, json, pathlib, sys
variant = pathlib.Path(sys.argv[1])
name = json.loads((variant / "metadata.json").read_text())["id"]
spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
kernel = sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernel)
"""
COMPILED = pytest.mark.skipif(not library.compiled_libraries()[0].loaded, reason="_C is not built")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "repository"
    hub.lay_out(folder)
    return folder


def compiled(repository: Path) -> Path:
    return repository / "build" / f"torch-stable-abi210-cpu-{platform.machine()}-linux"


def load(variant: Path, code: str) -> str:
    """Prints of `code` after the variant was loaded, with the checkout importable too."""
    path = os.pathsep.join((str(ROOT), str(ROOT / "python_api")))
    return run(sys.executable, "-c", LOAD + code, variant, env={**os.environ, "PYTHONPATH": path}, cwd=variant)


@COMPILED
def test_folders_are_those_of_torch_builds(repository):
    folders = {path.name: path for path in (repository / "build").iterdir()}
    version = ROOT / "mmrec_kernels/_C_cuda.version"
    cuda = {f"torch-stable-abi210-cu{''.join(version.read_text().split('.')[:2])}-{platform.machine()}-linux"}
    expected = {"torch-cpu", "torch-cuda", compiled(repository).name} | (cuda if version.exists() else set())
    assert set(folders) == expected
    for name, path in folders.items():
        files = {file.name for file in path.rglob("*") if file.suffix in (".so", ".version")}
        both = {"_C.so", "_C_cuda.so", "_C_cuda.version"}
        assert files == (both if "-cu1" in name else {"_C.so"} if "abi210-cpu" in name else set())
        metadata = json.loads((path / "metadata.json").read_text())
        assert metadata["backend"]["type"] == ("cpu" if "cpu" in name else "cuda")
        assert metadata["id"].isidentifier() and metadata["name"] == "mmrec-kernels" and metadata["version"] == 0
    assert len({json.loads((p / "metadata.json").read_text())["id"] for p in folders.values()}) == len(folders)


def test_holds_the_package_as_it_is(repository):
    """Imports are relative, or of the standard library, torch and triton: the hub's rule."""
    for variant in (repository / "build").iterdir():
        for path in (variant / "mmrec_kernels").rglob("*.py"):
            relative = path.relative_to(variant)
            assert path.read_bytes() == (ROOT / relative).read_bytes()
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and node.level == 0:
                    names = [node.module]
                allowed = sys.stdlib_module_names | {"torch", "triton"}
                assert {name.split(".")[0] for name in names} <= allowed, (relative, names)


def test_nothing_is_overwritten(repository, tmp_path, capsys):
    with pytest.raises(ValueError, match="folder must be empty or not be there"):
        hub.lay_out(repository)
    with pytest.raises(SystemExit):
        hub.main([str(repository)])
    assert "must be empty" in capsys.readouterr().err
    assert hub.main([str(tmp_path / "new")]) == 0
    assert capsys.readouterr().out.count("torch-") == len(hub.variants())


def test_a_change_changes_the_name(repository):
    variant = next((repository / "build").iterdir())
    before = hub._digest(variant)
    (variant / "note.py").write_text("")
    assert hub._digest(variant) != before
    (variant / "note.py").unlink()
    assert hub._digest(variant) == before


@COMPILED
def test_loads_by_itself(repository):
    code = "print(kernel.layers.__name__, 'mmrec_kernels' in sys.modules, sorted(kernel.__all__))"
    printed = load(compiled(repository), code)
    assert re.match(r"_mmrec_kernels_cpu_\w+\.mmrec_kernels\.layers False", printed)
    assert "'info_nce'" in printed and "'layers'" in printed


def test_without_libraries_the_references_serve(repository):
    code = "print({p.name for p in sys.modules[name + '.mmrec_kernels.library'].providers() if p.device == 'cpu'})"
    assert load(repository / "build/torch-cpu", code).strip() == "{'reference'}"


def test_a_second_copy_in_a_process(repository):
    """The package first: the kernel takes its functions. The kernel first: the package says what to do."""
    variant = repository / "build/torch-cpu"
    first = "import mmrec_kernels\n"
    printed = run(
        sys.executable, "-c", first + LOAD + "print(kernel.top_k is mmrec_kernels.top_k)", variant,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert printed.strip() == "True"
    second = "try:\n    import mmrec_kernels\nexcept ImportError as error:\n    print(error)"
    printed = load(variant, second)
    assert "one copy of mmrec_kernels" in printed and str(variant / "mmrec_kernels/schemas.py") in printed


def test_another_version_is_refused(repository):
    changed = "import mmrec_kernels\nmmrec_kernels.__version__ = '9.9'\n"
    with pytest.raises(AssertionError, match="this kernel is mmrec_kernels .*, and 9.9 is imported already"):
        run(
            sys.executable, "-c", changed + LOAD, repository / "build/torch-cpu",
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip


@pytest.mark.wheel
def test_kernels_replaces_layers(environment, tmp_path):
    """In an environment without bitsandbytes, offline, from the wheel's own files."""
    pip = (environment.python, "-m", "pip", "install", "-q", "--disable-pip-version-check")
    run(*pip, "-c", ROOT / "constraints.txt", "--target", tmp_path / "more", "kernels")
    run(environment.python, *SAFE, "-m", "mmrec_kernels.hub", tmp_path / "repository", cwd=tmp_path)
    variables = {**os.environ, "PYTHONPATH": str(tmp_path / "more"), "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    for which in ("copy", "shared"):
        script = (ROOT / "tests/packaging/hub_kernels.py", tmp_path / "repository", which)
        assert "every layer" in run(environment.python, *SAFE, *script, cwd=tmp_path, env=variables)
