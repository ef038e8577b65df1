from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from verify.report.intervals import Interval, bootstrap, mcnemar, wilson


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [
        # scipy.stats.binomtest(right, n).proportion_ci(method="wilson")
        (0, 10, 0.0, 0.277532799862889),
        (10, 10, 0.722467200137111, 1.0),
        (7, 20, 0.1811918241010821, 0.5671457233147637),
        (35, 120, 0.21781563621038535, 0.37844234979740776),
        (1, 1, 0.206549314, 1.0),
    ],
)
def test_wilson(right: int, n: int, low: float, high: float) -> None:
    interval = wilson(right, n)
    assert interval.low == pytest.approx(low, abs=1e-9)
    assert interval.high == pytest.approx(high, abs=1e-9)


@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.95, 0.99])
@pytest.mark.parametrize(("right", "n"), [(0, 5), (3, 5), (5, 5), (60, 120), (533, 1273)])
def test_wilson_bounds_are_where_the_score_test_turns(
    right: int, n: int, confidence: float
) -> None:
    # Its definition: the shares p for which |right/n - p| = z·sqrt(p(1-p)/n).
    interval = wilson(right, n, confidence)
    deviations = [
        abs(right / n - p) / math.sqrt(p * (1 - p) / n)
        for p in (interval.low, interval.high)
        if 0 < p < 1
    ]
    for z in deviations:
        assert math.erf(z / math.sqrt(2)) == pytest.approx(confidence, abs=1e-9)
    assert len(deviations) == 2 - (right in (0, n))
    assert 0 <= interval.low <= right / n <= interval.high <= 1


def test_bootstrap_of_a_mean_is_that_of_normal_theory() -> None:
    values = np.random.default_rng(3).normal(2.0, 1.5, size=400)
    interval = bootstrap(values.tolist())
    half = 1.959964 * values.std() / math.sqrt(400)
    assert interval.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_bootstrap_of_three_values_is_that_of_all_their_draws() -> None:
    values = [0.0, 1.0, 5.0]
    means = [sum(draw) / 3 for draw in itertools.product(values, repeat=3)]
    # 1 of 27 draws is all zero and 1 all five: both quantiles are the extremes.
    assert bootstrap(values) == Interval(min(means), max(means))
    # No share of draws lies near these quantiles: cumulated they are 4, 7, 20 and 23 of 27.
    narrow = bootstrap(values, confidence=0.6)
    assert narrow.low == pytest.approx(np.quantile(means, 0.2))
    assert narrow.high == pytest.approx(np.quantile(means, 0.8))


def test_bootstrap_is_the_same_for_the_same_seed() -> None:
    values = np.random.default_rng(5).normal(size=50).tolist()
    assert bootstrap(values, seed=1) == bootstrap(values, seed=1)
    assert bootstrap(values, seed=1) != bootstrap(values, seed=2)
    assert bootstrap([4.0, 4.0]) == Interval(4.0, 4.0)


def test_bootstrap_in_parts_is_bootstrap_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [0.1, 0.7, 0.2, 0.9, 0.5]
    whole = bootstrap(values)
    monkeypatch.setattr("verify.report.intervals.RESAMPLED_AT_ONCE", 5000)
    assert bootstrap(values) == whole


@pytest.mark.parametrize(
    ("lost", "gained", "p_value"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (6, 0, 2 / 64),
        (0, 6, 2 / 64),
        (5, 1, 2 * (1 + 6) / 64),
        (3, 3, 1.0),
        # scipy.stats.binomtest(10, 42).pvalue
        (10, 32, 0.0009406740282429382),
        (1500, 200, 0.0),
    ],
)
def test_mcnemar(lost: int, gained: int, p_value: float) -> None:
    before = [True] * lost + [False] * gained + [True, False, True]
    after = [False] * lost + [True] * gained + [True, False, True]
    found = mcnemar(before, after)
    assert (found.lost, found.gained) == (lost, gained)
    assert found.p_value == pytest.approx(p_value, abs=1e-12)


def test_what_cannot_be_is_refused() -> None:
    for right, n in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="expected at least one answer"):
            wilson(right, n)
    for values in ([], [1.0, math.nan]):
        with pytest.raises(ValueError, match="expected at least one, and all of them finite"):
            bootstrap(values)
    for confidence in (0.0, 1.0):
        with pytest.raises(ValueError, match="expected between 0 and 1"):
            wilson(1, 2, confidence)
    with pytest.raises(ValueError, match="2 answers before, 1 after"):
        mcnemar([True, False], [True])
