"""Clamped checkpoints on vLLM's own layers: what its registry is told of at its start.

Attention, cache, tensor and pipeline parallelism, LoRA and quantised matrices are vLLM's own.

It fails closed, as `from_pretrained` does: a clamp tensor that is missing, surplus, of another
shape or not finite raises.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from vllm.model_executor.models.gemma import GemmaDecoderLayer, GemmaForCausalLM
from vllm.model_executor.models.gemma2 import Gemma2DecoderLayer, Gemma2ForCausalLM
from vllm.model_executor.models.gemma3 import Gemma3DecoderLayer, Gemma3ForCausalLM

from bake.modeling_clamped_gemma import exempt_positions
from export.carriers.served_layers import (
    ClampedLayer,
    clamped_layers,
    place_clamps,
    refuse_broken_clamps,
    refuse_unservable,
)


class _Layer(ClampedLayer):
    """Its `sae_exempt` says which tokens of this step are left alone, [tokens at most] bool."""

    def exempt(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, *_: Any, **__: Any
    ) -> torch.Tensor | None:
        exempt: torch.Tensor | None = self.sae_exempt  # type: ignore[attr-defined]
        return None if exempt is None else exempt[: hidden_states.shape[0]]


class _Clamped:
    """Mixed in before a model class of vLLM's."""

    layer_class: type
    takes_float16 = False
    """Whether vLLM runs the family's base in it."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        model = vllm_config.model_config
        config = model.hf_config
        refuse_unservable(config, model.dtype, float16=self.takes_float16, engine="vLLM")
        with clamped_layers(self.layer_class, _Layer):
            super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        most = vllm_config.scheduler_config.max_num_batched_tokens
        self.sae_exempt: torch.Tensor
        nobody = torch.zeros(most, dtype=torch.bool)
        self.register_buffer("sae_exempt", nobody, persistent=False)  # type: ignore[attr-defined]
        self.sae_layers = place_clamps(self.model.layers, config)  # type: ignore[attr-defined]
        for site in config.sae_clamp["sites"]:
            if layer := self.sae_layers.get(site["layer"]):
                exempt = self.sae_exempt if site["exempt_bos"] else None
                layer.register_buffer("sae_exempt", exempt, persistent=False)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """[tokens] ids or [tokens, d] embeddings, and [tokens] positions -> [tokens, d]."""
        refuse_broken_clamps(self.sae_layers)  # some of vLLM's loaders do not ask the model
        exempt = positions == 0
        if input_ids is not None:
            found = exempt_positions(self.config, input_ids)  # type: ignore[attr-defined]
            exempt = torch.zeros_like(exempt) if found is None else found
        self.sae_exempt[: exempt.shape[0]].copy_(exempt)
        return super().forward(  # type: ignore[misc]
            input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs
        )

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load (name, tensor) pairs as the checkpoint names them, or some of them anew; gives the
        names.

        Raises:
            ValueError: a clamp tensor is missing, surplus, of another shape, or not finite.
        """
        loaded: set[str] = super().load_weights(weights)  # type: ignore[misc]
        refuse_broken_clamps(self.sae_layers)
        return loaded


class ClampedGemmaForCausalLM(_Clamped, GemmaForCausalLM):
    """vLLM's `GemmaForCausalLM` over clamped layers."""

    layer_class = GemmaDecoderLayer
    takes_float16 = True


class ClampedGemma2ForCausalLM(_Clamped, Gemma2ForCausalLM):
    """vLLM's `Gemma2ForCausalLM` over clamped layers."""

    layer_class = Gemma2DecoderLayer


class ClampedGemma3ForCausalLM(_Clamped, Gemma3ForCausalLM):
    """vLLM's `Gemma3ForCausalLM` over clamped layers."""

    layer_class = Gemma3DecoderLayer
