"""How close a clamp's gates are to opening or closing, at every token.

Where a feature's pre-activation lies within rounding of its threshold, two sound computations may
decide differently whether the clamp acts. Such *edge tokens* are known beforehand, from the
reference alone, and say nothing about an engine; nor does what follows them in their sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from verify.reference.whole_sae import Site


@dataclass(frozen=True)
class Gates:
    """The gates of one clamp at some tokens: float64, [..., g] each."""

    margin: Tensor
    """Pre-activation less threshold; infinite where the token is exempt."""
    spread: Tensor
    """How far the pre-activation moves when every number that it is made of moves by its own size,
    up or down at random: times the relative size of a rounding, what one rounding does to it."""


def gates_of(h: Tensor, site: Site, exempt: Tensor) -> Gates:
    """The gates of a clamp: one of each feature, two of a gated SAE's.

    Args:
        h: [batch, seq, d_in], as the clamp reads it.
        site: the SAE, in float64, and the clamp.
        exempt: [batch, seq] bool.
    """
    import torch

    sae, features = site.sae, list(site.features)
    # What the encoder multiplies, and the same before b_dec is taken off: that is what is rounded.
    given = sae.process_sae_in(h.double())
    rounded = given + (sae.b_dec if sae.cfg.apply_b_dec_to_input else 0.0)
    W = sae.W_enc[:, features]
    margins, spreads = [], []
    for scale, bias, threshold in _gates(sae, features, site.clamp.trigger):
        margins.append(given @ (W * scale) + bias - threshold)
        spreads.append((rounded.square() @ (W * scale).square()).sqrt() + bias.abs())
    margin = torch.cat(margins, dim=-1).masked_fill(exempt[..., None], torch.inf)
    return Gates(margin, torch.cat(spreads, dim=-1))


def _gates(
    sae: Any, features: list[int], trigger: float
) -> list[tuple[Tensor | float, Tensor, Tensor | float]]:
    """(what the encoder's columns are multiplied with, bias, threshold): [k] each."""
    if sae.cfg.architecture() == "gated":
        magnitude = sae.r_mag[features].exp(), sae.b_mag[features], max(trigger, 0.0)
        return [(1.0, sae.b_gate[features], 0.0), magnitude]
    if sae.cfg.architecture() == "jumprelu":
        return [(1.0, sae.b_enc[features], sae.threshold[features].clamp(min=trigger))]
    return [(1.0, sae.b_enc[features], max(trigger, 0.0))]
