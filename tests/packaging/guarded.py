"""`python guarded.py SCRIPT`: runs it where every connection and every new process is refused.

Afterwards no other library of the package than those named by the variable MMREC_MAPPED may have been opened.
"""

from __future__ import annotations

import os
import re
import runpy
import sys
from pathlib import Path

CONNECTIONS = ("socket.connect", "socket.getaddrinfo")
PROCESSES = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork")
opened: set[str] = set()


def hook(event: str, arguments: tuple[object, ...]) -> None:
    if event in CONNECTIONS + PROCESSES:
        raise PermissionError(f"{event} {arguments[:2]}")
    if event in ("ctypes.dlopen", "open") and "mmrec_kernels" in str(arguments[0]):
        opened.add(Path(str(arguments[0])).name)


sys.addaudithook(hook)
runpy.run_path(sys.argv[1], run_name="__main__")
mapped = set(re.findall(r"mmrec_kernels/(_C\w*\.so)", Path("/proc/self/maps").read_text()))
assert mapped == set(os.environ["MMREC_MAPPED"].split()), mapped
assert {name for name in opened if name.endswith(".so")} <= mapped, opened
print("guarded")
