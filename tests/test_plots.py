from __future__ import annotations

import math
from dataclasses import replace

import pytest
from test_report import PARITY, full_report

from verify.intervals import wilson
from verify.plots import accuracy_plots, fired_plot, parity_plots
from verify.report import Parity, VerifyReport


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
    ("engine", "measured", "dtype", "limit", "tone"),
    [
        ("checkpoint", 2e-4, "float32", "3.0e-04", "after"),
        ("adapter", 4e-4, "float32", "3.0e-04", "bad"),
        ("onnx", 2e-4, "float32", "3.0e-04", "after"),  # 1e-5 of the largest logit, 30
        ("onnx-int4", 2.0, "float32", None, "after"),
        ("checkpoint", 2.0, "bfloat16", None, "after"),
    ],
)
def test_each_engine_has_its_own_limit(
    engine: str, measured: float, dtype: str, limit: str | None, tone: str
) -> None:
    report = compared(engine, replace(PARITY, max_abs_logit=measured), dtype)
    (row,) = parity_plots(report)[0].rows
    assert (row.label, row.tone) == (engine, tone)
    assert row.value.endswith(f"limit {limit}") if limit else "limit" not in row.value
    assert (row.bar is None) is (limit is None)
    if row.bar is not None:
        assert (row.at < row.bar) is (tone == "after")


def test_kl_has_the_limit_where_the_dtype_rounds() -> None:
    kl = parity_plots(compared("checkpoint", replace(PARITY, mean_kl=2e-3), "bfloat16"))[1]
    assert kl.rows[0].tone == "bad" and kl.rows[0].bar is not None


@pytest.mark.parametrize("measured", [0.0, 1e-300, 1e-9, 1.0, 1e300, math.inf, math.nan])
def test_a_log_scale_holds_any_number(measured: float) -> None:
    for plot in parity_plots(compared("checkpoint", replace(PARITY, max_abs_logit=measured))):
        for row in plot.rows:
            assert 0 <= row.at <= 1
            assert row.bar is None or 0 <= row.bar <= 1
        assert all(0 <= at <= 1 for at, _ in plot.ticks) and 2 <= len(plot.ticks) <= 7
    if not math.isfinite(measured):
        row = parity_plots(compared("checkpoint", replace(PARITY, max_abs_logit=measured)))[0]
        assert row.rows[0].tone == "bad"


def test_a_power_of_ten_stands_on_its_tick() -> None:
    plot = parity_plots(compared("checkpoint", replace(PARITY, max_abs_logit=1e-2)))[0]
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
