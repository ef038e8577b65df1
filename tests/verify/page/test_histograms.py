"""Histograms: where bars stand, how high, and what is said of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bake.errors import ReportError
from tests.reports import full_evidence, full_report
from verify.compare.loss_split import EDGES, LossHistogram, LossSplit
from verify.page.histograms import error_histograms, loss_histograms
from verify.report.findings import ERROR_EDGES, VerifyReport
from verify.report.measures import LossAdded


def test_a_histogram_has_its_edges_where_its_bins_meet() -> None:
    plots = loss_histograms(full_evidence())
    assert [plot.title for plot in plots] == ["hooked reference", "checkpoint", "onnx", "onnx-int4"]
    plot = plots[1]
    assert len(plot.bins) == len(EDGES) + 1
    assert {label: at for at, label in plot.ticks}["0"] == plot.line == plot.bins[8].start
    assert {b.tone for b in plot.bins[:8]} == {"before"} and {b.tone for b in plot.bins[8:]} == {
        "after"
    }
    assert max(b.height for b in plot.bins) == 1 and plot.bins[8].height == 1
    assert plot.bins[8].said == "0 to 0.01 nats: 611 tokens"
    assert plot.bins[0].said == "below -8 nats: 0 tokens" and plot.bins[0].count == ""
    assert plot.note == "2,822 of 8,192 tokens changed; 5,370 did not, to the last bit."


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, ""), (999, "999"), (1000, "1.0k"), (9949, "9.9k"), (12_345, "12k"), (2_500_000, "2M")],
)
def test_counts_fit_over_a_bar(count: int, text: str) -> None:
    counts = (count,) + (0,) * len(EDGES)
    detail = LossAdded(LossSplit(), LossHistogram(counts, 0, 3))
    engine = replace(full_evidence().engines[2], loss_detail=detail)
    (plot,) = loss_histograms(full_evidence(engines=(engine,)))
    assert plot.bins[0].count == text and len(text) <= 4
    assert "3 became infinite or no number" in plot.note


def test_errors_are_shown_of_the_folders_engines_by_decade() -> None:
    errors = (5, 0, 3, 0, 0, 2, 0, 0, 0, 1)
    assert len(errors) == len(ERROR_EDGES) + 1
    engines = tuple(
        replace(engine, parity=replace(engine.parity, errors=errors))
        for engine in full_evidence().engines
        if engine.parity is not None
    )
    plots = error_histograms(full_evidence(engines=engines))
    shown = [engine.name for engine in engines if engine.name != "reference"]
    assert [plot.title for plot in plots] == shown
    plot = plots[1]
    assert [b.count for b in plot.bins] == ["5", "", "3", "", "", "2", "", "", "", "1"]
    assert plot.bins[2].said == "1e-06 to 1e-05 |Δlogit|: 3 tokens"
    assert plot.note == "5 of 11 tokens are below 1e-07." and plot.line is None
    assert plot.ticks[0] == (pytest.approx(0.1), "1e-7")


def test_nothing_measured_is_no_histogram() -> None:
    for report in (full_report(), VerifyReport("folder", "layer", True, "integrity", ())):
        assert loss_histograms(report) == error_histograms(report) == ()


@pytest.mark.parametrize("n", [len(ERROR_EDGES), len(ERROR_EDGES) + 2])
def test_a_report_with_other_bins_is_refused(n: int) -> None:
    report = full_evidence()
    engines = tuple(
        engine
        if engine.parity is None
        else replace(engine, parity=replace(engine.parity, errors=(1,) * n))
        for engine in report.engines
    )
    with pytest.raises(ReportError, match=rf"has {n} bins; expected {len(ERROR_EDGES) + 1}"):
        error_histograms(replace(report, engines=engines))
