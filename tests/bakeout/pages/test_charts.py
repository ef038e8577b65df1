"""Coordinates: order is kept, zeros have their own place, the trigger stands where it is."""

from __future__ import annotations

import numpy as np
import pytest

from bake.search.statistics import BINS, CONTEXTS, FeatureStatistics
from bakeout.pages import charts


def made(fired: list[int], histogram: np.ndarray | None = None) -> FeatureStatistics:
    n = len(fired)
    zeros = np.zeros((CONTEXTS, n))
    return FeatureStatistics(
        n_tokens=1000,
        fired=np.array(fired),
        total=np.array(fired, float),
        squares=np.array(fired, float),
        maximum=np.ones(n, np.float32),
        near=np.zeros(n, np.int64),
        histogram=np.zeros((n, BINS), np.int64) if histogram is None else histogram,
        top_values=zeros.astype(np.float32),
        top_places=zeros.astype(np.int64),
    )


def test_scatter_is_logarithmic_with_a_place_for_zero() -> None:
    plot = charts.share_scatter(made([0, 1, 10, 100]), made([5, 0, 1, 0]), [3])
    y = {dot.text.split(":")[0]: dot.y for dot in plot.dots}
    steps = [y["feature 1"] - y["feature 2"], y["feature 2"] - y["feature 3"]]
    assert steps[0] == pytest.approx(steps[1]) and steps[0] > 0
    assert y["feature 0"] == plot.bottom
    assert [dot.kind for dot in plot.dots] == ["other"] * 3 + ["chosen"]
    assert plot.dots[-1].link == "#f3" and "forget 0.10000, retain 0.00000" in plot.dots[-1].text
    ticks = {label: at for at, label in plot.x_ticks}
    assert ticks["0"] == plot.left and ticks["1"] == pytest.approx(plot.right)


def test_many_features_are_thinned_and_that_is_said() -> None:
    plot = charts.share_scatter(made([5] * 9000), made([5] * 9000), [1, 2])
    assert len(plot.dots) <= charts.MOST_DOTS + 2 and "1 in 3 of those" in plot.title


def test_histogram_and_trigger() -> None:
    counts = np.zeros((1, BINS), np.int64)
    counts[0, [14, 16]] = 10, 20  # 2 to 2.83, and 4 to 5.66
    plot = charts.activation_histogram(made([30], counts), made([0]), 0, 4.0)
    assert [bar.height for bar in plot.bins] == [0.5, 1.0]
    assert plot.bins[1].said.startswith("forget: 4 to 5.66, 2.00e-02 of tokens")
    assert plot.line == pytest.approx(plot.bins[1].start)
    assert charts.activation_histogram(made([30], counts), made([0]), 0, 0.0).line == 0
    assert charts.activation_histogram(made([0]), made([0]), 0, 0.0).bins == ()
