"""Selection: from feature statistics to the features that are to be clamped, and why."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bake.errors import DataError
from bake.search.statistics import FeatureStatistics

EPSILON = 1e-12
"""Least mean square that a ratio divides by: a feature that never fires on retain has a ratio."""
NEIGHBOURS = 10
"""Among how many features of the nearest firing share a matched random one is drawn."""


@dataclass(frozen=True)
class Chosen:
    """A selected feature, and why."""

    feature: int
    rank: int
    """From 1."""
    forget_share: float
    """Share of forget tokens on which it fires."""
    retain_share: float
    """Share of retain tokens on which it fires."""
    score: float
    """What it was ordered by: forget share, mean square on forget, or loss added."""
    ratio: float | None = None
    """ratio only: mean square on forget over mean square on retain."""
    attribution: float | None = None
    """attribution only: summed over the known questions."""


Scores = NDArray[np.float64]


def by_sparsity(
    forget: FeatureStatistics,
    retain: FeatureStatistics,
    *,
    retain_threshold: float,
    n_features: int,
    exclude: Collection[int] = (),
) -> list[Chosen]:
    """Among features that fire on less than a share of the retain tokens, those that fire most
    on forget. Ties go to the lower number; a feature that never fires on forget is not taken.

    Raises:
        DataError: no feature passes; says how many would at the next threshold.

    Source: Farrell et al., arXiv 2410.19278.
    """
    fires = _eligible(forget, exclude)
    passing = fires & (retain.share < retain_threshold)
    if not passing.any():
        raise DataError(_none_passes(fires, retain.share, retain_threshold))
    return _ranked(forget, retain, passing, forget.share, n_features)


def by_ratio(
    forget: FeatureStatistics,
    retain: FeatureStatistics,
    *,
    percentile: float,
    n_features: int,
    exclude: Collection[int] = (),
) -> list[Chosen]:
    """Among features whose mean square on forget over that on retain is in the top percentiles
    of all features, those with the greatest mean square on forget.

    Raises:
        DataError: no feature fires on the forget corpus.

    Source: Dynamic SAE guardrails, arXiv 2504.08192.
    """
    ratio = forget.mean_square / np.maximum(retain.mean_square, EPSILON)
    passing = _eligible(forget, exclude) & (ratio >= np.percentile(ratio, percentile))
    if not passing.any():
        raise DataError(
            f"selection by ratio: none of {len(ratio):,} features is at percentile {percentile:g} "
            "and fires on the forget corpus; lower `ratio_percentile`, or check the corpus"
        )
    return _ranked(forget, retain, passing, forget.mean_square, n_features, ratio=ratio)


def by_attribution(
    forget: FeatureStatistics,
    retain: FeatureStatistics,
    attribution: Scores,
    loss_added: dict[int, float],
    *,
    n_features: int,
) -> list[Chosen]:
    """Features that proved themselves when clamped alone, those first that add least loss.

    Args:
        forget: statistics, for the record.
        retain: statistics, for the record.
        attribution: [d_sae], summed over the known questions.
        loss_added: nats/token on retained text, of each feature that, clamped alone, breaks a
            known question and changes no retained one.
        n_features: how many to take.

    Raises:
        DataError: there is no such feature.

    Source: Farrell et al., arXiv 2410.19278.
    """
    if not loss_added:
        raise DataError(
            "selection by attribution: no feature, clamped alone, breaks a known question and "
            "changes no retained one; take a stronger `value`, or select by sparsity"
        )
    order = sorted(loss_added, key=lambda feature: (loss_added[feature], feature))[:n_features]
    return _chosen(forget, retain, order, loss_added, attribution=attribution)


def prove_alone(
    candidates: Iterable[int],
    *,
    breaks: Callable[[int], bool],
    spares: Callable[[int], bool],
    loss_added: Callable[[int], float],
) -> dict[int, float]:
    """Of candidates, the loss added by each that breaks a known question and spares the retained.

    Args:
        candidates: features.
        breaks: whether clamping the feature alone breaks at least one order of a known question.
        spares: whether it changes no retained question.
        loss_added: nats/token on retained text.
    """
    return {f: loss_added(f) for f in candidates if breaks(f) and spares(f)}


def matched_random(share: Scores, selected: Sequence[int], *, seed: int) -> list[int]:
    """Control: for each selected feature a random other one that fires about as often.

    Args:
        share: [d_sae], firing share on the forget corpus.
        selected: features.
        seed: of the draw.

    Returns:
        As many features, none of them selected, no two the same.
    """
    rng = random.Random(seed)
    free = share > 0
    free[list(selected)] = False
    size = np.log(np.maximum(share, EPSILON))
    drawn: list[int] = []
    for feature in selected[: int(free.sum())]:
        distance = np.where(free, np.abs(size - size[feature]), np.inf)
        nearest = np.argsort(distance, kind="stable")[: min(NEIGHBOURS, int(free.sum()))]
        drawn.append(int(rng.choice(list(nearest))))
        free[drawn[-1]] = False
    return drawn


def _eligible(forget: FeatureStatistics, exclude: Collection[int]) -> NDArray[np.bool_]:
    fires: NDArray[np.bool_] = forget.fired > 0
    fires[list(exclude)] = False
    return fires


def _ranked(
    forget: FeatureStatistics,
    retain: FeatureStatistics,
    passing: NDArray[np.bool_],
    score: Scores,
    n_features: int,
    *,
    ratio: Scores | None = None,
) -> list[Chosen]:
    candidates = np.flatnonzero(passing)
    order = candidates[np.argsort(-score[candidates], kind="stable")][:n_features]
    return _chosen(forget, retain, order.tolist(), score, ratio=ratio)


def _chosen(
    forget: FeatureStatistics,
    retain: FeatureStatistics,
    order: Sequence[int],
    score: Scores | Mapping[int, float],
    *,
    ratio: Scores | None = None,
    attribution: Scores | None = None,
) -> list[Chosen]:
    """Features in their order, with what is known of each."""
    return [
        Chosen(
            feature,
            rank,
            float(forget.share[feature]),
            float(retain.share[feature]),
            float(score[feature]),
            None if ratio is None else float(ratio[feature]),
            None if attribution is None else float(attribution[feature]),
        )
        for rank, feature in enumerate(order, 1)
    ]


def _none_passes(fires: NDArray[np.bool_], retain_share: Scores, threshold: float) -> str:
    start = f"selection by sparsity: no feature passes retain_threshold {threshold:g}"
    if not fires.any():
        return f"{start}: none fires on the forget corpus at all; check the corpus and the SAE"
    following, would = max(threshold, 1e-6), 0
    while not would:
        if following == 1:
            return f"{start}, nor any other: each fires on every retain token; check the corpora"
        following = min(10 * following, 1.0)
        would = int((fires & (retain_share < following)).sum())
    return f"{start}; {would:,} would at {following:g}. Raise it, or check the retain corpus"
