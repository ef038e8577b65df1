"""What of a config decides how a graph is wired."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bake.errors import ModelError, short
from bake.families import Family, borrowing_layers, family_of, text_families

_ACTIVATIONS = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu", "silu", "relu")


@dataclass(frozen=True)
class Architecture:
    """What of a config decides how the graph is wired."""

    n_layers: int
    d_in: int
    vocab: int
    n_heads: int
    n_kv_heads: tuple[int, ...]
    """Per layer."""
    head_dim: tuple[int, ...]
    """Per layer."""
    norm_eps: float
    activation: str
    attention_scale: float
    attention_softcap: float | None
    final_softcap: float | None
    windows: tuple[int | None, ...]
    """Per layer: how many tokens back it sees, itself included; None sees all."""
    ropes: tuple[str, ...]
    """Per layer: which of `inv_freqs` turns its queries and keys."""
    inv_freqs: dict[str, tuple[NDArray[np.float32], float]]
    """Rotary frequencies [head_dim / 2] and the factor on sine and cosine, by name."""
    norms_after: bool
    """Gemma 2 and later: a block's output has a norm of its own before it is added."""
    head_norms: bool
    """Gemma 3 and 4: queries and keys have a norm of their own."""
    scaled: bool
    """Gemma 4: a norm multiplies by w, not 1 + w; values have one without w; and a layer's output
    is multiplied by a scalar of its own."""
    keys_are_values: tuple[bool, ...]
    """Per layer: keys, before their norm, are its values too."""
    borrows: dict[int, int]
    """Layers without keys and values of their own, and whose they attend to."""
    per_layer: int
    """Width of what a Gemma 4 gives each layer of each token; 0 where it gives nothing."""
    exempt_token_ids: tuple[int, ...]
    sites: dict[int, bool]
    """Clamped layers, and whether they spare the exempt tokens."""
    topks: dict[int, int] = field(default_factory=dict)
    """Of those the ones with a TopK SAE, and how many features of it are active on a token."""
    gates: dict[int, float] = field(default_factory=dict)
    """Of those the ones with a sequence gate, and its tau. What fired is kept like the keys and
    values of further layers, in this order."""

    @classmethod
    def from_config(cls, config: Any) -> Architecture:
        """Read a clamped model's config object.

        Raises:
            ModelError: the family, or something that its config asks for, is not supported.
        """
        family = family_of(config.model_type)
        if family.images:
            raise ModelError(
                f"family {config.model_type.removeprefix('clamped_')}: cannot be exported to ONNX; "
                f"expected one of {text_families()}"
            )
        # Of a Gemma 4, "vision" says of images alone that they are seen both ways.
        if getattr(config, "use_bidirectional_attention", None) in (True, "all"):
            raise ModelError(
                "config.use_bidirectional_attention: true cannot be exported to ONNX; expected a "
                "model that generates text"
            )
        if getattr(config, "enable_moe_block", False):
            raise ModelError(
                "config.enable_moe_block: a mixture of experts cannot be exported to ONNX; "
                "expected a dense model. Use the clamped checkpoint, or an adapter"
            )
        clamp = getattr(config, "sae_clamp", None) or {"sites": [], "exempt_token_ids": []}
        if any("tau" in site and "topk" in site for site in clamp["sites"]):
            raise ModelError(
                'method "dynamic" over a TopK SAE: cannot be exported to ONNX; expected another '
                "method or another SAE. Use the clamped checkpoint, or an adapter"
            )
        activation = getattr(config, family.activation_field)
        if activation not in _ACTIVATIONS:
            raise ModelError(
                f"activation {activation}: cannot be exported to ONNX; expected one of "
                f"{', '.join(_ACTIVATIONS)}"
            )
        n_layers = config.num_hidden_layers
        types = getattr(config, "layer_types", None) or ["full_attention"] * n_layers
        sliding = [kind == "sliding_attention" for kind in types]
        each = config.per_layer_config if family.scaled else [config] * n_layers
        scale = 1.0 if family.scaled else getattr(config, "query_pre_attn_scalar", None)
        shares = getattr(config, "attention_k_eq_v", False)
        return cls(
            n_layers=n_layers,
            d_in=config.hidden_size,
            vocab=config.vocab_size,
            n_heads=config.num_attention_heads,
            n_kv_heads=tuple(layer.num_key_value_heads for layer in each),
            head_dim=tuple(layer.head_dim for layer in each),
            norm_eps=config.rms_norm_eps,
            activation=activation,
            attention_scale=(scale or config.head_dim) ** -0.5,
            attention_softcap=getattr(config, "attn_logit_softcapping", None),
            final_softcap=getattr(config, "final_logit_softcapping", None),
            windows=tuple(config.sliding_window if slides else None for slides in sliding),
            ropes=tuple(types) if family.head_norms else ("all",) * n_layers,
            inv_freqs=_inv_freqs(config, family),
            norms_after=family.norms_after,
            head_norms=family.head_norms,
            scaled=family.scaled,
            keys_are_values=tuple(shares and not slides for slides in sliding),
            borrows=borrowing_layers(config.to_dict()),
            per_layer=getattr(config, "hidden_size_per_layer_input", 0),
            exempt_token_ids=tuple(clamp["exempt_token_ids"]),
            sites={site["layer"]: site["exempt_bos"] for site in clamp["sites"]},
            topks={site["layer"]: site["topk"] for site in clamp["sites"] if "topk" in site},
            gates={
                site["layer"]: site["tau"]
                for site in sorted(clamp["sites"], key=lambda site: site["layer"])
                if "tau" in site
            },
        )


def _inv_freqs(config: Any, family: Family) -> dict[str, tuple[NDArray[np.float32], float]]:
    """As transformers' own rotary embedding computes them."""
    import transformers

    stock = getattr(transformers, family.architecture)
    try:
        rope = getattr(import_module(stock.__module__), family.rope)(config)
    except Exception as error:  # each of its checks raises another kind
        reason = short(" ".join(f"{type(error).__name__}: {error}".split()))
        raise ModelError(
            f"rotary embeddings: cannot be made of config.json ({reason}); expected a model that "
            "transformers runs. Bake it again"
        ) from error
    kinds = {"all": ("", rope.rope_type)}
    if family.head_norms:
        kinds = {name: (f"{name}_", rope.rope_type[name]) for name in rope.rope_type}
    for _, kind in kinds.values():
        if kind in ("dynamic", "longrope"):
            raise ModelError(
                f"rope type {kind}: changes with the prompt's length and cannot be exported to "
                "ONNX; expected default, linear, llama3 or yarn"
            )
    return {
        name: (
            getattr(rope, f"{prefix}inv_freq").numpy(),
            float(getattr(rope, f"{prefix}attention_scaling")),
        )
        for name, (prefix, _) in kinds.items()
    }
