"""Programs that the packaging tests start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# Safe path: neither the checkout nor a script's folder may shadow the wheel.
SAFE = ("-P",) if sys.version_info >= (3, 11) else ("-I",)


def run(*command: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """What it printed; an AssertionError with that if it failed."""
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def processor_seconds() -> float:
    """What finished programs have used: other load on the machine does not count, as it would by the clock."""
    times = os.times()
    return times.children_user + times.children_system
