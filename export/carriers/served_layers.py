"""Clamps on the decoder layers of vLLM and SGLang, which split the residual stream alike.

Their layers give back two parts of the stream, which the next layer adds. A clamped layer adds
them, clamps the stream in float32, and gives the next one the whole and zeros, so that nothing is
rounded twice. Every rank holds the whole clamp, as it holds the whole stream.

A layer is made as a clamped one: offloading puts itself around the forward that a layer is made
with, and puts that back at every step.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bake.modeling_clamped_gemma import SAEClamp


class ClampedLayer:
    """Mixed in before a decoder layer class. Without a clamp it is that layer."""

    sae_clamp: SAEClamp | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sae_clamp = None

    def exempt(self, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """What the layer takes -> [tokens] bool, those that are left as they are, or None."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """What the layer takes -> two parts of the stream, [tokens, d]."""
        added, stream = super().forward(*args, **kwargs)  # type: ignore[misc]
        if self.sae_clamp is None:
            return added, stream
        h = self.sae_clamp(added + stream, self.exempt(*args, **kwargs))
        return h, torch.zeros_like(h)


@contextmanager
def clamped_layers(layer: type, mixin: type) -> Iterator[None]:
    """Have the module of a decoder layer class make clamped ones. Changes it while this lasts."""
    module = sys.modules[layer.__module__]
    setattr(module, layer.__name__, type(layer.__name__, (mixin, layer), {}))
    try:
        yield
    finally:
        setattr(module, layer.__name__, layer)


def refuse_unservable(config: Any, dtype: torch.dtype, *, float16: bool, engine: str) -> None:
    """Raise ValueError where a clamp or a dtype cannot be right.

    Args:
        config: of the folder.
        dtype: that the model is to run in.
        float16: whether activations of the family fit.
        engine: its name.
    """
    if any("tau" in site for site in config.sae_clamp["sites"]):
        raise ValueError(
            f"a clamp with a sequence gate cannot be served by {engine}, whose cache has no place "
            "for what fired; use transformers' generate or onnxruntime-genai"
        )
    if dtype == torch.float16 and not float16:
        raise ValueError(
            "dtype float16: activations of a Gemma 2 or 3 do not fit; use bfloat16 or float32"
        )


def place_clamps(layers: Any, config: Any) -> dict[int, Any]:
    """Give the layers of this rank their clamps, still empty. Changes them.

    Args:
        layers: of the model, made within `clamped_layers`.
        config: of the folder.

    Returns:
        The clamped layers by number.
    """
    clamped = {}
    for site in config.sae_clamp["sites"]:
        layer = layers[site["layer"]]
        if isinstance(layer, ClampedLayer):
            layer.sae_clamp = SAEClamp.at(config.hidden_size, site)
            clamped[site["layer"]] = layer
        elif type(layer).__name__ != "PPMissingLayer":  # which another rank has
            raise TypeError(f"layer {site['layer']} is a {type(layer).__name__}, made unclamped")
    return clamped


def refuse_broken_clamps(layers: dict[int, Any]) -> None:
    """Raise ValueError where a clamp lacks a tensor, or one is not finite."""
    for number, layer in layers.items():
        if not layer.sae_clamp.whole and not layer.sae_clamp.look():
            raise ValueError(
                f"a tensor of the sae_clamp of layer {number} is missing from the checkpoint "
                "or not finite; this folder is damaged, do not use it"
            )
