"""Attack: find decoder layers that were put in to compute a clamp, knowing neither base nor
manifest, and take them out.

What gives them away is what compiling cannot do without. A clamp's step needs channels that no word
of the vocabulary tells apart: every token's embedding holds one value there. A stock model has none
or few, and no layer that lives by them. Two kinds of layer do, whose attention writes nothing: one
that writes to such channels alone, and one whose MLP is gated by such channels alone. Without them
the wider model computes what the base did, so that its channels can stay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bake.stock import decoder_layers, norm_gain

SAME_TOKENS = 0.9
"""Share of the vocabulary that has one value in a channel which tells no words apart."""
SAME = 1e-3
"""How far that value may vary, against the embedding's own root mean square."""
NOTHING = 1e-3
"""What counts as nothing: of a layer's own reading or writing, and of attention's beside that of
the layer that writes most."""


def inserted_layers(model: Any) -> tuple[int, ...]:
    """The numbers of the decoder layers that were put in, from the weights alone.

    Args:
        model: a Gemma as stock transformers loads it.
    """
    layers = decoder_layers(model)
    blind = wordless_channels(model.get_input_embeddings().weight)  # [d]
    if not blind.any():
        return ()
    attention = torch.stack([_attention_writes(layer).norm() for layer in layers])
    return tuple(
        number
        for number, layer in enumerate(layers)
        if attention[number] <= NOTHING * attention.max()
        and (_alone(_mlp_writes(layer), blind) or _alone(_mlp_gated_by(layer), blind))
    )


def wordless_channels(embedding: Tensor) -> Tensor:
    """Which channels hold one value for almost every token.

    Args:
        embedding: [vocab, d].

    Returns:
        [d] bool.
    """
    values = embedding.detach().float()
    size = values.square().mean().sqrt()
    usual = values.median(dim=0).values
    alike = (values - usual).abs() <= SAME * size  # [vocab, d]
    return alike.float().mean(dim=0) >= SAME_TOKENS


# --------------------------------------------------------------------------- what a layer touches


def _attention_writes(layer: Any) -> Tensor:
    """[d] how much attention can write into each channel."""
    norm = layer.post_attention_layernorm if _norms_after(layer) else None
    return _size(layer.self_attn.o_proj.weight, 1) * _gain(norm)


def _mlp_writes(layer: Any) -> Tensor:
    """[d] how much the MLP can write into each channel."""
    norm = layer.post_feedforward_layernorm if _norms_after(layer) else None
    return _size(layer.mlp.down_proj.weight, 1) * _gain(norm)


def _mlp_gated_by(layer: Any) -> Tensor:
    """[d] how much each channel moves the MLP's gates."""
    before = layer.pre_feedforward_layernorm if _norms_after(layer) else None
    return _size(layer.mlp.gate_proj.weight, 0) * _gain(before or layer.post_attention_layernorm)


def _norms_after(layer: Any) -> bool:
    """Whether what a block writes has a norm of its own, or is added as it is."""
    return hasattr(layer, "post_feedforward_layernorm")


def _size(weight: Tensor, dim: int) -> Tensor:
    size: Tensor = torch.linalg.vector_norm(weight.detach().double(), dim=dim)
    return size


def _gain(norm: nn.Module | None) -> Tensor:
    """[d] what a norm of a Gemma multiplies by."""
    if norm is None:
        return torch.ones(1, dtype=torch.float64)
    return norm_gain(norm).double().abs()


def _alone(sizes: Tensor, channels: Tensor) -> bool:
    """Whether something touches these channels, and as good as nothing else."""
    rest = float(sizes[~channels].norm())
    return rest <= NOTHING * float(sizes.norm()) > 0
