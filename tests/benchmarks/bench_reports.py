"""Small reports written by hand, and what a page says when it is read back: for the tests of pages and comparisons."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

import bench_package  # noqa: F401
from mmrec_kernels.benchmarks.roofline import Roofline
from mmrec_kernels.benchmarks.rows import Missing, Report, Row, compare

ENVIRONMENT = {
    "date": "2026-01-02T03:04:05+00:00",
    "system": "Linux",
    "cpu": "Some CPU",
    "cpus": 8,
    "caches": {"L1": 32768},
    "isa": "avx2",
    "threads": 4,
    "load_average": 0.1,
    "libraries": {"_C": "loaded"},
    "versions": {"mmrec_kernels": "0.1.0", "torch": "2.10.0", "python": "3.11.7"},
}
ROOF = Roofline("cpu", 2**28, 4e10, 1.5e10, {"float32": 2e11, "bfloat16": 4e11})
OURS, PEER, OTHER = "mmrec (compiled)", "torch matmul", "faiss flat"


def row(provider, median, *, op="retrieval", mode="forward", dtype="float32", spread=0.1, peak=2**20, flops=10**9,
        nbytes=10**7, versions=None, **shape):  # fmt: skip
    """A row; p20 and p80 are `spread` of the median below and above it."""
    return Row(op, shape, dtype, "cpu", mode, provider, median, median * (1 - spread), median * (1 + spread), peak,
               {"max": 1e-7}, flops, nbytes, versions or {"torch": "2.10.0"})  # fmt: skip


def report(*cases, missing=(), complete=True, **changes):
    """A report of cases: lists of rows, the first of which is ours."""
    made = Report(ENVIRONMENT | changes, ROOF, complete=complete)
    for rows in cases:
        made.rows += rows
        calls = {r.provider: 5 for r in rows}
        made.comparisons.append(compare(list(rows), {OURS}, 0.5, 0.4, calls))
    made.missing += missing
    return made


def absent(provider, reason, of):
    return Missing(of.op, of.shape, of.dtype, of.device, of.mode, provider, reason)


WON = [row(OURS, 2.0, items=1000), row(PEER, 6.0, items=1000), row(OTHER, 3.0, items=1000)]
LOST = [row(OURS, 5.0, items=4000, flops=4 * 10**9), row(PEER, 4.0, items=4000, flops=4 * 10**9)]
WORSE = [row(OURS, 9.0, items=8000, flops=8 * 10**9), row(PEER, 3.0, items=8000, flops=8 * 10**9)]
ALONE = [row(OURS, 1.0, op="nf4", mode="full", dtype="bfloat16", rows=1)]
MISSING = absent("torch <b>&\"'x", "failed: ValueError: <script>alert(1)</script>", LOST[0])


def whole():
    """A report with a case that we win, two that we lose, one without a peer, and a peer that did not run."""
    return report(WON, LOST, ALONE, WORSE, missing=[MISSING])


@dataclass
class Page(HTMLParser):
    """Elements in order, each with its attributes and its text; `tables` by the label of their region."""

    source: str
    elements: list[tuple[str, dict[str, str | None], list[str]]] = field(default_factory=list)
    tables: dict[str, list[list[str]]] = field(default_factory=dict)

    VOID = ("meta", "br", "link", "img", "input")

    def __post_init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.label = [], ""
        self.feed(self.source)
        self.close()
        assert not self.open, f"not closed: {[tag for tag, *_ in self.open]}"

    def handle_starttag(self, tag, attrs):
        element = (tag, dict(attrs), [])
        self.elements.append(element)
        if tag not in self.VOID:
            self.open.append(element)
        if element[1].get("role") == "region":
            self.label = element[1]["aria-label"]
        if tag == "table":
            assert self.label not in self.tables
            self.tables[self.label] = []
        elif tag == "tr":
            self.tables[self.label].append([])

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag):
        opened, _, text = self.open.pop()
        assert opened == tag, f"</{tag}> closes <{opened}>"
        if tag in ("td", "th"):
            self.tables[self.label][-1].append("".join(text))

    def handle_data(self, data):
        for _, _, text in self.open:
            text.append(data)

    def all(self, tag, **attributes):
        """Attributes and text of every such element."""
        return [
            (attrs, "".join(text))
            for name, attrs, text in self.elements
            if name == tag and all(attrs.get(key) == value for key, value in attributes.items())
        ]


def svg(page, title):
    """The markup of the plot of that title, and its numbers: (marks by their text, ticks of x, ticks of y)."""
    found = next(s for s in re.findall(r"<svg.*?</svg>", page, re.S) if f"<title>{title}</title>" in s)
    parsed = Page(found)
    marks = {}
    for place, text in re.findall(
        r'<path class="[^"]*mark[^"]*" transform="translate\(([^)]*)\)"[^>]*><title>([^<]*)</title>', found
    ):
        marks[text] = tuple(map(float, place.split()))
    texts = [(float(a["x"]), float(a["y"]), a["text-anchor"], t) for a, t in parsed.all("text")]
    ys = {number(t): y - 4 for x, y, anchor, t in texts if anchor == "end" and re.fullmatch(r"[\d.e+-]+[kMGT]?", t)}
    xs = {number(t): x for x, y, anchor, t in texts if anchor == "middle" and re.fullmatch(r"[\d.e+-]+[kMGT]?", t)}
    return found, marks, xs, ys


def number(text):
    """12 of "12", 1e9 of "1G"."""
    letter = text[-1]
    return float(text[:-1]) * {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[letter] if letter.isalpha() else float(text)
