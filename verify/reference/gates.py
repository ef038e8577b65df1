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
    if sae.cfg.architecture() == "topk":
        return _topk_gates(h, site, exempt)
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


def _topk_gates(h: Tensor, site: Site, exempt: Tensor) -> Gates:
    """Of a TopK SAE: a feature is active while it is above the trigger, and above the first of the
    others that would take its place, or whose place it would take; the nearer of both is its gate.
    """
    import torch

    from verify.reference.oracle import CODE_BYTES

    sae, features = site.sae, torch.tensor(site.features, device=h.device)
    k, d_sae = int(sae.cfg.k), int(sae.cfg.d_sae)
    norms = sae.W_dec.norm(dim=-1) if sae.cfg.rescale_acts_by_decoder_norm else None
    gain = torch.ones(d_sae, dtype=torch.float64, device=h.device) if norms is None else norms
    squares, biases = sae.W_enc.square(), (sae.b_enc * gain).abs()
    margins, spreads = [], []
    for x in torch.split(h.flatten(0, -2), max(1, CODE_BYTES // (8 * d_sae))):
        given = sae.process_sae_in(x.double())
        rounded = given + (sae.b_dec if sae.cfg.apply_b_dec_to_input else 0.0)
        pre = (given @ sae.W_enc + sae.b_enc) * gain
        values, places = pre.topk(min(k + 1, d_sae), dim=-1)
        if k == d_sae:  # none is left out
            values = torch.cat([values, torch.full_like(values[:, :1], -torch.inf)], dim=-1)
            places = torch.cat([places, places[:, -1:]], dim=-1)
        sizes = rounded.square()
        # [n, 2] how far each of the two at the border moves: the last that is in, the first out.
        border = places[:, k - 1 :]
        moved = (sizes[:, None, :] * squares.T[border]).sum(-1).sqrt() * gain[border]
        moved = moved + biases[border]
        own = pre[:, features]
        moves = (sizes @ squares[:, features]).sqrt() * gain[features] + biases[features]
        inside = own >= values[:, k - 1, None]
        by_rank = own - torch.where(inside, values[:, k, None], values[:, k - 1, None])
        rank_moves = moves + torch.where(inside, moved[:, 1:], moved[:, :1])
        by_trigger = own - max(site.clamp.trigger, 0.0)
        nearer = by_rank <= by_trigger
        margins.append(torch.where(nearer, by_rank, by_trigger))
        spreads.append(torch.where(nearer, rank_moves, moves))
    shape = (*h.shape[:-1], len(features))
    margin = torch.cat(margins).view(shape).masked_fill(exempt[..., None], torch.inf)
    return Gates(margin, torch.cat(spreads).view(shape))
