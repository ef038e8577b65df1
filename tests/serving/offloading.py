"""What offloading does to the layers of a model, for vLLM and SGLang alike."""

from __future__ import annotations

from typing import Any


def wrap_forward(layer: Any) -> Any:
    """As it is done when a layer is made, and again at every step."""
    forward = layer.forward

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        layer.forward = forward
        output = forward(*args, **kwargs)
        layer.forward = wrapped
        return output

    layer.forward = wrapped
    return layer
