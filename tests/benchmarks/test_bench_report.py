"""Runs with a report: which ops and cases it is of, and what is left of a run that ends early."""

import json
import shutil

import pytest
from bench_reports import Page, whole
from mmrec_kernels.benchmarks import __main__ as cli
from mmrec_kernels.benchmarks import clock, nf4, page, retrieval, roofline, rows, runner, table


@pytest.fixture
def tiny(monkeypatch, threads):
    """Few and tiny cases of two ops, and a roofline that takes no time."""
    monkeypatch.setattr(cli, "OPS", ("nf4", "retrieval"))
    monkeypatch.setitem(retrieval.SHAPES, "small", ((1, 300, 16), (4, 200, 16)))
    monkeypatch.setitem(nf4.SHAPES, "small", ({"rows": 1, "out": 64, "in": 64, "rank": 0, "adapters": 1},))
    monkeypatch.setattr(clock, "PAUSE", 0.0)
    monkeypatch.setattr(nf4, "peers", lambda *args: (nf4.Provider("another", nf4._ours),))  # nothing is compiled
    monkeypatch.setattr(
        roofline,
        "measure",
        lambda device, timer, dtypes: roofline.Roofline(device, 2**20, 1e10, 5e9, {"float32": 1e11}),
    )


def run(folder, *more):
    return cli.main(["--report", str(folder), "--seconds", "0", "--k", "5", "--dtype", "float32", *more])


def saved(folder, op):
    return json.loads((folder / f"{op}.json").read_text())


def test_a_run_of_all_ops(tiny, tmp_path, capsys):
    folder = tmp_path / "new" / "report"
    assert run(folder, "--mode", "forward", "--threads", "1") == 0
    assert sorted(path.name for path in folder.iterdir()) == ["index.html", "nf4.json", "retrieval.json"]
    read = Page((folder / "index.html").read_text())
    assert "Incomplete" not in read.source
    for op, cases in (("nf4", 1), ("retrieval", 2)):
        of = saved(folder, op)
        assert of["complete"] is True and len(of["comparisons"]) == cases
        assert {r["op"] for r in of["rows"]} == {op}
        head, *lines = read.tables[f"All rows of {op}"]
        wanted = sorted(
            (table.shape_text(r["shape"]), r["provider"], table.milliseconds(r["median_ms"])) for r in of["rows"]
        )
        assert sorted((line[0], line[3], line[4]) for line in lines) == wanted
    lost = sum(c["speedup"] < 1 for op in ("nf4", "retrieval") for c in saved(folder, op)["comparisons"])
    assert len(read.tables.get("Rows we lose", [0])) - 1 == lost
    out = capsys.readouterr().out
    assert f"{3 - lost} of 3 cases faster" in out and f"report: {folder / 'index.html'}" in out
    assert out.count("roofline: read 10.0 GB/s") == 1  # the machine is measured once
    assert rows.load(folder / "nf4.json").comparisons[0].op == "nf4"


def test_ops_and_shapes_can_be_chosen(tiny, tmp_path, capsys):
    assert run(tmp_path / "a", "--op", "retrieval", "--where", "queries=4") == 0
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["index.html", "retrieval.json"]
    assert [c["shape"]["queries"] for c in saved(tmp_path / "a", "retrieval")["comparisons"]] == [4]
    assert run(tmp_path / "b", "--mode", "full") == 0  # retrieval has no such mode
    assert "retrieval is left out: it has no case of these\n" in capsys.readouterr().err
    assert [text for _, text in Page((tmp_path / "b/index.html").read_text()).all("h2")] == ["Rows we lose", "nf4"]
    assert run(tmp_path / "a", "--op", "retrieval") == 0  # again, in place of the former
    assert len(saved(tmp_path / "a", "retrieval")["comparisons"]) == 2


def stopping(monkeypatch, at, error):
    """Makes the run's `at`-th case end with `error`."""
    real, calls = runner.run, []

    def limited(*args):
        calls.append(1)
        if len(calls) == at:
            raise error
        return real(*args)

    monkeypatch.setattr(runner, "run", limited)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of <luck>")])
def test_what_was_measured_is_kept(tiny, tmp_path, monkeypatch, error):
    (tmp_path / "retrieval.json").write_text("of an earlier run")
    stopping(monkeypatch, 3, error)
    if isinstance(error, KeyboardInterrupt):
        assert run(tmp_path, "--mode", "forward") == 130
    else:
        with pytest.raises(RuntimeError, match="out of <luck>"):
            run(tmp_path, "--mode", "forward")
    assert saved(tmp_path, "nf4")["complete"] is True
    half = saved(tmp_path, "retrieval")
    assert half["complete"] is False and len(half["comparisons"]) == 1
    source = (tmp_path / "index.html").read_text()
    reason = "KeyboardInterrupt" if isinstance(error, KeyboardInterrupt) else "RuntimeError: out of &lt;luck&gt;"
    shape = "queries=4 items=200 width=16 k=5"
    assert f"Incomplete. Stopped at retrieval, {shape}, float32, forward: {reason}. " in source
    assert "Cases measured: nf4 1 of 1, retrieval 1 of 2." in source
    assert len(Page(source).tables["retrieval: ours and the best peer"]) == 2


def test_the_page_is_there_from_the_start(tiny, tmp_path, monkeypatch):
    """A run that is killed leaves what the last case left: here, nothing measured."""
    seen = []

    def look(*args):
        seen.append((tmp_path / "index.html").read_text())
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run", look)
    assert run(tmp_path) == 130
    assert "The run goes on, or it was ended from outside. Cases measured: nf4 0 of" in seen[0]
    Page(seen[0])
    assert saved(tmp_path, "nf4")["rows"] == []


def test_a_full_disk_is_one_line(tiny, tmp_path, monkeypatch, capsys):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rows.os, "fsync", full)
    assert run(tmp_path) == 1
    assert capsys.readouterr().err == f"cannot write {tmp_path / 'nf4.json'}: No space left on device\n"
    assert list(tmp_path.iterdir()) == []


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(map(str, arguments)))
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_wrong_arguments(tiny, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    other = tmp_path / "other"
    other.mkdir()
    (other / "nf4.json").write_text("{}")
    for arguments, message in (
        (("--report", file), f"--report {file}: File exists"),
        (("--report", file / "below"), f"--report {file / 'below'}: Not a directory"),
        (("--report", other, "--op", "retrieval"), f"--report {other}: it has nf4.json of another run; give another"),
        (("--report", tmp_path, "--json", tmp_path / "x.json"), "--report writes the rows beside its page, --json and"),
        (("--report", tmp_path, "--json-dir", tmp_path), "--report writes the rows beside its page"),
        (("--op", "nf4", "--op", "retrieval"), "--op is one without --report, got nf4, retrieval"),
        (("--report", tmp_path, "--op", "nf4", "--k", "5"), "--k is an option of --op retrieval, got --op nf4"),
        (
            ("--report", tmp_path, "--dtype", "float8"),
            "--dtype must be of float32, bfloat16, int8 for nf4, retrieval on cpu",
        ),
        (
            ("--report", tmp_path, "--candidates"),
            "--candidates is an option of attention, routing, nf4, retrieval on cuda",
        ),
        (("--report", tmp_path, "--where", "rows=2"), "--where rows=2: no shape has these sizes"),
        ((), "the following arguments are required: --op, or --report for all ops"),
    ):
        assert message in refused(capsys, *arguments), arguments
    assert (other / "nf4.json").read_text() == "{}"


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_the_page_in_a_browser(tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    path = tmp_path / "index.html"
    path.write_text(page.render(whole(), {"retrieval": 3, "nf4": 1}))
    with playwright.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for width, scheme in ((1280, "light"), (390, "dark")):
            shown = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
            wrong = []
            shown.on("console", lambda message, wrong=wrong: wrong.append(message.text))
            shown.on("pageerror", lambda error, wrong=wrong: wrong.append(str(error)))
            shown.on("request", lambda request, wrong=wrong: wrong.append(request.url))
            shown.goto(path.as_uri())
            assert shown.evaluate("document.documentElement.scrollWidth") <= width
            card = "getComputedStyle(document.querySelector('section')).backgroundColor"
            assert shown.evaluate(card) == {"light": "rgb(255, 255, 255)", "dark": "rgb(26, 33, 40)"}[scheme]
            fill = "getComputedStyle(document.querySelector('path.c0[role=img]')).fill"
            assert shown.evaluate(fill) == {"light": "rgb(0, 114, 178)", "dark": "rgb(86, 180, 233)"}[scheme]
            reached = []
            for _ in range(60):
                shown.keyboard.press("Tab")
                reached.append(shown.evaluate("document.activeElement.ariaLabel || document.activeElement.textContent"))
            assert reached[0] == "Skip to the results" and reached[1] == "Rows we lose"
            assert "retrieval: ours and the best peer" in reached and "retrieval: roofline, plot" in reached
            assert "All 7 rows of retrieval" in reached and "nf4: ours and the best peer" in reached
            shown.get_by_text("All 7 rows of retrieval").press("Enter")
            assert shown.get_by_role("region", name="All rows of retrieval").is_visible()
            assert shown.evaluate("document.documentElement.scrollWidth") <= width
            shown.get_by_role("link", name="items=8k").click()
            assert shown.evaluate("document.querySelector(':target').textContent").startswith("items=8k")
            assert wrong == [path.as_uri()]
        browser.close()
