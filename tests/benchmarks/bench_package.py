"""Makes `mmrec_kernels.benchmarks` importable in a tree that is not installed; an install maps the folder by itself."""

import importlib.util
import sys
from pathlib import Path

NAME = "mmrec_kernels.benchmarks"
FOLDER = Path(__file__).parents[2] / "benchmarks"

if NAME not in sys.modules and importlib.util.find_spec(NAME) is None:
    import mmrec_kernels

    spec = importlib.util.spec_from_file_location(
        NAME, FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    package = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = package
    spec.loader.exec_module(package)
    mmrec_kernels.benchmarks = package
