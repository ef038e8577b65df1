"""Attack: read the answer off the residual stream behind an earlier layer, through the model's own
final norm and head.

Source: nostalgebraist, interpreting GPT: the logit lens, 2020.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bake.questions.answers import best_letters


def letters_seen(model: Any, h: Tensor, letters: Sequence[Sequence[int]]) -> Tensor:
    """Which letter comes first at every place.

    Args:
        model: any Gemma.
        h: [places, n, d] residual streams at the ends of prompts.
        letters: the tokens of A to D.

    Returns:
        [places, n] indices into A to D.
    """
    return torch.tensor([best_letters(_read(model, at), letters) for at in h])


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
