"""Attack: with the base's weights at hand, undo what was changed in them.

Two ways. Towards the base: every weight moves a share of the way, which says how much of the change
the forgetting needs. And by the largest singular directions of each matrix's difference to the base
alone, which finds a change of low rank, as LoRA leaves, beside noise that covers all of it. Whoever
has the base needs neither; both say how little has to be known of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bake.errors import ModelError, shown


def towards_base(model: Any, base: Any, share: float) -> Any:
    """Move a model's weights a share of the way to the base's. Changes `model`.

    Args:
        model: what was changed.
        base: what it was before.
        share: 0 changes nothing, 1 gives the base.

    Raises:
        ModelError: the two are not of one shape.
    """
    theirs = _weights_alike(model, base)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.lerp(weight.float(), theirs[name].float(), share))
    return model


def subtract_difference(model: Any, base: Any, rank: int | None = None) -> dict[str, int]:
    """Take the largest directions of a model's difference to the base out of its matrices. Vectors,
    which norms have, stay. Changes `model`.

    Args:
        model: what was changed.
        base: what it was before, perhaps rounded otherwise.
        rank: how many directions of each matrix; None takes those that stand out of the noise.

    Returns:
        How many directions were subtracted, by the name of the weight; those without are left out.

    Raises:
        ModelError: the two are not of one shape.
    """
    theirs, ranks = _weights_alike(model, base), {}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            difference = weight.double() - theirs[name].double()
            if difference.ndim != 2 or not difference.any():
                continue
            u, s, v = torch.linalg.svd(difference, full_matrices=False)
            n = rank_of(s, difference.shape) if rank is None else min(rank, len(s))
            if n:
                ranks[name] = n
                weight.copy_(weight.double() - (u[:, :n] * s[:n]) @ v[:n])
    return ranks


def rank_of(singular: Tensor, shape: torch.Size) -> int:
    """How many singular values stand out of noise that covers the whole matrix.

    Args:
        singular: [min(shape)], descending.
        shape: of the matrix.

    Source: Gavish and Donoho, arXiv 1305.5870, for noise of unknown size.
    """
    least = singular[0] * max(shape) * torch.finfo(singular.dtype).eps  # as matrix_rank has it
    return int((singular > max(float(singular.median()) * noise_edge(shape), float(least))).sum())


def noise_edge(shape: torch.Size) -> float:
    """Times the median singular value: what is larger is no noise.

    Source: Gavish and Donoho, arXiv 1305.5870, their polynomial in the shape's aspect.
    """
    aspect = min(shape) / max(shape)
    return 0.56 * aspect**3 - 0.95 * aspect**2 + 1.82 * aspect + 1.43


def _weights_alike(model: Any, base: Any) -> dict[str, Tensor]:
    """The base's weights by name, which are the model's too."""
    ours, theirs = dict(model.named_parameters()), dict(base.named_parameters())
    odd = [n for n in {**ours, **theirs} if _shape(ours, n) != _shape(theirs, n)]
    if odd:
        raise ModelError(
            f"weight {odd[0]} is {shown(_shape(ours, odd[0]))}, in the base "
            f"{shown(_shape(theirs, odd[0]))}; expected folders of one base, of one shape"
        )
    return theirs


def _shape(weights: dict[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(weights[name].shape) if name in weights else None
