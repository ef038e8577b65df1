"""Loss: mean cross-entropy per token of text, in nats."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from bake.questions.prompts import Batch


def scored_losses(logits: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of what follows each of a batch's scored tokens.

    Args:
        logits: [batch, n_last, vocab], of the batch's last columns.
        batch: any.

    Returns:
        [m] float64, nats, row by row.
    """
    from torch.nn.functional import cross_entropy

    scored = batch.scored.to(logits.device)
    following = batch.input_ids.to(logits.device).roll(-1, dims=-1)[scored]
    kept = logits[scored[:, -logits.shape[1] :]]
    return cross_entropy(kept.float(), following, reduction="none").double()


@dataclass
class LossSum:
    """One engine's loss on text, collected batch by batch."""

    losses: list[float] = field(default_factory=list)
    """Cross-entropy of every token, in nats."""

    @property
    def n_tokens(self) -> int:
        """How many tokens."""
        return len(self.losses)

    @property
    def mean(self) -> float:
        """Nats per token."""
        return math.fsum(self.losses) / len(self.losses) if self.losses else math.nan
