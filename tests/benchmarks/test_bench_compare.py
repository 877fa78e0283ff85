"""Two runs beside each other: ratios by hand, what cannot be compared, and files that are no reports."""

import dataclasses
import json

import bench_package
import pytest
from bench_reports import ENVIRONMENT, OTHER, OURS, PEER, Page, absent, report, row
from mmrec_kernels.benchmarks import __main__ as cli
from mmrec_kernels.benchmarks import compare, rows

RESULTS = sorted((bench_package.FOLDER / "results").glob("*/retrieval.json"))


@pytest.fixture
def sides(tmp_path):
    """Saves an old and a new report, as files by default, and gives both back as they are read."""

    def make(old, new, *names):
        paths = [tmp_path / name for name in names or ("old.json", "new.json")]
        for path, of in zip(paths, (old, new), strict=True):
            of.save(path)
        return [compare.read(path) for path in paths]

    return make


def line_of(text, provider):
    (line,) = (line for line in text.splitlines() if line.startswith(f"  {provider}  "))
    return line.split("  ")[-1].strip(), line


def test_a_saved_report_is_the_report_again(tmp_path):
    first = row(OURS, 2.0, n=4)
    made = report([first, row(PEER, 3.0, n=4)], missing=[absent(OTHER, "not here", first)], complete=False)
    made.save(tmp_path / "a.json")
    assert rows.load(tmp_path / "a.json") == made
    found = json.loads((tmp_path / "a.json").read_text())
    del found["comparisons"][0]["read_ms"]  # as it was before a read was timed
    (tmp_path / "b.json").write_text(json.dumps(found))
    old = dataclasses.replace(made, comparisons=[dataclasses.replace(made.comparisons[0], read_ms=None)])
    assert rows.load(tmp_path / "b.json") == old
    assert "a plain read" not in compare.table.verdict(old.comparisons[0])


def test_ratios_and_marks(sides):
    """Medians of 10 against 8, 10.5, 12.5 and 14.5."""
    names = ["lower", "within", "higher", "wide"]
    old = [row(OURS, 1.0, n=1), *(row(name, 10.0, n=1) for name in names[:3]), row("wide", 10.0, n=1, spread=0.4)]
    new = [row(OURS, 1.0, n=1), *(row(name, ms, n=1) for name, ms in zip(names, (8.0, 10.5, 12.5), strict=False)),
           row("wide", 14.5, n=1, spread=0.05)]  # fmt: skip
    a, b = sides(report(old), report(new))
    ((key, found),) = compare.pairs(a, b).items()
    assert key == ("retrieval", (("n", 1),), "float32", "cpu", "forward")
    ratios = {name: (pair.ratio, pair.verdict) for name, pair in found.items()}
    assert ratios == {
        OURS: (1.0, ""), "lower": (0.8, "faster"), "within": (1.05, ""), "higher": (1.25, "slower"),
        "wide": (1.45, "slower"),
    }  # fmt: skip
    text = compare.text(a, b)
    assert line_of(text, "lower")[1].split() == "lower 10 9 – 11 8 7.2 – 8.8 0.8 faster".split()
    assert line_of(text, "higher")[1].split() == "higher 10 9 – 11 12.5 11.2 – 13.8 1.25 slower".split()
    assert line_of(text, "within")[1].split() == "within 10 9 – 11 10.5 9.45 – 11.6 1.05".split()
    assert text.endswith("5 rows of 1 cases are in both: 2 slower, 1 faster, 2 within p20 – p80")
    assert "NOT COMPARABLE" not in text and "note" not in text and "only in" not in text


@pytest.mark.parametrize(
    "old, new, verdict",
    [
        ((10, 9, 13), (12, 11, 14), ""),  # the new median is within the old quantiles
        ((10, 9, 11), (12, 9.5, 14), ""),  # the old one within the new
        ((10, 9, 12), (12, 11, 14), ""),  # the edges belong to it
        ((12, 10, 14), (10, 9, 11), ""),
        ((10, 9, 11.9), (12, 10.1, 14), "slower"),
        ((12, 10.1, 14), (10, 9, 11.9), "faster"),
    ],
)
def test_both_medians_have_to_lie_outside(old, new, verdict):
    a, b = (
        dataclasses.replace(row(OURS, 1.0, n=1), median_ms=median, p20_ms=low, p80_ms=high)
        for median, low, high in (old, new)
    )
    assert compare.Pair(a, b).verdict == verdict


def test_what_is_on_one_side_only(sides):
    shared, gone, come = row(OURS, 1.0, n=1), row(OURS, 1.0, n=2), row(OURS, 1.0, n=3, mode="full")
    missing = absent(PEER, "faiss is not installed", shared)
    old = report([shared, row(PEER, 2.0, n=1)], [gone])
    new = report([shared, row(OTHER, 2.0, n=1, versions={"faiss": "1.9"})], [come], missing=[missing])
    a, b = sides(old, new)
    text = compare.text(a, b)
    assert f"  only in old: {PEER} (faiss is not installed)\n  only in new: {OTHER}\n" in text
    assert "only in old:\n  retrieval  n=2  float32  cpu  forward\n" in text
    assert "only in new:\n  retrieval  n=3  float32  cpu  full\n" in text
    assert "1 rows of 1 cases are in both" in text
    assert "NOT COMPARABLE" not in text  # a peer of one side alone has no ratio that its version could spoil
    lines = Page(compare.html(a, b)).tables["On one side only"][1:]
    case = "retrieval  n=1  float32  cpu  forward"
    assert [case, f"only in old: {PEER} (faiss is not installed)"] in lines and len(lines) == 4
    assert ["retrieval  n=3  float32  cpu  full", "only in new"] in lines


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"cpu": "Another CPU"}, "cpu: Some CPU → Another CPU"),
        ({"threads": 1}, "threads: 4 → 1"),
        ({"isa": "base"}, "isa: avx2 → base"),
        ({"versions": ENVIRONMENT["versions"] | {"torch": "2.11.0"}}, "version of torch: 2.10.0 → 2.11.0"),
        ({"gpu": {"name": "A GPU", "clocks.sm": "1 MHz"}}, "gpu name: none → A GPU"),
        ({"libraries": {"_C": "not built"}}, "library _C: loaded → not built"),
    ],
)
def test_other_machines_threads_and_versions(sides, changes, said):
    case = [row(OURS, 1.0, n=1, versions={"python": "3.11.7"})]
    a, b = sides(report(case), report(case, **changes))
    text = compare.text(a, b)
    assert text.splitlines()[2].startswith("NOT COMPARABLE: ") and f"\n  {said}\n" in text
    assert compare.differences(a, b) == [said]
    assert said in Page(compare.html(a, b)).all("p")[0][1]


def test_a_peers_version_and_ours(sides):
    a, b = sides(
        report([row(OURS, 1.0, n=1), row(PEER, 1.0, n=1, versions={"faiss": "1"})]),
        report([row(OURS, 1.0, n=1), row(PEER, 1.0, n=1, versions={"faiss": "2"})]),
    )
    assert compare.differences(a, b) == ["version of faiss: 1 → 2"]
    other = ENVIRONMENT["versions"] | {"mmrec_kernels": "0.2.0"}
    a, b = sides(report([row(OURS, 1.0, n=1)]), report([row(OURS, 1.0, n=1)], versions=other))
    assert compare.differences(a, b) == []  # this is what is compared
    assert "note: mmrec_kernels 0.1.0 → 0.2.0\n" in compare.text(a, b)


def test_clocks_of_the_moment_and_load(sides):
    case = [row(OURS, 1.0, n=1)]
    gpus = [{"name": "A", "clocks.sm": clock, "clocks.mem": clock} for clock in ("1 MHz", "2 MHz")]
    a, b = sides(report(case, gpu=gpus[0]), report(case, gpu=gpus[1], load_average=3.0, complete=False))
    assert compare.differences(a, b) == []
    assert compare.notes(a, b) == [
        f"{b.path} is incomplete",
        f"{b.path}: the load average was 3.0 before the run; timings on a busy machine are not to be trusted",
    ]


def test_folders(tmp_path):
    for name, factor in (("old", 1.0), ("new", 2.0)):
        (tmp_path / name).mkdir()
        for op in ("nf4", "infonce"):
            report([row(OURS, factor, op=op, n=1)]).save(tmp_path / name / f"{op}.json")
        (tmp_path / name / "server.json").write_text('{"rows": []}')
        (tmp_path / name / "index.html").write_text("")
    a, b = (compare.read(tmp_path / name) for name in ("old", "new"))
    assert [pair.ratio for found in compare.pairs(a, b).values() for pair in found.values()] == [2.0, 2.0]
    assert f"note: {a.path}: server.json left out, no report\n" in compare.text(a, b)
    file = compare.read(tmp_path / "new/nf4.json")  # a folder beside a file
    assert [key[0] for key in compare.pairs(a, file)] == ["nf4"]
    report([row(OURS, 1.0, op="nf4", n=1)]).save(tmp_path / "old/nf4-again.json")
    with pytest.raises(ValueError, match=r"nf4-again.json and nf4.json both have nf4  n=1  float32  cpu  forward"):
        compare.read(tmp_path / "old")


@pytest.mark.skipif(not RESULTS, reason="there are no results here")
def test_earlier_results_can_be_read():
    for path in RESULTS:
        side = compare.read(path.parent)
        assert "retrieval" in {key[0] for key in side.cases}
        same = compare.text(side, side)
        assert "0 slower, 0 faster" in same and "NOT COMPARABLE" not in same


# The command.


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(map(str, arguments)))
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_the_command_prints_and_draws(tmp_path, capsys):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    evil = "<script>alert(1)</script>"
    report([row(OURS, 1.0, n=1), row(evil, 2.0, n=1)]).save(old)
    report([row(OURS, 2.0, n=1), row(evil, 2.0, n=1)], threads=1).save(new)
    assert cli.main(["--compare", str(old), str(new)]) == 0
    text = capsys.readouterr().out
    assert line_of(text, OURS)[0] == "slower" and "threads: 4 → 1" in text
    folder = tmp_path / "a" / "report"
    assert cli.main(["--compare", str(old), str(new), "--report", str(folder)]) == 0
    assert capsys.readouterr().out == f"{text}report: {folder / 'compare.html'}\n"
    read = Page((folder / "compare.html").read_text())
    case = "retrieval  n=1  float32  cpu  forward"
    assert read.tables["Ratios"][1:] == [
        [case, OURS, "1", "0.9 – 1.1", "2", "1.8 – 2.2", "2", "slower"],
        [case, evil, "2", "1.8 – 2.2", "2", "1.8 – 2.2", "1", ""],
    ]
    assert not any(tag == "script" for tag, *_ in read.elements)


def broken(kind):
    """JSON like a report's, but for one thing."""
    first = row(OURS, 1.0, n=1)
    found = dataclasses.asdict(report([first], missing=[absent(PEER, "no", first)]))
    if kind == "lacks rows":
        del found["rows"]
    elif kind == "a row of other fields":
        found["rows"][0]["more"] = 1
    elif kind == "no shape":
        found["missing"][0]["shape"] = None
    elif kind == "sizes are lists":
        found["rows"][0]["shape"] = {"n": [1]}
    else:
        found["rows"][0]["median_ms"] = {"time is 0": 0, "time is NaN": float("nan"), "time is text": "1"}[kind]
    return json.dumps(found)


@pytest.mark.parametrize(
    "kind",
    ["lacks rows", "a row of other fields", "no shape", "sizes are lists", "time is 0", "time is NaN", "time is text"],
)
def test_json_that_is_no_report(tmp_path, capsys, kind):
    path = tmp_path / "a.json"
    path.write_text(broken(kind))
    said = refused(capsys, "--compare", path, path)
    assert f"--compare: {path} is not a report of mmrec_kernels.benchmarks" in said


def test_wrong_arguments(tmp_path, capsys):
    sound, cut, empty = tmp_path / "sound.json", tmp_path / "cut.json", tmp_path / "empty"
    report([row(OURS, 1.0, n=1)]).save(sound)
    cut.write_text(sound.read_text()[:100])
    empty.mkdir()
    binary = tmp_path / "binary.json"
    binary.write_bytes(b"\xff\xfe\x00")
    (tmp_path / "listed.json").write_text("[]")
    for arguments, message in (
        ((sound, tmp_path / "nowhere"), f"--compare: there is no {tmp_path / 'nowhere'}"),
        ((empty, sound), f"--compare: {empty} has no report: no <op>.json that mmrec_kernels.benchmarks wrote"),
        ((sound, cut), f"--compare: {cut} is not JSON: "),
        ((sound, binary), f"--compare: {binary} is not JSON: "),
        ((sound, tmp_path / "listed.json"), f"{tmp_path / 'listed.json'} is not a report"),
        ((sound, tmp_path), f"--compare: {binary} is not JSON"),  # in a folder too
        ((sound,), "argument --compare: expected 2 arguments"),
        (
            (sound, sound, "--op", "nf4", "--seconds", "3"),
            "--compare measures nothing and takes --report only, got --op, --sec",
        ),
        ((sound, sound, "--json-dir", empty), "--compare measures nothing and takes --report only, got --json-dir"),
        ((sound, sound, "--report", sound), f"--report {sound}: File exists"),
    ):
        assert message in refused(capsys, "--compare", *arguments), arguments


def test_a_full_disk_is_one_line(tmp_path, monkeypatch, capsys):
    report([row(OURS, 1.0, n=1)]).save(tmp_path / "a.json")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rows.os, "fsync", full)
    arguments = ["--compare", str(tmp_path / "a.json"), str(tmp_path / "a.json"), "--report", str(tmp_path)]
    assert cli.main(arguments) == 1
    assert capsys.readouterr().err == f"cannot write {tmp_path / 'compare.html'}: No space left on device\n"
