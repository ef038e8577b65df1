"""Attack: take the directions out of the residual stream in which the forgetting acts.

They are a clamp's own decoder rows where the carrier shows them. Where it does not, they are those
in which text on the topic differs most from other text, or most from what the base makes of it.

Source: Arditi et al., Refusal in Language Models Is Mediated by a Single Direction, arXiv
2406.11717, for one direction, found by means.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bake.stock import decoder_layers
from verify.attacks.inside.residuals import clamp_of
from verify.attacks.weights.inserted_layers import inserted_layers, wordless_channels


def clamp_directions(model: Any) -> Tensor | None:
    """The directions along which clamps write, strongest first, from the model alone.

    Args:
        model: any Gemma, clamped or not.

    Returns:
        [k, d] orthonormal; None where the model shows no clamp.
    """
    rows = []
    layers: list[Any] = list(decoder_layers(model))
    for layer in layers:
        if (clamp := clamp_of(layer)) is not None:
            set_ = clamp.route.any(dim=1)  # what is only read writes nothing
            rows.append(clamp.W_dec.double()[set_])
    words = ~wordless_channels(model.get_input_embeddings().weight)
    for number in inserted_layers(model):
        written = layers[number].mlp.down_proj.weight.detach().double() * words[:, None]
        rows.append(written.T[written.any(dim=0)])
    found = torch.cat(rows) if rows else torch.zeros(0, 1)
    return _strongest(found.T @ found, len(found)) if len(found) else None


def topic_directions(topic: Tensor, other: Tensor, n: int) -> Tensor:
    """The directions in which text on the topic is larger than other text.

    Args:
        topic: [n_topic, d] residual streams.
        other: [n_other, d].
        n: how many.

    Returns:
        [n, d] orthonormal, or less where there are no more.
    """
    both = [h.double() for h in (topic, other)]
    moments = [h.T @ h / len(h) for h in both]
    return _strongest(moments[0] - moments[1], n)


def changed_directions(unlearned: Tensor, base: Tensor, n: int) -> Tensor:
    """The directions in which the same tokens were moved most.

    Args:
        unlearned: [tokens, d] residual streams.
        base: [tokens, d], the base's of the same tokens.
        n: how many.

    Returns:
        [n, d] orthonormal, or less where there are no more.
    """
    moved = unlearned.double() - base.double()
    return _strongest(moved.T @ moved / len(moved), n)


def ablate(model: Any, directions: Sequence[Tensor]) -> Any:
    """Take directions out of the residual stream. Changes `model`, which then goes without them.

    Args:
        model: any Gemma, clamped or not.
        directions: [k, d] orthonormal, for the input of every decoder layer, and last for the
            output of the last one. One alone stands for all.

    Returns:
        The model.
    """
    layers = decoder_layers(model)
    each = list(directions) * (len(layers) + 1) if len(directions) == 1 else list(directions)
    for layer, out in zip(layers, each[:-1], strict=True):
        layer.register_forward_pre_hook(_without_input(out))
    layers[-1].register_forward_hook(_without_output(each[-1]))
    return model


def _strongest(moments: Tensor, n: int) -> Tensor:
    """[≤ n, d] orthonormal: eigenvectors of a symmetric matrix by falling eigenvalue, those that
    are 0 or less left out.
    """
    values, vectors = torch.linalg.eigh(moments.double())
    least = float(values.abs().max()) * len(values) * torch.finfo(torch.float64).eps
    kept: Tensor = vectors.T.flip(0)
    return kept[: min(n, int((values > least).sum()))]


def _without(h: Tensor, directions: Tensor) -> Tensor:
    out = directions.to(h.device, torch.float32)
    wide = h.float()
    return (wide - (wide @ out.T) @ out).to(h.dtype)


def _without_input(directions: Tensor) -> Any:
    def hook(_: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return _without(given[0], directions), *given[1:]

    return hook


def _without_output(directions: Tensor) -> Any:
    def hook(_: Any, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return _without(output[0], directions), *output[1:]
        return _without(output, directions)

    return hook
