"""What a model holds in its residual stream on the way to an answer, place by place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bake.stock import decoder_layers

AT_ONCE = 2048
"""Most tokens of one forward pass, padding included."""


@dataclass(frozen=True)
class Residuals:
    """The residual stream behind every decoder layer, and in front of every clamp."""

    places: tuple[str, ...]
    """`layer 3`, from 0; `layer 3, before the clamp` where a module of that layer is one."""
    h: Tensor
    """[places, n, d] float32, on the CPU."""


def clamp_of(layer: nn.Module) -> Any | None:
    """The clamp that a decoder layer has as a module of its own, switched on; else None."""
    for child in layer.children():
        if hasattr(child, "W_enc") and hasattr(child, "W_dec"):
            return None if getattr(child, "disable_adapters", False) else child
    return None


def at_ends(model: Any, sequences: Sequence[Sequence[int]], pad_id: int) -> Residuals:
    """At the last token of each of several sequences.

    Args:
        model: any Gemma, clamped or not.
        sequences: token ids, BOS first.
        pad_id: stands in front of shorter ones, masked out.

    Returns:
        n is the number of sequences, in their order.
    """
    return _residuals(model, sequences, pad_id, everywhere=False)


def everywhere(model: Any, sequences: Sequence[Sequence[int]], pad_id: int) -> Residuals:
    """At every token of several sequences but the first, which is BOS.

    Args:
        model: any Gemma, clamped or not.
        sequences: token ids, BOS first.
        pad_id: stands in front of shorter ones, masked out.

    Returns:
        n is the number of tokens; their order is the same for any model.
    """
    return _residuals(model, sequences, pad_id, everywhere=True)


def _residuals(
    model: Any, sequences: Sequence[Sequence[int]], pad_id: int, *, everywhere: bool
) -> Residuals:
    order = sorted(range(len(sequences)), key=lambda n: -len(sequences[n]))
    pieces: dict[str, list[Tensor]] = {}
    taken = torch.zeros(0)  # [batch, seq] bool of the batch that is being read

    def keep(place: str, h: Tensor) -> None:
        pieces.setdefault(place, []).append(h[taken].float().cpu())

    handles = []
    for number, layer in enumerate(decoder_layers(model)):
        if (clamp := clamp_of(layer)) is not None:
            name = f"layer {number}, before the clamp"
            handles.append(clamp.register_forward_pre_hook(_given(keep, name)))
        handles.append(layer.register_forward_hook(_gives(keep, f"layer {number}")))
    try:
        start = 0
        while start < len(order):
            longest = len(sequences[order[start]])
            rows = [sequences[n] for n in order[start : start + max(1, AT_ONCE // longest)]]
            start += len(rows)
            ids = torch.tensor([[pad_id] * (longest - len(row)) + [*row] for row in rows])
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
            taken = mask.bool() if everywhere else torch.zeros_like(ids, dtype=torch.bool)
            if everywhere:
                taken &= mask.cumsum(-1) > 1
            else:
                taken[:, -1] = True
            taken = taken.to(model.device)
            with torch.inference_mode():
                model(
                    input_ids=ids.to(model.device),
                    attention_mask=mask.to(model.device),
                    position_ids=(mask.cumsum(-1) - 1).clamp(min=0).to(model.device),
                    use_cache=False,
                    logits_to_keep=1,
                )
    finally:
        for handle in handles:
            handle.remove()
    h = torch.stack([torch.cat(found) for found in pieces.values()])
    if not everywhere:
        h = h[:, torch.tensor(order).argsort()]
    return Residuals(tuple(pieces), h)


def _given(keep: Any, place: str) -> Any:
    def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        keep(place, given[0])

    return hook


def _gives(keep: Any, place: str) -> Any:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        keep(place, output[0] if isinstance(output, tuple) else output)

    return hook
