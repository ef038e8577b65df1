"""Attack: a linear probe, trained to tell the right letter from the residual stream on some facts,
tried on others.

What it finds on facts that it never saw the model holds, whether the model says it or not. Ridge
regression in closed form: no seed, no steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PENALTY = 1.0
"""Beside the mean squared error, with inputs of unit variance."""


@dataclass(frozen=True)
class Probed:
    """The best place to read from, and what a probe says there."""

    place: int
    """Index of the place."""
    chosen: Tensor
    """[m] the class of each that was asked."""


def probe(known: Tensor, classes: Tensor, asked: Tensor) -> Probed:
    """Train one probe for every place, and ask the one that does best on its own rows, each in turn
    left out.

    Args:
        known: [places, n, d] residual streams.
        classes: [n] of them, from 0.
        asked: [places, m, d].
    """
    right = torch.stack([(left_out(h, classes) == classes).sum() for h in known])
    place = int(right.argmax())
    return Probed(place, _Ridge(known[place], classes).says(asked[place]))


def left_out(h: Tensor, classes: Tensor) -> Tensor:
    """What a probe says of each row when it is trained on all others: [n].

    Args:
        h: [n, d].
        classes: [n], from 0.
    """
    return _Ridge(h, classes).left_out()


class _Ridge:
    """Ridge regression onto one indicator for each class, in float64."""

    def __init__(self, h: Tensor, classes: Tensor) -> None:
        h = h.double()
        self._mean, self._spread = h.mean(dim=0), h.std(dim=0, correction=0)
        self._spread[self._spread == 0] = 1
        self._x = self._scaled(h)
        n_classes = int(classes.max()) + 1
        indicators = torch.nn.functional.one_hot(classes, n_classes).double()
        self._offset = indicators.mean(dim=0)
        self._y = indicators - self._offset
        gram = self._x @ self._x.T
        penalty = PENALTY * len(gram) * torch.eye(len(gram), dtype=gram.dtype)
        self._hat = torch.linalg.solve(gram + penalty, gram)  # [n, n]
        self._dual = torch.linalg.solve(gram + penalty, self._y)  # [n, classes]

    def _scaled(self, h: Tensor) -> Tensor:
        return (h.double() - self._mean) / self._spread

    def says(self, h: Tensor) -> Tensor:
        """[m, d] → [m]."""
        scores: Tensor = self._scaled(h) @ self._x.T @ self._dual + self._offset
        return scores.argmax(dim=-1)

    def left_out(self) -> Tensor:
        """[n], by what every row takes part in its own fit, 1/n of it through the mean; inputs are
        scaled as with all rows.
        """
        n = len(self._y)
        share = self._hat.diagonal() + 1 / n  # of the fit with its offset
        fitted = self._hat @ self._y
        without: Tensor = (fitted - share[:, None] * self._y) / (1 - share)[:, None]
        return (without + self._offset).argmax(dim=-1)
