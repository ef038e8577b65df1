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
_CLOSE = 0.05
"""Logits of which none differs by more, but for what all of them share, are compared in float32."""


def kl_nats(reference: Tensor, engine: Tensor) -> Tensor:
    """KL(reference ‖ engine) of next-token distributions.

    Where the two are close, by the series of what it is, the mean of exp(c) - 1 - c for the centred
    differences c: exact to some digits however small it is, and several times as fast as the
    difference of two logarithms in float64, which is taken elsewhere.

    Args:
        reference: [n, vocab] logits.
        engine: [n, vocab] logits.

    Returns:
        [n] float64, nats.
    """
    import torch

    p = reference.float().softmax(dim=-1)
    c = engine.float() - reference.float()
    c -= (p * c).sum(dim=-1, keepdim=True)
    close = torch.maximum(c.amax(dim=-1), -c.amin(dim=-1)) < _CLOSE  # false where one is NaN
    c = c if bool(close.all()) else c.masked_fill(~close[:, None], 0.0)
    terms = c * (1 / 24) + 1 / 6
    terms = terms.mul_(c).add_(1 / 2).mul_(c).mul_(c)
    kl = terms.mul_(p).sum(dim=-1).double().log1p()
    if not bool(close.all()):
        log_p = reference[~close].double().log_softmax(dim=-1)
        log_q = engine[~close].double().log_softmax(dim=-1)
        kl[~close] = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    return kl


def max_abs_difference(reference: Tensor, engine: Tensor) -> Tensor:
    """Largest |Δlogit| of every token: [n, vocab] twice → [n]; infinite where not finite."""
    largest = (engine - reference).abs_().amax(dim=-1)
    return largest.nan_to_num(nan=math.inf, posinf=math.inf)


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
        same = ours.argmax(-1) == theirs.argmax(-1)
        distance = max_abs_difference(ours, theirs)
        parts.append((kl_nats(ours, theirs), distance, same, ours.abs().amax(-1)))
    return Compared(*(torch.cat(part) for part in zip(*parts, strict=True)))
