"""The page of an audit: whole, without script, no folder's name in its markup."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

from tests.verify.audit.audited import an_audit
from verify.audit.audit_report import AuditReport
from verify.audit.audit_words import sentences
from verify.page.audit_page import effort_curves, render_audit, worst_plot

VOID = {"meta", "line", "circle", "rect", "polyline", "br"}


class Balanced(HTMLParser):
    """Raises where an element is closed that is not open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, _: object) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def test_the_page_is_whole_and_says_what_the_terminal_says() -> None:
    report = an_audit()
    page = render_audit(report)
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert "<script" not in page
    assert not re.search(r"(src|href)=\"(?!#)", page)
    for audit in report.folders:
        for sentence in sentences(audit):
            assert sentence in page
        for sweep in audit.sweeps:
            assert sweep.attack in page


def test_names_are_shown_as_text() -> None:
    report = an_audit()
    odd = replace(report.folders[0], folder='<img src=x onerror="alert(1)">\x1b')
    page = render_audit(replace(report, folders=(odd,)))
    assert "<img" not in page
    assert "\x1b" not in page
    broken = AuditReport("none", (0, 1, 2), failures=(("<b>x</b>", "file: changed"),))
    assert "&lt;b&gt;x&lt;/b&gt;: file: changed" in render_audit(broken)


def test_marks_stand_where_the_figures_are() -> None:
    merged, _ = an_audit().folders
    plot = worst_plot(merged)
    assert [row.at for row in plot.rows][:2] == [0.9, 0.75]
    assert plot.rows[0].before is not None
    assert plot.rows[0].before.at == 0.25
    curves = effort_curves(merged.sweeps, 0.25)
    assert curves is not None
    first = curves.curves[0].points
    assert [x for x, *_ in first] == sorted(x for x, *_ in first)
    zero, one = curves.y_ticks[0][0], curves.y_ticks[-1][0]
    assert (zero - first[1][1]) / (zero - one) == 0.9
    assert effort_curves((), 0.25) is None
