"""Command lines run in this process, and what they did."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Mmrec", "Outcome", "read_json", "torchrun"]


@dataclass
class Outcome:
    """What one command line did."""

    code: int
    out: str
    err: str

    def failed(self, *words: str, code: int = 1) -> Outcome:
        """Checks that it failed with exactly one line on stderr, which holds all ``words``."""
        assert self.code == code, (self.code, self.out, self.err)
        assert self.err.startswith("mmrec: error: ") and self.err.count("\n") == 1 and self.err.endswith("\n"), self.err
        assert all(word in self.err for word in words), self.err
        return self

    def succeeded(self) -> Outcome:
        """Checks that it ended well."""
        assert self.code == 0, (self.code, self.out, self.err)
        return self


Mmrec = Callable[..., Outcome]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; refuses NaN, which is no JSON."""

    def refuse(text: str) -> None:
        raise AssertionError(f"{path} holds {text}")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def torchrun(tmp_path: Path, ranks: int, *arguments: object, before: str = "") -> subprocess.CompletedProcess:
    """Runs a command line in so many processes, each of which executes ``before`` first."""
    script = tmp_path / "mmrec_under_torchrun.py"
    script.write_text(f"import sys\nfrom mmrec.cli import run\n{before}\nsys.exit(run(sys.argv[1:]))\n")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "--"]
    return subprocess.run(
        [*launcher, str(script), *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False
    )
