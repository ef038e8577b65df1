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
from vllm.model_executor.models.gemma import GemmaDecoderLayer, GemmaForCausalLM
from vllm.model_executor.models.gemma2 import Gemma2DecoderLayer, Gemma2ForCausalLM
from vllm.model_executor.models.gemma3 import Gemma3DecoderLayer, Gemma3ForCausalLM
from vllm.model_executor.models.utils import PPMissingLayer, is_pp_missing_parameter

from bake.modeling_clamped_gemma import SAEClamp, exempt_positions, refuse_broken_clamp


class _ClampedLayer:
    """Mixed in before a decoder layer: clamps the residual stream behind it."""

    sae_clamp: SAEClamp
    sae_exempt: torch.Tensor | None
    """[tokens of a step at most] bool: which of this step are left as they are."""

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(positions, [tokens, d], [tokens, d] or None) -> two parts of the stream, [tokens, d]."""
        added, stream = super().forward(positions, hidden_states, residual, **kwargs)  # type: ignore[misc]
        h = added + stream
        exempt = None if self.sae_exempt is None else self.sae_exempt[: h.shape[0]]
        clamped = self.sae_clamp(h, exempt)
        return clamped, torch.zeros_like(clamped)


class ClampedGemmaDecoderLayer(_ClampedLayer, GemmaDecoderLayer):
    """vLLM's Gemma layer, its output clamped."""


class ClampedGemma2DecoderLayer(_ClampedLayer, Gemma2DecoderLayer):
    """vLLM's Gemma 2 layer, its output clamped."""


class ClampedGemma3DecoderLayer(_ClampedLayer, Gemma3DecoderLayer):
    """vLLM's Gemma 3 layer, its output clamped."""


class _Clamped:
    """Mixed in before a model class of vLLM's."""

    _layer_class: type

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        config = vllm_config.model_config.hf_config
        sites = config.sae_clamp["sites"]
        if any("tau" in site for site in sites):
            raise ValueError(
                "a clamp with a sequence gate cannot be served by vLLM, whose cache has no place "
                "for what fired; use transformers' generate or onnxruntime-genai"
            )
        most = vllm_config.scheduler_config.max_num_batched_tokens
        self.sae_exempt: torch.Tensor
        self._buffer(self, "sae_exempt", torch.zeros(most, dtype=torch.bool))
        for site in sites:
            layer = self.model.layers[site["layer"]]  # type: ignore[attr-defined]
            if isinstance(layer, PPMissingLayer):  # another rank has it
                continue
            layer.sae_clamp = SAEClamp.at(config.hidden_size, site)
            layer.__class__ = self._layer_class
            self._buffer(layer, "sae_exempt", self.sae_exempt if site["exempt_bos"] else None)

    @staticmethod
    def _buffer(module: Any, name: str, tensor: torch.Tensor | None) -> None:
        module.register_buffer(name, tensor, persistent=False)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """[tokens] ids or [tokens, d] embeddings, and [tokens] positions -> [tokens, d]."""
        exempt = positions == 0
        if input_ids is not None:
            found = exempt_positions(self.config, input_ids)  # type: ignore[attr-defined]
            exempt = torch.zeros_like(exempt) if found is None else found
        self.sae_exempt[: exempt.shape[0]].copy_(exempt)
        return super().forward(  # type: ignore[misc]
            input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs
        )

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load (name, tensor) pairs as the checkpoint names them; gives the names.

        Raises:
            ValueError: a clamp tensor is missing, surplus, of another shape, or not finite.
        """
        expected = {
            name: buffer.shape
            for name, buffer in self.named_buffers()  # type: ignore[attr-defined]
            if ".sae_clamp." in name
        }
        wrong: dict[str, list[Any]] = {"mismatched_keys": [], "unexpected_keys": []}

        def fitting() -> Iterable[tuple[str, torch.Tensor]]:
            for name, tensor in weights:
                if is_pp_missing_parameter(name, self):  # another rank's
                    continue
                if ".sae_clamp." in name and name not in expected:
                    wrong["unexpected_keys"].append(name)
                elif ".sae_clamp." in name and tensor.shape != expected[name]:
                    wrong["mismatched_keys"].append((name,))
                else:
                    yield name, tensor

        loaded: set[str] = super().load_weights(fitting())  # type: ignore[misc]
        found = loaded | {name for (name,) in wrong["mismatched_keys"]}
        refuse_broken_clamp(self, {**wrong, "missing_keys": expected.keys() - found})  # type: ignore[arg-type]
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, SAEClamp):
                # What vLLM has compiled is kept by the config, which does not tell one route from
                # another: nothing that only the tensors tell may decide what is compiled.
                module.each_alone = False
        return loaded


class ClampedGemmaForCausalLM(_Clamped, GemmaForCausalLM):
    """vLLM's `GemmaForCausalLM` over clamped layers."""

    _layer_class = ClampedGemmaDecoderLayer


class ClampedGemma2ForCausalLM(_Clamped, Gemma2ForCausalLM):
    """vLLM's `Gemma2ForCausalLM` over clamped layers."""

    _layer_class = ClampedGemma2DecoderLayer


class ClampedGemma3ForCausalLM(_Clamped, Gemma3ForCausalLM):
    """vLLM's `Gemma3ForCausalLM` over clamped layers."""

    _layer_class = ClampedGemma3DecoderLayer
