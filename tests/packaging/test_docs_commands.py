"""Commands of the pages are taken by the real parsers: they exist, their options exist, their values parse.

Nothing is run. In a block of commands (sh) every line has to be one that this module knows; in other blocks that are no
code those lines are held that begin as one; in running text, what stands in backticks is held to names and options.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import shlex
from pathlib import Path

import pytest
import typer
from docs_pages import BLOCKS, PAGES, prose

from mmrec import cli
from paths import ROOT

GROUP = typer.main.get_command(cli.app)
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PINS = (ROOT / "constraints.txt").read_text(encoding="utf-8")


def words_of(line: str) -> list[str]:
    """The words of a command, optional ones too, without what stands before it: variables, a launcher of processes."""
    line = re.sub(r"\$\(which (\w+)\)", r"\1", line)
    words = shlex.split(re.sub(r"\[(--[^\]]*)\]", r"\1", line), comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    return words[words.index("--") + 1 :] if words[:1] == ["torchrun"] and "--" in words else words


def check(words: list[str]) -> None:
    """An AssertionError or the parser's own error where a command would not be taken."""
    if words[:2] == ["python", "-m"]:
        check_module(words[2], words[3:])
    elif words[0] == "pytest":
        check_pytest(words[1:])
    else:
        COMMANDS[words[0]](words[1:])


def check_mmrec(words: list[str]) -> None:
    assert words, "mmrec needs a command"
    assert words[0] in GROUP.commands, f"there is no mmrec {words[0]}"
    context = GROUP.commands[words[0]].make_context(words[0], words[1:], obj={})
    check_settings(words[0], context.params.get("settings") or (), context.params)


def check_settings(command: str, settings: tuple[str, ...], params: dict[str, object]) -> None:
    """`--set NAME=VALUE`: names of fields, and for experiments values too."""
    if command == "experiment" and params["name"] is not None:
        from mmrec.commands.experiments import EXPERIMENTS
        from mmrec.commands.typed import parse_settings

        kind = EXPERIMENTS[str(params["name"])].load()[1]
        known = {field.name: getattr(kind(), field.name) for field in dataclasses.fields(kind)}
        parse_settings(settings, known, command)
    elif command == "peers":
        from mmrec.commands import peers

        peers._parsed(settings, list(params["model"] or peers.NAMES))
    else:
        from mmrec.recommender.config import RecommenderConfig

        known = {field.name for field in dataclasses.fields(RecommenderConfig)}
        assert {entry.partition("=")[0] for entry in settings} <= known, f"{command} --set {settings}"


def check_module(module: str, words: list[str]) -> None:
    if module == "mmrec_kernels.benchmarks":
        check_benchmark(words)
    elif module == "pytest":
        check_pytest(words)
    elif module == "cProfile":
        check_mmrec(words[words.index("mmrec") + 1 :])
    elif module == "mmrec.llm.tuning_cost":
        importlib.import_module(module).parser().parse_args(words)
    else:
        assert module in ("mmrec_kernels", "http.server", "venv"), f"python -m {module} is not known here"


def check_benchmark(words: list[str]) -> None:
    """Everything but the measuring, as if there were a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tests/benchmarks")
        importlib.import_module("bench_package")
        main = importlib.import_module("mmrec_kernels.benchmarks.__main__")
        patch.setattr(main.torch.cuda, "is_available", lambda: True)
        patch.setattr(main.torch, "set_num_threads", lambda n: None)
        patch.setattr(main.measure, "measure", lambda *args: None)
        patch.setattr(main.measure, "path_in", lambda *args: Path("rows.json"))
        assert main.main(words) == 0


def check_pytest(words: list[str]) -> None:
    for i, word in enumerate(words):
        if word == "-m":
            marker = words[i + 1].removeprefix("not ")
            assert f'"{marker}:' in PROJECT, f"there is no marker {marker}"
        elif "/" in word:
            assert (ROOT / word).exists(), f"there is no {word}"
        elif word == "-k":
            files = [ROOT / other for other in words if other.endswith(".py")]
            assert all(words[i + 1] in file.read_text(encoding="utf-8") for file in files), words[i + 1]


def check_make(words: list[str]) -> None:
    for word in words:
        name, equals, _ = word.partition("=")
        if equals:
            assert f"$({name})" in MAKEFILE or f"\n{name} ?=" in MAKEFILE, f"make knows no {name}"
        else:
            assert re.search(rf"^{name}:", MAKEFILE, re.M), f"there is no target {name}"


def check_pip(words: list[str]) -> None:
    if words[0] != "install":
        return
    for word in words[1:]:
        if word.startswith("-") or word in (".", "constraints.txt"):
            continue
        name, extras = re.fullmatch(r"([\w.-]+)(?:\[([\w,]+)\])?(?:[=<>]=?[\w.]+)?", word).groups()
        for extra in (extras or "").split(",") if name in (".", "mmrec-kernels") and extras else ():
            assert re.search(rf"^{extra} = \[", PROJECT, re.M), f"there is no extra {extra}"
        known = f"\n{name}==" in PINS or f'"{name}' in PROJECT or name in MAKEFILE or name in (".", "mmrec-kernels")
        assert known, f"nothing here needs {name}"


def check_curl(words: list[str]) -> None:
    """What is sent to the server has to fit what it takes."""
    from mmrec.recommender.serving.schemas import ItemsIn, RecommendIn, RemoveIn

    takes = {"/recommend": RecommendIn, "/items": ItemsIn, "/items/remove": RemoveIn}
    path = re.search(r"localhost:8000(/[^?\s]*)", " ".join(words))
    assert path, words
    if "-d" in words:
        takes[path[1]].model_validate_json(words[words.index("-d") + 1])
        assert "application/json" in " ".join(words)
    else:
        assert path[1] in ("/", "/health", "/metrics", "/items", "/docs"), path[1]


def check_ruff(words: list[str]) -> None:
    assert words[0] in ("check", "format")


COMMANDS = {
    "mmrec": check_mmrec,
    "make": check_make,
    "pip": check_pip,
    "curl": check_curl,
    "ruff": check_ruff,
    "mypy": lambda words: None,
    "git": lambda words: None,
    "export": lambda words: None,
    ".": lambda words: None,
}
KNOWN = {*COMMANDS, "python", "pytest", "torchrun"} - {"."}


def lines_of(text: str) -> list[str]:
    return [line.strip() for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def is_command(line: str) -> bool:
    first = re.sub(r"^([A-Z_]+=\S* )+", "", line).split(maxsplit=1)
    return len(first) == 2 and first[0] in KNOWN and re.match(r"[-a-z.$]", first[1]) is not None


LINES = [
    pytest.param(line, id=f"{block.where}-{line[:60]}")
    for block in BLOCKS
    if block.language in ("sh", "", "indented", "text")
    for line in lines_of(block.text)
    if (block.language == "sh" and not line.startswith("#")) or is_command(line)
]


@pytest.mark.parametrize("line", LINES)
def test_command_is_taken(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        check(words_of(line))
    except SystemExit as stop:
        pytest.fail(f"{line}: {stop.code} {capsys.readouterr().err}")


def mentioned(page: Path) -> list[str]:
    """What stands in backticks as a command of `mmrec`, with newlines as blanks."""
    spans = re.findall(r"`(mmrec [a-z-]+[^`]*)`", prose(page))
    return [" ".join(span.split()) for span in spans]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_mentioned_commands_and_options_exist(page):
    for span in mentioned(page):
        name, *rest = span.removeprefix("mmrec ").split(" ")
        for other in name.split("|"):
            assert other in GROUP.commands or other in ("…", "<command>"), f"{page.name}: {span}"
        if name in GROUP.commands:
            known = {flag for p in GROUP.commands[name].params for flag in (*p.opts, *p.secondary_opts)} | {"--help"}
            given = {word.partition("=")[0] for word in rest if word.startswith("--") and len(word) > 2}
            assert given <= known, f"{page.name}: {span}"


@pytest.mark.parametrize(
    "line",
    [
        "mmrec trein --data A --out B",
        "mmrec train --data A --out B --protocol X",
        "mmrec train --data A",
        "mmrec train --data A --out B --set widht=3",
        "mmrec experiment gap --data A --out B --set examples=many",
        "mmrec peers --data A --protocol G --set layerz=2",
        "python -m mmrec_kernels.benchmarks --op retrieval --dtype int9",
        "python -m mmrec_kernels.benchmarks --op attention --where batch=257",
        "python -m mmrec_kernel",
        "make demoo",
        "make results DATUM=x",
        'pip install ".[srs]"',
        "pip install left-pad",
        "pytest -m dat tests",
        "python -m pytest tests/nowhere",
        "curl localhost:8000/recommendations",
        """curl -H "Content-Type: application/json" -d '{"histori": ["1"]}' localhost:8000/recommend""",
        "frobnicate",
    ],
)
def test_wrong_commands_are_seen(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((Exception, SystemExit)):
        check(words_of(line))


def test_there_are_enough_of_them_to_see():
    assert len(LINES) > 60 and sum(len(mentioned(page)) for page in PAGES) > 30
