"""Loss added token by token: before and after the first firing, and as a histogram."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

EDGES = (-8.0, -4.0, -2.0, -1.0, -0.5, -0.1, -0.01, 0.0, 0.01, 0.1, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Bounds between a histogram's bins, nats; the first and the last bin are open."""


@dataclass(frozen=True)
class LossPart:
    """Loss added on some of the tokens."""

    n_tokens: int
    total: float
    """Sum of what was added, in nats; NaN where a loss is not finite."""
    max_abs: float
    """Largest change of one token's loss, in nats; NaN where a loss is not finite."""

    @property
    def mean(self) -> float | None:
        """Nats per token; None where there is no token."""
        return self.total / self.n_tokens if self.n_tokens else None

    def __add__(self, other: LossPart) -> LossPart:
        """Both together, so that batches can be collected."""
        return LossPart(
            self.n_tokens + other.n_tokens,
            self.total + other.total,
            float(np.maximum(self.max_abs, other.max_abs)),  # keeps NaN
        )


NO_TOKENS = LossPart(0, 0.0, 0.0)


@dataclass(frozen=True)
class LossSplit:
    """Loss added, apart by whether the clamp had fired by then."""

    before: LossPart = NO_TOKENS
    """Tokens predicted before any firing in their sequence: in float32 nothing is added there."""
    after: LossPart = NO_TOKENS
    """Tokens predicted at or after a firing."""

    @property
    def whole(self) -> LossPart:
        """All tokens."""
        return self.before + self.after

    def __add__(self, other: LossSplit) -> LossSplit:
        """Both together, so that batches can be collected."""
        return LossSplit(self.before + other.before, self.after + other.after)


@dataclass(frozen=True)
class LossHistogram:
    """How many tokens' losses changed by how much."""

    counts: tuple[int, ...] = (0,) * (len(EDGES) + 1)
    """Per bin: below EDGES[0], from EDGES[i] to below EDGES[i + 1], from EDGES[-1] on. Tokens
    whose loss did not change at all are in no bin."""
    unchanged: int = 0
    """Tokens whose loss is the same, bit for bit."""
    not_finite: int = 0
    """Tokens whose loss became NaN or infinite, or was."""

    def __add__(self, other: LossHistogram) -> LossHistogram:
        """Both together, so that batches can be collected."""
        return LossHistogram(
            tuple(a + b for a, b in zip(self.counts, other.counts, strict=True)),
            self.unchanged + other.unchanged,
            self.not_finite + other.not_finite,
        )


def after_firing(fired: Tensor, scored: Tensor) -> Tensor:
    """Which predictions were made at or after the first firing in their sequence.

    Args:
        fired: [batch, seq] bool, positions on which the clamp changed the residual stream, none of
            them padding.
        scored: [batch, seq] bool, the tokens of which the loss of what follows is taken.

    Returns:
        [n] bool, row by row: the token at t + 1 is predicted at t, so a firing at t is the first
        that its loss feels.
    """
    return (fired.cumsum(dim=-1) > 0)[scored]


def split(base: Tensor, edited: Tensor, after: Tensor) -> LossSplit:
    """Loss added before and after the first firing.

    Args:
        base: [n] losses of the base, nats, as `Runner.read` gives them.
        edited: [n] of another engine on the same tokens.
        after: [n] bool, as `after_firing` gives it.

    Raises:
        ValueError: the three are not of one length.
    """
    added = _added(base, edited)
    if after.shape != base.shape:
        raise ValueError(f"{len(base)} losses, {len(after)} flags; expected as many")
    flags = after.cpu().numpy()
    return LossSplit(before=_part(added[~flags]), after=_part(added[flags]))


def histogram(base: Tensor, edited: Tensor) -> LossHistogram:
    """Loss added per token, counted into bins. Arguments as `split` has them."""
    added = _added(base, edited)
    finite = added[np.isfinite(added)]
    changed = finite[finite != 0]
    bins = np.searchsorted(EDGES, changed, side="right")
    return LossHistogram(
        counts=tuple(int(n) for n in np.bincount(bins, minlength=len(EDGES) + 1)),
        unchanged=len(finite) - len(changed),
        not_finite=len(added) - len(finite),
    )


def _added(base: Tensor, edited: Tensor) -> np.ndarray:
    """[n] float64: what each token's loss grew by."""
    if base.shape != edited.shape:
        raise ValueError(f"{len(base)} losses of the base, {len(edited)} of the other")
    with np.errstate(invalid="ignore"):  # infinite minus infinite is NaN, and counted as such
        added: np.ndarray = edited.double().cpu().numpy() - base.double().cpu().numpy()
    return added


def _part(added: np.ndarray) -> LossPart:
    if not len(added):
        return NO_TOKENS
    total = float(added.sum()) if np.isfinite(added).all() else float("nan")
    worst = float(np.abs(added).max()) if np.isfinite(added).all() else float("nan")
    return LossPart(len(added), total, worst)
