"""How sure a figure is: intervals around shares and means, and a test for before against after."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 10_000
"""Of a bootstrap."""
RESAMPLED_AT_ONCE = 4_000_000
"""Most draws that a bootstrap holds at a time."""


class Interval(NamedTuple):
    """Where a figure lies, at a confidence of 95 % unless another was asked for."""

    low: float
    high: float


@dataclass(frozen=True)
class McNemar:
    """Before against after on the same questions."""

    lost: int
    """Right before, wrong after."""
    gained: int
    """Wrong before, right after."""
    p_value: float
    """Chance of a split at least as uneven if losing and gaining were equally likely."""


def wilson(right: int, n: int, confidence: float = CONFIDENCE) -> Interval:
    """Interval of a share of `n` independent answers, `right` of them right.

    Raises:
        ValueError: there is no answer, more are right than there are, or the confidence is not
            between 0 and 1.

    Source: Wilson, J. Am. Stat. Assoc. 22 (1927).
    """
    if not 0 <= right <= n or n < 1:
        raise ValueError(f"{right} right of {n}; expected at least one answer and 0 to {n} right")
    z = NormalDist().inv_cdf(_upper(confidence))
    share = right / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # The bounds at 0 and n are exact; the square root leaves them a rounding error away.
    low = 0.0 if right == 0 else max(0.0, centre - half)
    high = 1.0 if right == n else min(1.0, centre + half)
    return Interval(low, high)


def bootstrap(
    values: Sequence[float], *, seed: int = 0, confidence: float = CONFIDENCE
) -> Interval:
    """Interval of a mean: the quantiles of the means of random draws with replacement.

    For before against after on the same items, give the differences.

    Args:
        values: one per item.
        seed: of the draws; the same seed gives the same interval.
        confidence: between 0 and 1.

    Raises:
        ValueError: there is no value, one is not finite, or the confidence is out of range.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), percentile interval.
    """
    upper = _upper(confidence)
    known = np.asarray(values, dtype=np.float64)
    if known.size == 0 or not np.isfinite(known).all():
        raise ValueError(f"{known.size} values; expected at least one, and all of them finite")
    draws = np.random.default_rng(seed)
    at_once = max(1, RESAMPLED_AT_ONCE // known.size)
    means: list[float] = []
    while len(means) < RESAMPLES:
        rows = min(at_once, RESAMPLES - len(means))
        means.extend(known[draws.integers(known.size, size=(rows, known.size))].mean(axis=1))
    low, high = np.quantile(means, [1 - upper, upper])
    return Interval(float(low), float(high))


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> McNemar:
    """McNemar's exact test: are answers lost as often as gained?

    Args:
        before: per question, whether it was answered right.
        after: the same questions in the same order.

    Raises:
        ValueError: the two are not of one length.

    Source: McNemar, Psychometrika 12 (1947); the exact, two-sided form.
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} answers before, {len(after)} after; expected as many")
    lost = sum(was and not now for was, now in zip(before, after, strict=True))
    gained = sum(now and not was for was, now in zip(before, after, strict=True))
    n = lost + gained
    tail = sum(math.comb(n, k) for k in range(min(lost, gained) + 1))
    return McNemar(lost, gained, min(1.0, 2 * tail / 2**n))


def _upper(confidence: float) -> float:
    """The quantile at an interval's upper end."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence}; expected between 0 and 1")
    return (1 + confidence) / 2
