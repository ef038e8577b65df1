"""How sure a measured share is."""

from __future__ import annotations

import math


def wilson(right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Interval of a share of which `right` of `n` were counted; (0, 1) where nothing was.

    Args:
        right: how many, 0 to n.
        n: of how many.
        z: quantile of the normal distribution; the default gives 95 %.

    Source: Wilson, J. Am. Stat. Assoc. 22 (1927), 209-212.
    """
    if not 0 <= right <= n:
        raise ValueError(f"{right} of {n}: expected 0 to {n}")
    if n == 0:
        return 0.0, 1.0
    share, weight = right / n, z * z / n
    middle = (share + weight / 2) / (1 + weight)
    half = z * math.sqrt(share * (1 - share) / n + weight / (4 * n)) / (1 + weight)
    return max(0.0, middle - half), min(1.0, middle + half)
