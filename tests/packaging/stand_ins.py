"""Empty libraries in the place of those that a torch needs and a machine lacks: `python stand_ins.py TORCH FOLDER`.

The default torch of Linux needs NVIDIA's libraries to be loaded, even where there is no GPU: gigabytes, for calls that
all fail. This writes shared objects of the same names and symbol versions to FOLDER, whose functions return an error;
with FOLDER in LD_LIBRARY_PATH, torch loads and computes on the CPU. Needs binutils and a C++ compiler.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

# "No device" to cudart and the driver, and no library's success. What is read as text is a text.
BODIES = "void* {name}() {{ return (void*)100; }}", 'const char* {name}() {{ return "a stand-in"; }}'


def listing(*command: str | Path) -> str:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True).stdout


def missing_libraries(libraries: list[Path]) -> list[str]:
    """What the libraries need and neither they nor the system provide."""
    needed = {name for path in libraries for name in re.findall(r"NEEDED +(\S+)", listing("objdump", "-p", path))}
    system = listing("/sbin/ldconfig", "-p")
    return sorted(n for n in needed - {path.name for path in libraries} if f"\t{n} " not in system)


def wanted_symbols(libraries: list[Path], missing: list[str]) -> dict[str, dict[str, set[str]]]:
    """Library to version ("" for none) to names. Names without a version go to the first library: any serves."""
    wanted: dict[str, dict[str, set[str]]] = {name: {} for name in missing}
    plain: set[str] = set()
    defined: set[str] = set()
    for path in libraries:
        headers = listing("objdump", "-p", path)
        owners: dict[str, str] = {}
        for owner, lines in re.findall(r"required from (\S+):\n((?:    0x.*\n)+)", headers):
            owners |= {line.split()[-1]: owner for line in lines.splitlines()}
        for line in listing("nm", "-D", path).splitlines():
            kind, symbol = line[17:18], line[19:]
            name, _, version = symbol.partition("@")
            if kind not in "Uvw":
                defined.add(name)
            elif kind == "U" and not version:
                plain.add(name)
            elif kind == "U" and owners.get(version.strip("@")) in wanted:
                wanted[owners[version.strip("@")]].setdefault(version.strip("@"), set()).add(name)
    interpreter = re.compile(r"_?Py[A-Z_]")
    wanted[missing[0]][""] = {name for name in plain - defined if not interpreter.match(name)}
    return wanted


def write(folder: Path, library: str, versions: dict[str, set[str]]) -> None:
    """A shared object of the name `library`, with these names under these versions."""
    source, script = folder / f"{library}.cpp", folder / f"{library}.map"
    names = sorted(set().union(*versions.values()))
    bodies = [BODIES["Error" in n and ("String" in n or "Name" in n)].format(name=n) for n in names]
    source.write_text('extern "C" {\n' + "\n".join(bodies) + "\n}\n")
    nodes = [f"{v} {{ {' '.join(f'{name};' for name in sorted(versions[v]))} }};" for v in sorted(versions) if v]
    script.write_text("\n".join(nodes) + "\n")
    versioned = [f"-Wl,--version-script={script}"] if nodes else []
    compiler = os.environ.get("CXX", "c++")
    flags = ["-shared", "-fPIC", "-fno-builtin", "-w", f"-Wl,-soname,{library}", *versioned]
    subprocess.run([compiler, *flags, str(source), "-o", str(folder / library)], check=True)


def stand_ins(torch_folder: Path, folder: Path) -> list[str]:
    """Write what `torch_folder` lacks; its names, none if nothing is missing."""
    libraries = sorted(p for p in (torch_folder / "lib").glob("*.so*") if p.is_file())
    bundled = sorted(torch_folder.parent.glob("torch.libs/*.so*"))
    missing = missing_libraries([*libraries, *bundled])
    folder.mkdir(parents=True, exist_ok=True)
    if missing:
        for library, versions in wanted_symbols([*libraries, *bundled], missing).items():
            write(folder, library, versions)
    return missing


if __name__ == "__main__":
    print("\n".join(stand_ins(Path(sys.argv[1]), Path(sys.argv[2]))))
