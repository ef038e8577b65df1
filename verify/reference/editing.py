"""What each method makes of the whole code of an SAE, in its paper's own form.

Shares no arithmetic with `bake`, which writes the same as rows of one equation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bake.recipe import Clamp


def clamp_feature(acts: Tensor, features: Sequence[int], value: float, trigger: float) -> Tensor:
    """An active feature becomes a constant. Source: Farrell et al., arXiv 2410.19278; with a
    trigger above 0, Shportko et al., arXiv 2503.11127.

    Args:
        acts: [..., d_sae] feature activations.
        features: which.
        value: the constant, in the SAE's activation units.
        trigger: a feature is active when its activation is greater.

    Returns:
        [..., d_sae].
    """
    edited = acts.clone()
    for f in features:
        edited[..., f] = torch.where(acts[..., f] > trigger, value, acts[..., f])
    return edited


def zero_ablate(acts: Tensor, features: Sequence[int], trigger: float) -> Tensor:
    """An active feature becomes 0. Source: Farrell et al., arXiv 2410.19278."""
    edited = acts.clone()
    for f in features:
        edited[..., f] = torch.where(acts[..., f] > trigger, 0.0, acts[..., f])
    return edited


def scale_feature(
    acts: Tensor, features: Sequence[int], multiplier: float, trigger: float
) -> Tensor:
    """An active feature loses `multiplier` times itself: a' = (1 - multiplier)·a.

    Source: Farrell et al., arXiv 2410.19278.
    """
    edited = acts.clone()
    for f in features:
        scaled = acts[..., f] * (1.0 - multiplier)
        edited[..., f] = torch.where(acts[..., f] > trigger, scaled, acts[..., f])
    return edited


def refusal_clamp(
    acts: Tensor,
    features: Sequence[int],
    refusal_feature: int,
    value: float,
    trigger: float,
    clamp_value: float | None = None,
) -> Tensor:
    """Where any harmful feature is active, the refusal feature becomes a constant.

    The harmful features stay, unless `clamp_value` says what an active one becomes.
    Source: Shportko et al., arXiv 2503.11127.
    """
    harmful = (acts[..., list(features)] > trigger).any(dim=-1)
    edited = acts.clone()
    edited[..., refusal_feature] = torch.where(harmful, value, acts[..., refusal_feature])
    if clamp_value is not None:
        for f in features:
            edited[..., f] = torch.where(acts[..., f] > trigger, clamp_value, acts[..., f])
    return edited


def random_decoder(acts: Tensor, features: Sequence[int], value: float, trigger: float) -> Tensor:
    """Control: where a feature is active, the next one in the dictionary becomes a constant.

    The feature itself stays as it is. Source: Farrell et al., arXiv 2410.19278.
    """
    edited = acts.clone()
    for f in features:
        other = (f + 1) % acts.shape[-1]
        edited[..., other] = torch.where(acts[..., f] > trigger, value, acts[..., other])
    return edited


def clamp_together(acts: Tensor, features: Sequence[int], value: float, trigger: float) -> Tensor:
    """Where any feature is active, all of them become a constant.

    Source: Muhamed et al., arXiv 2504.08192, `open_gate` aside.
    """
    active = (acts[..., list(features)] > trigger).any(dim=-1, keepdim=True)
    edited = acts.clone()
    edited[..., list(features)] = torch.where(active, value, acts[..., list(features)])
    return edited


def open_gate(fired: Tensor, real: Tensor, tau: float) -> Tensor:
    """Where more than the share `tau` of the tokens so far fired.

    Source: Muhamed et al., arXiv 2504.08192, of the tokens so far in place of the whole sequence.

    Args:
        fired: [batch, seq] bool.
        real: [batch, seq] bool: no padding.
        tau: compared in float32.

    Returns:
        [batch, seq] bool.
    """
    so_far = torch.stack([fired & real, real]).double().cumsum(dim=-1)
    share = (so_far[0] / so_far[1].clamp(min=1)).to(torch.float32)
    return share > torch.tensor(tau, dtype=torch.float32)


# --------------------------------------------------------------------------- by recipe


def _clamp(acts: Tensor, clamp: Clamp) -> Tensor:
    assert clamp.value is not None
    return clamp_feature(acts, _features(clamp), clamp.value, clamp.trigger)


def _zero(acts: Tensor, clamp: Clamp) -> Tensor:
    return zero_ablate(acts, _features(clamp), clamp.trigger)


def _scale(acts: Tensor, clamp: Clamp) -> Tensor:
    assert clamp.multiplier is not None
    return scale_feature(acts, _features(clamp), clamp.multiplier, clamp.trigger)


def _random_decoder(acts: Tensor, clamp: Clamp) -> Tensor:
    assert clamp.value is not None
    return random_decoder(acts, _features(clamp), clamp.value, clamp.trigger)


def _refusal(acts: Tensor, clamp: Clamp) -> Tensor:
    assert clamp.value is not None and clamp.refusal_feature is not None
    own = clamp.value if clamp.clamp_value is None else clamp.clamp_value
    return refusal_clamp(
        acts,
        _features(clamp),
        clamp.refusal_feature,
        clamp.value,
        clamp.trigger,
        clamp_value=own if clamp.also_clamp else None,
    )


def _dynamic(acts: Tensor, clamp: Clamp) -> Tensor:
    assert clamp.value is not None
    return clamp_together(acts, _features(clamp), clamp.value, clamp.trigger)


def _features(clamp: Clamp) -> list[int]:
    assert isinstance(clamp.features, list)
    return clamp.features


EDITS: dict[str, Callable[[Tensor, Clamp], Tensor]] = {
    "clamp": _clamp,
    "zero": _zero,
    "scale": _scale,
    "random_decoder": _random_decoder,
    "refusal": _refusal,
    "dynamic": _dynamic,
}
"""What a recipe's table makes of a code, by method: [..., d_sae] → [..., d_sae]. The same methods
as in `bake.methods.METHODS`, and none of its arithmetic."""


def edit_code(acts: Tensor, clamp: Clamp) -> Tensor:
    """What a recipe's table makes of a code: [..., d_sae] → [..., d_sae]."""
    return EDITS[clamp.method](acts, clamp)
