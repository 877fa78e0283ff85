"""The page of a run: what it says beside the rows that it is of, and where its marks lie."""

import dataclasses
import math
import re

import pytest
from bench_reports import (
    ALONE,
    ENVIRONMENT,
    LOST,
    MISSING,
    OTHER,
    OURS,
    PEER,
    ROOF,
    WON,
    WORSE,
    Page,
    absent,
    report,
    row,
    svg,
    whole,
)
from mmrec_kernels.benchmarks import markup, page, plot, table


def drawn(made, planned=None, stopped=""):
    counts = {c.op: sum(d.op == c.op for d in made.comparisons) for c in made.comparisons}
    source = page.render(made, planned or counts, stopped)
    return source, Page(source)


def test_what_we_lose_comes_first_the_worst_before_the_others():
    source, read = drawn(whole())
    assert [text for _, text in read.all("h2")] == ["Rows we lose", "retrieval", "nf4"]
    head, *lines = read.tables["Rows we lose"]
    found = [dict(zip(head[:4], line, strict=False)) for line in lines]
    assert [f["shape"] for f in found] == ["items=8k", "items=4k"]
    assert all(f["op"] == "retrieval" for f in found)
    assert [line[head.index("× as fast as the peer")] for line in lines] == ["LOST 0.333", "LOST 0.8"]
    assert "2 of 3 cases: the best peer was faster than we are. The worst first. 1 more had no peer that ran." in source
    before = source[: source.index('id="lost"')]
    assert "<table" not in before and "<svg" not in before and "<nav" not in before
    ids = {attrs["id"] for _, attrs, _ in read.elements if "id" in attrs}
    links = [a["href"].removeprefix("#") for a, _ in read.all("a")]
    assert set(links) <= ids and {"retrieval-2", "retrieval-3"} <= set(links)
    rows_by_id = {attrs["id"]: text for attrs, text in read.all("tr") if "id" in attrs}
    assert "items=8k" in rows_by_id["retrieval-3"] and "items=4k" in rows_by_id["retrieval-2"]


def test_a_case_as_fast_as_its_peer_is_not_lost():
    source, read = drawn(report([row(OURS, 2.0, n=1), row(PEER, 2.0, n=1)], WON))
    assert "None: in all 2 cases we were at least as fast as the best peer." in source
    assert "Rows we lose" not in read.tables and "LOST" not in source
    assert "No case with a peer has been measured. 1 more had no peer that ran." in drawn(report(ALONE))[0]


def test_tables_hold_the_numbers_of_the_rows():
    made = whole()
    _, read = drawn(made)
    head, *lines = read.tables["retrieval: ours and the best peer"]
    assert lines[0] == [
        "items=1k", "float32", "forward", OURS, "2", "1.8 – 2.2", "1.0", OTHER, "3", "2.7 – 3.3", "1.0", "1.5", "0.5",
        "4.00",
    ]  # fmt: skip
    assert read.tables["nf4: ours and the best peer"][1][7:12] == ["no peer ran", "–", "–", "–", "–"]
    head, *lines = read.tables["All rows of retrieval"]
    assert len(lines) == 7
    medians = {(line[0], line[3]): float(line[4]) for line in lines}
    of = [r for r in made.rows if r.op == "retrieval"]
    assert medians == {(table.shape_text(r.shape), r.provider): r.median_ms for r in of}
    assert [line[head.index("× fastest")] for line in lines[:3]] == ["1.00", "1.50", "3.00"]
    assert {line[head.index("calls")] for line in lines} == {"5"}


def test_hardware_versions_and_rates_are_in_the_header():
    made = report([row(OURS, 1.0, n=1), row(OTHER, 2.0, n=1, versions={"torch": "2.10.0", "faiss": "1.9<3"})])
    source, read = drawn(made)
    header = re.sub(r"<[^>]+>", " ", source[source.index("<header>") : source.index("</header>")])
    for value in ("Some CPU", "avx2", "L1 32 KiB", "_C: loaded", "torch 2.10.0", "faiss 1.9&lt;3", ENVIRONMENT["date"],
                  "40.0 GB/s", "15.0 GB/s", "200 GFLOP/s", "400 GFLOP/s"):  # fmt: skip
        assert value in header, value
    assert "load average was" not in source
    busy = page.render(report(WON, load_average=1.5), {"retrieval": 1})
    assert "the load average was 1.5 before the run" in busy
    gpu = page.render(report(WON, gpu={"name": "Some <GPU>", "clocks.sm": "1 MHz"}), {"retrieval": 1})
    assert "name Some &lt;GPU&gt;, clocks.sm 1 MHz" in gpu


def test_text_is_text():
    dtype = '"><script>'
    evil = row(f"</title><script>{PEER}", 1.0, dtype=dtype, items=9)
    source, read = drawn(
        report([row(OURS, 2.0, dtype=dtype, items=9), evil], missing=[MISSING], cpu="<img src=x onerror=alert(1)>"),
        stopped='"><script>',
    )
    assert {tag for tag, *_ in read.elements} & {"script", "img", "b"} == set()
    assert MISSING.reason in read.tables["retrieval: peers that did not run"][1]
    assert {evil.provider, dtype} < set(read.tables["All rows of retrieval"][1])
    assert f"retrieval, {dtype}, forward: time by size" in [attrs["aria-label"] for attrs, _ in read.all("svg")]


def test_peers_that_did_not_run_have_a_reason_and_their_cases():
    reason = "faiss is not installed (pip install faiss-cpu)"
    made = report(WON, LOST, WORSE, missing=[absent(OTHER, reason, of) for of in (LOST[0], WORSE[0])] + [MISSING])
    _, *lines = drawn(made)[1].tables["retrieval: peers that did not run"]
    assert lines == [
        [OTHER, reason, "2", "items=4k, float32, forward; items=8k, float32, forward"],
        [MISSING.provider, MISSING.reason, "1", "items=4k, float32, forward"],
    ]
    assert "None: every peer ran" in drawn(report(WON))[0]


def test_an_incomplete_run_says_so():
    made = report(WON, complete=False)
    source, read = drawn(made, {"retrieval": 3, "nf4": 2}, "nf4, rows=1, float32, full: RuntimeError: no")
    assert "Incomplete. Stopped at nf4, rows=1, float32, full: RuntimeError: no. Cases measured: " in source
    assert "Cases measured: retrieval 1 of 3, nf4 0 of 2." in source
    assert [text for _, text in read.all("h2")] == ["Rows we lose", "retrieval", "nf4"]
    assert "No case has been measured." in source
    assert "The run goes on, or it was ended from outside." in drawn(made, {"retrieval": 3})[0]
    assert "Incomplete" not in drawn(report(WON))[0]
    assert "No case with a peer has been measured." in page.render(report(complete=False), {"nf4": 2})


def logarithmic(ticks):
    """Where a value lies, told from the labels of an axis alone, and the value at a place."""
    (a, at_a), *_, (b, at_b) = sorted((value, at) for value, at in ticks.items() if value > 0)
    slope = (at_b - at_a) / math.log(b / a)
    return lambda value: at_a + slope * math.log(value / a), lambda at: a * math.exp((at - at_a) / slope)


def test_marks_lie_where_the_axes_say():
    made = report(WON, LOST, WORSE)
    source, _ = drawn(made)
    _, marks, xs, ys = svg(source, "retrieval, float32, forward: time by size")
    assert sorted(xs) == [1000, 4000, 8000]  # the only dimension that varies
    (x, _), (y, _) = logarithmic(xs), logarithmic(ys)
    assert len(marks) == len(made.rows) and x(8000) > x(1000) and y(9) < y(2)
    for r in made.rows:
        (text,) = (t for t in marks if t.startswith(f"{r.provider}: {table.shape_text(r.shape)}: "))
        assert marks[text] == pytest.approx((x(r.shape["items"]), y(r.median_ms)), abs=0.05)
        assert text.endswith(f": {r.median_ms:g} ms, p20 – p80 {r.p20_ms:.3g} – {r.p80_ms:.3g}")
    bars = re.findall(
        r'<line class="c\d bar" x1="([\d.]+)" y1="([\d.]+)" x2="([\d.]+)" y2="([\d.]+)"',
        svg(source, "retrieval, float32, forward: time by size")[0],
    )
    wanted = [(x(r.shape["items"]), y(r.p20_ms), y(r.p80_ms)) for r in made.rows]
    found = [(float(x1), float(low), float(high)) for x1, low, _, high in bars]
    assert sorted(found) == [pytest.approx(w, abs=0.05) for w in sorted(wanted)]


def test_memory_that_is_zero_or_unknown():
    peaks = {OURS: 0, PEER: 64 * 2**20, OTHER: None}
    cases = [[row(name, 1.0, n=n, peak=peak and peak * n) for name, peak in peaks.items()] for n in (1, 2, 8)]
    source, _ = drawn(report(*cases))
    _, marks, _, ys = svg(source, "retrieval, float32, forward: memory by size")
    assert len(marks) == 6 and not any(OTHER in text for text in marks)
    y, _ = logarithmic(ys)
    for text, (_, at) in marks.items():
        n = int(re.search(r"n=(\d)", text)[1])
        assert at == pytest.approx(ys[0.0] if OURS in text else y(64 * n), abs=0.05)
    assert ys[0.0] > max(at for value, at in ys.items() if value)
    nothing = [[dataclasses.replace(r, peak_bytes=None) for r in of] for of in cases]
    assert ": memory by size" not in drawn(report(*nothing))[0]


def test_the_roofline_is_that_of_the_report():
    made = report(WON, LOST, ALONE, WORSE)
    source, _ = drawn(made)
    markup_, marks, xs, ys = svg(source, "retrieval: roofline")
    (x, value_at), (y, _) = logarithmic(xs), logarithmic(ys)
    assert len(marks) == 6  # ours and the best peer of three cases
    for text, at in marks.items():
        (r,) = (r for r in made.rows if text.startswith(f"{r.provider}: {table.shape_text(r.shape)}, "))
        assert at == pytest.approx((x(r.flops / r.bytes), y(r.flops / (r.median_ms / 1e3))), abs=0.05)
    assert not any(text.startswith(f"{PEER}: items=1k,") for text in marks)  # a slower peer
    lines = [
        tuple(map(float, line))
        for line in re.findall(
            r'<line class="roof[^"]*" x1="([\d.-]+)" y1="([\d.-]+)" x2="([\d.-]+)" y2="([\d.-]+)"', markup_
        )
    ]
    flat = sorted({at for _, at, _, end in lines if at == end and at > 0})
    assert flat == [pytest.approx(y(rate), abs=0.05) for rate in sorted(ROOF.flops_per_s.values(), reverse=True)]
    slopes = [line for line in lines if line[1] != line[3]]
    top = max(ROOF.flops_per_s.values())
    for rate, (x1, y1, x2, y2) in zip((ROOF.read_bytes_per_s, 2 * ROOF.copy_bytes_per_s), slopes, strict=True):
        assert (x2, y2) == pytest.approx((x(top / rate), y(top)), abs=0.05)
        assert y1 == pytest.approx(y(value_at(x1) * rate), abs=0.05)
    assert "read, 40 GB/s" in markup_ and "copy, both ways, 30 GB/s" in markup_
    assert "float32 200 Gflops/s" in markup_ and "bfloat16 400 Gflops/s" in markup_


def test_lines_join_what_differs_in_one_dimension():
    def case(rows_, k, flops):
        return [row(name, ms * rows_, rows=rows_, k=k, width=8, flops=flops) for name, ms in ((OURS, 1.0), (PEER, 2.0))]

    source, _ = drawn(report(*(case(n, k, n * 1000) for n in (1, 4, 16) for k in (10, 100))))
    assert "Lines join cases that differ in rows alone." in source  # not in k: both have the same flops
    found, marks, _, _ = svg(source, "retrieval, float32, forward: time by size")
    lines = [line.split() for line in re.findall(r'<polyline class="c\d line" points="([^"]*)"', found)]
    assert [len(line) for line in lines] == [3] * 4  # two providers, two k
    at = {tuple(map(float, point.split(","))) for line in lines for point in line}
    assert at == set(marks.values())
    assert all(line == sorted(line, key=lambda point: float(point.split(",")[0])) for line in lines)
    source, _ = drawn(report(case(1, 10, 1000), case(5, 7, 2000)))
    assert "Lines join all cases by their size." in source
    assert "flops of the case" in source
    source, _ = drawn(report(case(1, 10, 0), case(5, 7, 0)))
    assert "bytes that the case reads and writes" in source


@pytest.mark.parametrize("low, high", [(1.0, 1.0), (3.0, 3.5), (0.02, 0.9), (7e-4, 3e5), (1.0, 1e12)])
def test_every_axis_has_ticks_and_holds_its_values(low, high):
    found = plot.axis([low, high], 100, 600)
    assert 100 < found.at(low) <= found.at(high) < 600
    ticks = found.ticks()
    assert 2 <= len(ticks) <= 10 and ticks == sorted(set(ticks))
    assert all(100 <= found.at(tick) <= 600 for tick in ticks)


def test_providers_differ_in_shape_and_keep_their_look():
    groups = [[OURS, *(f"a{i}" for i in range(23))], [OURS, "b", "a3", "c"], ["b", "a0", "d"]]
    look = plot.styles(groups)
    for group in groups:
        assert len({(look[name].shape, look[name].hollow) for name in group}) == len(group)
        assert sum(look[name].colour == 0 for name in group) <= 1
    assert look[OURS] == plot.Style(0, 0, False)
    assert len({look[name].colour for name in groups[0][:7]}) == 7
    source, _ = drawn(whole())
    marks = re.findall(r'<path class="c(\d) mark[^>]* d="([^"]*)" role="img"><title>([^:]*):', source)
    assert len({mark[:2] for mark in marks if mark[2] == PEER}) == 1
    assert len({mark[:2] for mark in marks}) == 3


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a, b):
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_colours_can_be_seen_on_light_and_on_dark():
    style = re.search(r"<style>(.*?)</style>", drawn(whole())[0], re.S)[1]
    light, dark = style.split("@media screen and (prefers-color-scheme:dark)", 1)
    for part, marks in ((light, markup.LIGHT), (dark.split("}}")[0], markup.DARK)):
        names = dict(re.findall(r"--(\w+):(#[0-9a-f]+)", part))
        names = {k: v if len(v) == 7 else "#" + "".join(2 * c for c in v[1:]) for k, v in names.items()}
        for back in (names["card"], names["page"]):
            assert all(contrast(mark, back) >= 3 for mark in marks), back
            assert all(contrast(names[text], back) >= 4.5 for text in ("ink", "muted", "bad", "link")), back


def test_the_page_asks_for_nothing_and_can_be_read_in_order():
    source, read = drawn(whole())
    (policy,) = (a["content"] for a, _ in read.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    assert not {"script", "link", "img", "iframe"} & {tag for tag, *_ in read.elements}
    assert not re.search(r'\s(src|on\w+|style)="|url\(|@import', source)
    assert set(re.findall(r"https?://[^\"' <]+", source)) == {"http://www.w3.org/2000/svg"}
    levels = [int(tag[1]) for tag, *_ in read.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in zip(levels, levels[1:], strict=False))
    regions = [attrs for attrs, _ in read.all("div", role="region")]
    assert all(a["tabindex"] == "0" and a["aria-label"] for a in regions)
    assert len({a["aria-label"] for a in regions}) == len(regions)
    assert len(regions) == source.count("<table") + source.count("<svg")
    plots = read.all("svg")
    assert all(a["aria-label"] and a["role"] == "group" for a, _ in plots)
    ids = [attrs["id"] for _, attrs, _ in read.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    skip = next(a for a, _ in read.all("a"))
    assert skip["href"] == "#main" and "main" in ids
