"""The report: well-formed, self-contained, escaped, and its drawings where the numbers say."""

import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest

from mmrec.evaluation.charts import interval_chart, line_chart, share_chart
from mmrec.evaluation.intervals import Interval
from mmrec.evaluation.report import group_rows, metric_rows, write_report
from mmrec.evaluation.results import Result, Row

NASTY = "<script>alert('x')</script> & \"quotes\""
SVG = "{http://www.w3.org/2000/svg}"


def full_run():
    return {
        "title": NASTY,
        "subtitle": NASTY,
        "fingerprint": NASTY,
        "protocol": "S",
        "seeds": [0, 1],
        "command": f"mmrec train {NASTY}",
        "metrics": [
            {"model": NASTY, "values": {NASTY: (0.2, 0.1, 0.3), "NDCG@10": Interval(0.1, 0.05, 0.15, 0.95, 9, 1, 100)}},
            {"model": "most popular", "floor": True, "values": {NASTY: 0.05, "NDCG@10": None}},
        ],
        "differences": [{"model": NASTY, "values": {"HR@10": (0.01, -0.01, 0.03)}}],
        "slices": [{"model": NASTY, "group": NASTY, "users": 3, "values": {NASTY: math.nan}}],
        "curves": {NASTY: [(0, 1.0), (1, math.nan), (2, 0.5), (3, 0.4)], "valid": {NASTY: [(0, 0.1)], "b": [(0, 0.2)]}},
        "modalities": {NASTY: 0.4, "image": 0.6},
        "dominance": {NASTY: {"drop": 0.1, "only": 0.2, "noise": 0.1, "index": 1.0}},
        "missing": {NASTY: [(0.0, 0.2), (0.9, 0.1)]},
        "experts": {NASTY: [0.5, 0.25, 0.25]},
        "config": {NASTY: NASTY, "model": {"width": 64, "names": [NASTY]}, "empty": {}},
        "notes": [NASTY],
    }


class Balanced(HTMLParser):
    """Fails on tags that close in the wrong order, and collects text and attributes."""

    VOID = ("meta", "br", "line", "circle", "rect", "polyline")

    def __init__(self):
        super().__init__()
        self.open, self.text, self.tags, self.attributes = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.text.append(data)


def parsed(path):
    parser = Balanced()
    parser.feed(path.read_text(encoding="utf-8"))
    parser.close()
    assert parser.open == []
    return parser


def test_a_full_report_is_balanced_escaped_and_self_contained(tmp_path):
    page = parsed(write_report(full_run(), tmp_path / "report.html"))
    assert "script" not in page.tags and "b" in page.tags
    text = "".join(page.text)
    assert text.count("<script>") >= 10
    assert not [value for name, value in page.attributes if name in ("src", "href", "onload", "onclick")]
    source = (tmp_path / "report.html").read_text()
    assert "url(" not in source and "@import" not in source
    assert set(re.findall(r"https?://[^\"']+", source)) == {"http://www.w3.org/2000/svg"}


def test_every_section_shows_its_numbers(tmp_path):
    text = " ".join(parsed(write_report(full_run(), tmp_path / "r.html")).text)
    for wanted in (
        "0.2000",
        "0.1000 … 0.3000",
        "0.0500",
        "+0.0100",
        "-0.0100 … +0.0300",
        "0, 1",
        "model.width",
        "64",
        "60%",
    ):
        assert wanted in text, wanted
    for title in (
        "Metrics",
        "Differences",
        "Groups",
        "Training",
        "Attention mass",
        "Expert utilisation",
        "Configuration",
    ):
        assert title in text, title


def test_the_title_alone_is_enough_and_unknown_keys_are_named(tmp_path):
    assert "section" not in parsed(write_report({"title": "t"}, tmp_path / "r.html")).tags
    with pytest.raises(ValueError, match=r"unknown keys \['metrcs'\]"):
        write_report({"title": "t", "metrcs": []}, tmp_path / "r.html")
    with pytest.raises(ValueError, match="needs a 'title'"):
        write_report({}, tmp_path / "r.html")


def test_the_best_value_of_each_column_is_marked(tmp_path):
    rows = [{"model": m, "values": {"a": a, "b": b}} for m, a, b in (("x", 0.1, 0.4), ("y", 0.3, 0.2))]
    source = write_report({"title": "t", "metrics": rows}, tmp_path / "r.html").read_text()
    assert re.findall(r'class="n best">([\d.]+)', source) == ["0.4000", "0.3000"]


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    write_report({"title": "old"}, tmp_path / "r.html")
    monkeypatch.setattr("os.fsync", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        write_report({"title": "new"}, tmp_path / "r.html")
    assert "<h1>old</h1>" in (tmp_path / "r.html").read_text()
    assert len(list(tmp_path.iterdir())) == 1


def a_result(model, values, seed=None):
    rows = {
        "all": Row(np.arange(len(values)), {"HR@10": np.array(values)}),
        "tail": Row(np.array([1]), {"HR@10": np.ones(1)}),
    }
    return Result(model, "S", "S-1", "test", "train", "tiny", "f", seed, rows)


def test_rows_come_from_results():
    seeds = [a_result("ours", [0.0, 1.0], s) for s in (0, 1)]
    rows = metric_rows({"ours": seeds, "popular": a_result("popular", [0.5, 0.5])}, ["HR@10"], floors=["popular"])
    assert [(r["model"], r["floor"], r["values"]["HR@10"].mean) for r in rows] == [
        ("ours", False, 0.5),
        ("popular", True, 0.5),
    ]
    assert rows[0]["values"]["HR@10"].seeds == 2 and rows[1]["values"]["HR@10"].low == 0.5
    groups = group_rows({"ours": seeds[0]}, ["HR@10"])
    assert groups[1] == {"model": "ours", "group": "tail", "users": 1, "values": {"HR@10": 1.0}}
    with pytest.raises(ValueError, match="floors"):
        metric_rows({"ours": seeds}, ["HR@10"], floors=["nobody"])


def drawn(svg):
    return ElementTree.fromstring(svg)


def labels(root):
    return [(float(t.get("x")), float(t.get("y")), t.text) for t in root.iter(f"{SVG}text")]


def test_lines_lie_where_the_axis_says():
    root = drawn(line_chart({"loss": [(0, 4.0), (50, 3.0), (100, 1.0)]}))
    points = [tuple(map(float, p.split(","))) for p in root.find(f"{SVG}polyline").get("points").split()]
    ticks = {text: (x, y) for x, y, text in labels(root)}
    # Labels sit 4 units below their grid line.
    assert points[0][1] == pytest.approx(ticks["4"][1] - 4, abs=0.11)
    assert points[2][1] == pytest.approx(ticks["1"][1] - 4, abs=0.11)
    assert points[0][0] == pytest.approx(ticks["0"][0], abs=0.11)
    assert points[2][0] == pytest.approx(ticks["100"][0], abs=0.11)


def test_gaps_and_lone_points():
    root = drawn(line_chart({"a": [(0, 1.0), (1, 2.0), (2, math.inf), (3, 3.0), (4, None), (5, 1.0), (6, 1.0)]}))
    assert len(root.findall(f"{SVG}polyline")) == 2 and len(root.findall(f"{SVG}circle")) == 1


def test_nothing_to_draw_is_said():
    assert "no finite values" in line_chart({"a": [(0, math.nan)]})
    assert "no finite values" in interval_chart([("a", math.nan, None, None, False)])
    assert "no shares" in share_chart({})
    assert "no shares" in share_chart({"a": {"x": 0.0}})


@pytest.mark.parametrize("values", [[0.0, 0.0], [5.0], [-1e-9, 1e-9], [1e9, 3e9], [-3.0, -2.0], [0.1234, 0.1235]])
def test_axes_enclose_any_range(values):
    root = drawn(line_chart({"a": list(enumerate(values))}))
    height = float(root.get("viewBox").split()[3])
    ys = [float(c.get("cy")) for c in root.iter(f"{SVG}circle")]
    ys += [float(p.split(",")[1]) for line in root.iter(f"{SVG}polyline") for p in line.get("points").split()]
    assert ys and all(0 < y < height - 39 for y in ys)
    texts = [text for x, _, text in labels(root) if x < 58]
    assert len(set(texts)) == len(texts) >= 2


def test_intervals_span_their_ends_on_the_axis():
    root = drawn(interval_chart([("ours", 0.2, 0.1, 0.3, False), ("floor", 0.1, None, None, True)]))
    ticks = {text: x for x, y, text in labels(root) if y > 70}
    bar = next(e for e in root.iter(f"{SVG}line") if e.get("stroke-linecap") == "round")
    assert float(bar.get("x1")) == pytest.approx(ticks["0.1"], abs=0.11)
    assert float(bar.get("x2")) == pytest.approx(ticks["0.3"], abs=0.11)
    circles = [float(c.get("cx")) for c in root.iter(f"{SVG}circle")]
    assert circles == pytest.approx([ticks["0.2"], ticks["0.1"]], abs=0.11)
    guide = next(e for e in root.iter(f"{SVG}line") if e.get("stroke-dasharray"))
    assert float(guide.get("x1")) == pytest.approx(ticks["0.1"], abs=0.11)


def test_shares_are_proportional_and_refuse_what_is_no_share():
    root = drawn(share_chart({"all": {"text": 3.0, "image": 1.0}}, legend=False))
    widths = [float(r.get("width")) + 1 for r in root.iter(f"{SVG}rect")]
    assert widths[0] == pytest.approx(3 * widths[1], abs=0.4)
    left, width = float(root.find(f"{SVG}rect").get("x")), float(root.get("viewBox").split()[2])
    assert sum(widths) == pytest.approx(width - left - 8, abs=0.4)
    for bad in (-0.1, math.nan):
        with pytest.raises(ValueError, match="shares must be finite and not negative"):
            share_chart({"all": {"text": bad}})


def test_many_names_wrap_inside_the_drawing():
    root = drawn(line_chart({f"a rather long name {i}": [(0, i), (1, i)] for i in range(8)}))
    names = [(x, y) for x, y, text in labels(root) if text.startswith("a rather")]
    assert len(names) == 8 and len({y for _, y in names}) > 1
    assert max(x for x, _ in names) + 20 * 6.7 < 460
    top = min(float(p.split(",")[1]) for e in root.iter(f"{SVG}polyline") for p in e.get("points").split())
    assert top > max(y for _, y in names)
