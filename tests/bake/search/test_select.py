"""Each procedure against its paper's formula, on numbers worked out by hand or by plain loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bake.errors import DataError
from bake.search.select import (
    NEIGHBOURS,
    by_attribution,
    by_ratio,
    by_sparsity,
    matched_random,
    prove_alone,
)
from bake.search.statistics import BINS, CONTEXTS, FeatureStatistics


def made(fired: Any, squares: Any = None, n_tokens: int = 1000) -> FeatureStatistics:
    fired = np.asarray(fired, np.int64)
    squares = fired if squares is None else squares
    n = len(fired)
    return FeatureStatistics(
        n_tokens=n_tokens,
        fired=fired,
        total=fired.astype(np.float64),
        squares=np.asarray(squares, np.float64),
        maximum=np.ones(n, np.float32),
        near=np.zeros(n, np.int64),
        histogram=np.zeros((n, BINS), np.int64),
        top_values=np.zeros((CONTEXTS, n), np.float32),
        top_places=np.zeros((CONTEXTS, n), np.int64),
    )


def test_sparsity_by_hand() -> None:
    #        0   1   2   3   4   5
    forget = made([50, 90, 90, 10, 0, 30])
    retain = made([9, 10, 0, 2, 0, 4], n_tokens=1000)
    chosen = by_sparsity(forget, retain, retain_threshold=0.01, n_features=3)
    assert [c.feature for c in chosen] == [2, 0, 5]  # 1 is at the threshold, so it is dropped
    assert [c.rank for c in chosen] == [1, 2, 3]
    first = chosen[0]
    assert (first.forget_share, first.retain_share, first.score) == (0.09, 0.0, 0.09)
    everything = by_sparsity(forget, retain, retain_threshold=1.0, n_features=99)
    assert [c.feature for c in everything] == [1, 2, 0, 5, 3]  # ties by number; 4 never fires
    without = by_sparsity(forget, retain, retain_threshold=0.01, n_features=3, exclude=[2])
    assert [c.feature for c in without] == [0, 5, 3]


def test_sparsity_against_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    forget, retain = made(rng.integers(0, 200, 500)), made(rng.integers(0, 40, 500))
    expected = sorted(
        (f for f in range(500) if retain.fired[f] / 1000 < 0.01 and forget.fired[f] > 0),
        key=lambda f: (-forget.fired[f], f),
    )[:20]
    chosen = by_sparsity(forget, retain, retain_threshold=0.01, n_features=20)
    assert [c.feature for c in chosen] == expected


def test_nothing_passes_and_the_next_threshold_is_named() -> None:
    forget, retain = made([50, 90, 3]), made([20, 50, 400])
    with pytest.raises(DataError, match=r"retain_threshold 0\.01; 2 would at 0\.1\. Raise it"):
        by_sparsity(forget, retain, retain_threshold=0.01, n_features=2)
    with pytest.raises(DataError, match=r"retain_threshold 0; 2 would at 0\.1"):
        by_sparsity(forget, retain, retain_threshold=0.0, n_features=2)
    with pytest.raises(DataError, match="none fires on the forget corpus at all"):
        by_sparsity(made([0, 0, 0]), retain, retain_threshold=0.01, n_features=2)
    with pytest.raises(DataError, match="nor any other: each fires on every retain token"):
        by_sparsity(made([5, 5]), made([1000, 1000]), retain_threshold=0.5, n_features=2)


def test_ratio_against_a_plain_loop() -> None:
    rng = np.random.default_rng(1)
    squares = rng.exponential(5, 400), rng.exponential(2, 400)
    forget = made(np.ones(400), squares[0], n_tokens=1000)
    retain = made(np.ones(400), squares[1], n_tokens=500)
    ratio = [(f / 1000) / (r / 500) for f, r in zip(*squares, strict=True)]
    bar = sorted(ratio)[380]  # 95 % of 400: twenty are left
    expected = sorted((i for i in range(400) if ratio[i] >= bar), key=lambda i: -squares[0][i])
    chosen = by_ratio(forget, retain, percentile=95.0, n_features=12)
    assert [c.feature for c in chosen] == expected[:12]
    assert chosen[0].ratio == pytest.approx(ratio[expected[0]])
    assert chosen[0].score == pytest.approx(squares[0][expected[0]] / 1000)


def test_ratio_of_features_that_never_fire_on_retain() -> None:
    forget, retain = made([1, 2, 3, 0], [9, 4, 1, 0]), made([0, 0, 5, 0], [0, 0, 1, 0])
    chosen = by_ratio(forget, retain, percentile=50.0, n_features=9)
    assert [c.feature for c in chosen] == [0, 1]
    with pytest.raises(DataError, match="none of 2 features is at percentile 50"):
        by_ratio(made([0, 0]), made([1, 1]), percentile=50.0, n_features=1)


def test_attribution_orders_by_loss_added() -> None:
    forget, retain = made([5, 6, 7]), made([1, 2, 3])
    scores = np.array([0.5, 0.25, 0.125])
    chosen = by_attribution(forget, retain, scores, {2: 0.1, 0: -0.1, 1: 0.1}, n_features=2)
    assert [(c.feature, c.score, c.attribution) for c in chosen] == [(0, -0.1, 0.5), (1, 0.1, 0.25)]
    with pytest.raises(DataError, match="no feature, clamped alone, breaks a known question"):
        by_attribution(forget, retain, scores, {}, n_features=2)


def test_proving_alone_takes_both_conditions() -> None:
    asked: list[int] = []

    def loss(feature: int) -> float:
        asked.append(feature)
        return feature / 10

    proved = prove_alone(
        range(6), breaks=lambda f: f > 1, spares=lambda f: f % 2 == 0, loss_added=loss
    )
    assert proved == {2: 0.2, 4: 0.4} and asked == [2, 4]


def test_matched_random_features_fire_about_as_often() -> None:
    rng = np.random.default_rng(2)
    share = np.exp(rng.uniform(-9, -1, 2000))
    selected = [int(f) for f in rng.choice(2000, 50, replace=False)]
    drawn = matched_random(share, selected, seed=3)
    assert len(set(drawn)) == 50 and not set(drawn) & set(selected)
    assert drawn == matched_random(share, selected, seed=3)
    assert drawn != matched_random(share, selected, seed=4)
    assert (np.abs(np.log(share[drawn] / share[selected])) < 0.2).all()


def test_matched_random_where_there_is_little_to_draw_from() -> None:
    share = np.array([0.5, 0.4, 0.0, 0.3])
    assert set(matched_random(share, [0], seed=0)) <= {1, 3}
    assert len(matched_random(share, [0, 1], seed=0)) == 1 and NEIGHBOURS > 1
