from __future__ import annotations

import math
from dataclasses import replace

import pytest

from bake.rounding import BAR
from tests.reports import PARITY, ROUNDING, full_report
from verify.engines.engine_names import engine_of
from verify.page.plots import accuracy_plots, fired_plot, parity_plots
from verify.report.findings import Parity, VerifyReport
from verify.report.intervals import wilson
from verify.tolerances import kl_bar, parity_failures


def compared(name: str, parity: Parity, dtype: str = "float32") -> VerifyReport:
    report = full_report(parity=parity)
    base, engine = report.engines
    return replace(report, engines=(base, replace(engine, name=name)), dtype=dtype)


def test_accuracies_stand_where_they_are_with_wilson_intervals() -> None:
    forget, retain = accuracy_plots(full_report())
    assert [row.at for row in forget.rows] == [0.5, 0.5]
    assert [(row.low, row.high) for row in forget.rows] == [wilson(2, 4)] * 2
    assert [(row.low, row.high) for row in retain.rows] == [wilson(8, 8)] * 2
    assert [row.tone for row in forget.rows] == ["before", "after"]
    plain, _ = accuracy_plots(replace(full_report(), prompt="plain"))
    assert [row.at for row in plain.rows] == [0.25, 0.25]
    assert "4 questions" in forget.note and "8 questions" in retain.note


@pytest.mark.parametrize(
    ("engine", "worst", "limited", "tone"),
    [
        ("checkpoint", 2.0, True, "after"),
        ("adapter", 9.0, True, "bad"),
        ("compiled", BAR, True, "after"),
        ("onnx", 1e4, True, "bad"),
        ("onnx-int4", 1e4, False, "after"),
        ("base", 1e6, False, "before"),
    ],
)
def test_the_page_paints_red_what_the_suite_fails(
    engine: str, worst: float, limited: bool, tone: str
) -> None:
    rounding = replace(ROUNDING, worst=worst)
    parity = replace(PARITY, rounding=rounding)
    report = compared(engine, parity)
    (row,) = [row for row in parity_plots(report)[0].rows if row.label == engine]
    assert (row.label, row.tone) == (engine, tone)
    assert row.value.endswith("limit 8.0e+00") is limited
    assert (row.bar is None) is not limited
    failures = list(parity_failures(engine, parity, 12)) if engine_of(engine).held else []
    assert bool(failures) is (row.tone == "bad")


def test_kl_has_its_limit_too() -> None:
    out = replace(ROUNDING, mean_kl=2 * kl_bar(ROUNDING))
    kl = parity_plots(compared("checkpoint", replace(PARITY, rounding=out)))[1]
    assert kl.rows[0].tone == "bad" and kl.rows[0].bar is not None
    assert "100 tokens at a gate's edge" in kl.note


@pytest.mark.parametrize("measured", [0.0, 1e-300, 1e-9, 1.0, 1e300, math.inf, math.nan])
def test_a_log_scale_holds_any_number(measured: float) -> None:
    parity = replace(PARITY, rounding=replace(ROUNDING, worst=measured))
    plots = parity_plots(compared("checkpoint", parity))
    for plot in plots:
        for row in plot.rows:
            assert 0 <= row.at <= 1
            assert row.bar is None or 0 <= row.bar <= 1
        assert all(0 <= at <= 1 for at, _ in plot.ticks) and 2 <= len(plot.ticks) <= 7
    if not math.isfinite(measured):
        assert plots[0].rows[0].tone == "bad"


def test_a_power_of_ten_stands_on_its_tick() -> None:
    parity = replace(PARITY, rounding=replace(ROUNDING, worst=1e-2))
    plot = parity_plots(compared("checkpoint", parity))[0]
    assert {label: at for at, label in plot.ticks}["1e-2"] == plot.rows[0].at


def test_layers_that_fired_and_one_that_did_not() -> None:
    plot = fired_plot(replace(full_report(), fired_by_layer=((0, 50), (3, 0), (7, 100))))
    assert plot is not None
    found = [(row.label, row.at, row.tone) for row in plot.rows]
    assert found == [("layer 0", 0.5, "after"), ("layer 3", 0, "bad"), ("layer 7", 1, "after")]
    silent = fired_plot(replace(full_report(), fired_by_layer=((3, 0),)))
    assert silent is not None and silent.rows[0].at == 0


def test_nothing_measured_is_no_plot() -> None:
    report = VerifyReport("folder", "layer", True, "integrity", ())
    assert accuracy_plots(report) == parity_plots(report) == ()
    assert fired_plot(report) is None
