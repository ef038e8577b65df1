"""Attack: read the answer off the residual stream behind an earlier layer, through the model's own
final norm and head.

Source: nostalgebraist, interpreting GPT: the logit lens, 2020.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def choices_seen(model: Any, h: Tensor, choices: Sequence[Sequence[Sequence[int]]]) -> Tensor:
    """Which choice comes first at every place, each at the better of its tokens.

    Args:
        model: any Gemma.
        h: [places, n, d] residual streams at the ends of prompts.
        choices: of each prompt, per choice the tokens that may begin it.

    Returns:
        [places, n] indices of choices.
    """
    found = torch.empty(h.shape[:2], dtype=torch.long)
    for place, at in enumerate(h):
        logits = _read(model, at)
        for row, each in enumerate(choices):
            best = torch.stack([logits[row, list(ids)].max() for ids in each])
            found[place, row] = best.argmax()
    return found


def tokens_seen(model: Any, h: Tensor) -> Tensor:
    """Which token comes first at every place.

    Args:
        model: any Gemma.
        h: [places, n, d] residual streams at the ends of prompts.

    Returns:
        [places, n] token ids.
    """
    return torch.stack([_read(model, at).argmax(dim=-1) for at in h])


def _read(model: Any, h: Tensor) -> Tensor:
    """[n, d] → [n, vocab] logits, not capped: that keeps their order."""
    backbone = getattr(model.model, "language_model", model.model)
    head = model.get_output_embeddings()
    with torch.inference_mode():
        found: Tensor = head(backbone.norm(h.to(model.device, head.weight.dtype)))
    return found.float().cpu()
