"""Two engines' logits of the same tokens: how far apart they are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_CHUNK_BYTES = 2 << 20
"""How much of the logits is looked at at once: so much that every step finds it in the processor's
cache, which is worth more than all else."""
_CLOSE, _FAR = 0.05, 60.0
"""Centred differences below the one are put into a series, those from the other on need float64:
their exponential may be more than float32 holds."""


def kl_nats(reference: Tensor, engine: Tensor) -> Tensor:
    """KL(reference ‖ engine) of next-token distributions.

    It is the logarithm of the mean of exp(c) under the reference, for the differences c less their
    own mean; so log1p of the mean of exp(c) - 1 - c, which has digits however small it is, and is
    several times as fast in float32 as the difference of two logarithms in float64.

    Args:
        reference: [n, vocab] logits.
        engine: [n, vocab] logits.

    Returns:
        [n] float64, nats.
    """
    c = engine.float() - reference.float()
    return _kl_nats(reference, engine, c, c.amax(dim=-1), c.amin(dim=-1))


def _kl_nats(reference: Tensor, engine: Tensor, c: Tensor, high: Tensor, low: Tensor) -> Tensor:
    """The same, given their difference and its extremes, [n]. Changes `c`."""
    import torch

    p = reference.float().softmax(dim=-1)
    total = p.sum(dim=-1)
    mean = (p * c).sum(dim=-1) / total
    c -= mean[:, None]
    apart = torch.maximum(high - mean, mean - low)
    terms = c * (1 / 24)
    terms.add_(1 / 6).mul_(c).add_(1 / 2).mul_(c).mul_(c)
    if not bool((apart < _CLOSE).all()):
        terms = torch.where(c.abs() < _CLOSE, terms, c.expm1().sub_(c))
    kl = (terms.mul_(p).sum(dim=-1) / total).double().log1p()
    far = ~(apart < _FAR)  # so where one is NaN
    if bool(far.any()):
        log_p, log_q = (of[far].double().log_softmax(dim=-1) for of in (reference, engine))
        kl[far] = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    return kl


def max_abs_difference(reference: Tensor, engine: Tensor) -> Tensor:
    """Largest |Δlogit| of every token: [n, vocab] twice → [n]; infinite where not finite."""
    c = engine - reference
    return _largest(c.amax(dim=-1), c.amin(dim=-1))


def _largest(high: Tensor, low: Tensor) -> Tensor:
    """The larger distance from 0 of two extremes; infinite where not finite."""
    import torch

    return torch.maximum(high, -low).nan_to_num(nan=math.inf, posinf=math.inf)


@dataclass(frozen=True)
class Compared:
    """Two engines' logits at some tokens: [n] each."""

    kl: Tensor
    """float64, nats."""
    distance: Tensor
    """Largest |Δlogit|."""
    same_top1: Tensor
    """bool: both put the same token first."""
    largest: Tensor
    """Largest |logit| of the first."""


def compare_logits(reference: Tensor, engine: Tensor) -> Compared:
    """Two engines' logits of the same tokens, [n, vocab] each, a few tokens at a time."""
    import torch

    if reference.shape != engine.shape:
        raise ValueError(
            f"logits have shape {list(engine.shape)}; the reference's have {list(reference.shape)}"
        )
    at_once = max(1, _CHUNK_BYTES // (4 * reference.shape[-1]))
    parts = []
    for ours, theirs in zip(
        torch.split(reference, at_once), torch.split(engine, at_once), strict=True
    ):
        c = theirs.float() - ours.float()
        high, low = c.amax(dim=-1), c.amin(dim=-1)
        first, second = ours.max(dim=-1), theirs.max(dim=-1)
        largest = torch.maximum(first.values, -ours.amin(dim=-1))
        kl = _kl_nats(ours, theirs, c, high, low)
        parts.append((kl, _largest(high, low), first.indices == second.indices, largest))
    return Compared(*(torch.cat(part) for part in zip(*parts, strict=True)))
