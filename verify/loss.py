"""Loss: mean cross-entropy per token of text, in nats."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from verify.prompts import Batch

if TYPE_CHECKING:
    from torch import Tensor


def token_losses(logits: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Cross-entropy of every token that has a real token before it.

    Args:
        logits: [batch, seq, vocab]; those at position t predict the token at t + 1.
        input_ids: [batch, seq].
        attention_mask: [batch, seq], 1 at real tokens.

    Returns:
        [n] float64, nats. BOS predicts the first token and is itself not predicted; padding
        neither predicts nor is predicted.
    """
    from torch.nn.functional import cross_entropy

    counted = (attention_mask[:, :-1] * attention_mask[:, 1:]).bool()
    return cross_entropy(
        logits[:, :-1][counted].float(), input_ids[:, 1:][counted], reduction="none"
    ).double()


@dataclass
class LossSum:
    """One engine's loss on text, collected batch by batch."""

    total: float = 0.0
    """Sum of cross-entropies, in nats."""
    n_tokens: int = 0

    def add(self, batch: Batch, logits: Tensor) -> None:
        """Take in a batch's logits: [batch, seq, vocab]; questions are passed over."""
        rows = [row for row, prompt in enumerate(batch.prompts) if prompt.source == "text"]
        if rows:
            losses = token_losses(logits[rows], batch.input_ids[rows], batch.attention_mask[rows])
            self.total += float(losses.sum())
            self.n_tokens += len(losses)

    @property
    def mean(self) -> float:
        """Nats per token."""
        return self.total / self.n_tokens if self.n_tokens else math.nan
