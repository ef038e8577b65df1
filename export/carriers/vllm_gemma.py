"""Clamped checkpoints on vLLM's own layers: what its registry is told of at its start.

vLLM's decoder layers give back two parts of the residual stream, which the next layer adds. A
clamped layer adds them, clamps the stream in float32, and gives the next one the whole and zeros,
so that nothing is rounded twice. Attention, cache, tensor and pipeline parallelism, LoRA and
quantised matrices are vLLM's own; every rank holds the whole clamp, as it holds the whole stream.

It fails closed, as `from_pretrained` does: a clamp tensor that is missing, surplus, of another
shape or not finite raises.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from vllm.model_executor.models.gemma import GemmaForCausalLM
from vllm.model_executor.models.gemma2 import Gemma2ForCausalLM
from vllm.model_executor.models.gemma3 import Gemma3ForCausalLM
from vllm.model_executor.models.utils import PPMissingLayer

from bake.modeling_clamped_gemma import SAEClamp, exempt_positions


def clamp_layer(layer: Any) -> None:
    """Have a decoder layer clamp the residual stream behind it. Changes its `forward`, which may be
    another already (vLLM's offloading wraps it).

    Args:
        layer: of vLLM's, with `sae_clamp`, and as `sae_exempt` which tokens of this step are left
            as they are, [tokens of a step at most] bool, or None.
    """
    forward = layer.forward

    def clamped(
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(positions, [tokens, d], [tokens, d] or None) -> two parts of the stream, [tokens, d]."""
        added, stream = forward(positions, hidden_states, residual, **kwargs)
        h = added + stream
        exempt = None if layer.sae_exempt is None else layer.sae_exempt[: h.shape[0]]
        h = layer.sae_clamp(h, exempt)
        return h, torch.zeros_like(h)

    layer.forward = clamped


class _Clamped:
    """Mixed in before a model class of vLLM's."""

    takes_float16 = False
    """Whether vLLM runs the family's base in it."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        config = vllm_config.model_config.hf_config
        sites = config.sae_clamp["sites"]
        if any("tau" in site for site in sites):
            raise ValueError(
                "a clamp with a sequence gate cannot be served by vLLM, whose cache has no place "
                "for what fired; use transformers' generate or onnxruntime-genai"
            )
        if vllm_config.model_config.dtype == torch.float16 and not self.takes_float16:
            raise ValueError(
                "dtype float16: activations of a Gemma 2 or 3 do not fit; use bfloat16 or float32"
            )
        most = vllm_config.scheduler_config.max_num_batched_tokens
        self.sae_clamps: dict[int, SAEClamp] = {}
        self.sae_exempt: torch.Tensor
        nobody = torch.zeros(most, dtype=torch.bool)
        self.register_buffer("sae_exempt", nobody, persistent=False)  # type: ignore[attr-defined]
        for site in sites:
            layer = self.model.layers[site["layer"]]  # type: ignore[attr-defined]
            if isinstance(layer, PPMissingLayer):  # another rank has it
                continue
            layer.sae_clamp = self.sae_clamps[site["layer"]] = SAEClamp.at(config.hidden_size, site)
            exempt = self.sae_exempt if site["exempt_bos"] else None
            layer.register_buffer("sae_exempt", exempt, persistent=False)
            clamp_layer(layer)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """[tokens] ids or [tokens, d] embeddings, and [tokens] positions -> [tokens, d]."""
        self._refuse_broken_clamps()
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
        self._refuse_broken_clamps()
        return loaded

    def _refuse_broken_clamps(self) -> None:
        """Whoever loaded them: some of vLLM's loaders do not ask the model."""
        for layer, clamp in self.sae_clamps.items():
            if not clamp.whole and not clamp.look():
                raise ValueError(
                    f"a tensor of the sae_clamp of layer {layer} is missing from the checkpoint "
                    "or not finite; this folder is damaged, do not use it"
                )


class ClampedGemmaForCausalLM(_Clamped, GemmaForCausalLM):
    """vLLM's `GemmaForCausalLM` over clamped layers."""

    takes_float16 = True


class ClampedGemma2ForCausalLM(_Clamped, Gemma2ForCausalLM):
    """vLLM's `Gemma2ForCausalLM` over clamped layers."""


class ClampedGemma3ForCausalLM(_Clamped, Gemma3ForCausalLM):
    """vLLM's `Gemma3ForCausalLM` over clamped layers."""
