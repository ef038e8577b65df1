"""Clamped checkpoints on SGLang's own layers: what its registry is told of once it is imported.

Attention, cache, tensor parallelism, LoRA and quantised matrices are SGLang's own. A clamped layer
finds the tokens of a step in its batch, and so has them in a CUDA graph of the layers alone too.

It fails closed, as `from_pretrained` does: a clamp tensor that is missing, surplus, of another
shape or not finite raises; one that was never loaded answers NaN.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from sglang.srt.models.gemma import GemmaDecoderLayer, GemmaForCausalLM
from sglang.srt.models.gemma2 import Gemma2DecoderLayer, Gemma2ForCausalLM
from sglang.srt.models.gemma3_causal import Gemma3DecoderLayer, Gemma3ForCausalLM

from bake.modeling_clamped_gemma import exempt_positions
from export.carriers.served_layers import (
    ClampedLayer,
    clamped_layers,
    place_clamps,
    refuse_broken_clamps,
    refuse_unservable,
)


class _Layer(ClampedLayer):
    """Its `sae_config` is the folder's, or None where the clamp exempts nothing."""

    def exempt(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        forward_batch: Any,
        residual: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor | None:
        if self.sae_config is None:  # type: ignore[attr-defined]
            return None
        if forward_batch.input_embeds is not None:  # then its ids are made up
            first: torch.Tensor = forward_batch.positions == 0
            return first
        return exempt_positions(self.sae_config, forward_batch.input_ids)  # type: ignore[attr-defined]


class _Clamped:
    """Mixed in before a model class of SGLang's."""

    layer_class: type
    takes_float16 = False

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        dtype = torch.get_default_dtype()  # SGLang makes it the model's
        refuse_unservable(config, dtype, float16=self.takes_float16, engine="SGLang")
        with clamped_layers(self.layer_class, _Layer):
            super().__init__(config, quant_config, prefix)  # type: ignore[call-arg]
        self.sae_layers = place_clamps(self.model.layers, config)  # type: ignore[attr-defined]
        for site in config.sae_clamp["sites"]:
            self.sae_layers[site["layer"]].sae_config = config if site["exempt_bos"] else None

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        """Load (name, tensor) pairs as the checkpoint names them, or some of them anew.

        Raises:
            ValueError: a clamp tensor is missing, surplus, of another shape, or not finite.
        """
        loaded = super().load_weights(self._others(weights))  # type: ignore[misc]
        refuse_broken_clamps(self.sae_layers)
        return loaded

    def _others(
        self, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Load the clamps' tensors, and give on the others: SGLang's loaders know parameters."""
        layers = {f"model.layers.{number}": of for number, of in self.sae_layers.items()}
        for name, tensor in weights:
            place, clamps, of = name.partition(".sae_clamp.")
            if not clamps:
                yield name, tensor
            elif place in layers:
                layers[place].sae_clamp.load_weights([(of, tensor)])
            else:
                raise ValueError(
                    f"clamp tensor {name} is in the checkpoint, but config.json places no clamp "
                    "there; this folder is damaged, do not use it"
                )


class ClampedGemmaForCausalLM(_Clamped, GemmaForCausalLM):
    """SGLang's `GemmaForCausalLM` over clamped layers."""

    layer_class = GemmaDecoderLayer
    takes_float16 = True


class ClampedGemma2ForCausalLM(_Clamped, Gemma2ForCausalLM):
    """SGLang's `Gemma2ForCausalLM` over clamped layers."""

    layer_class = Gemma2DecoderLayer


class ClampedGemma3ForCausalLM(_Clamped, Gemma3ForCausalLM):
    """SGLang's `Gemma3ForCausalLM` over clamped layers."""

    layer_class = Gemma3DecoderLayer


EntryClass = [ClampedGemmaForCausalLM, ClampedGemma2ForCausalLM, ClampedGemma3ForCausalLM]
"""By this name SGLang's registry takes the classes of a module."""
