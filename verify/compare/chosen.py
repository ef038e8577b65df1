"""Which tokens' logits are compared, where a vocabulary is too large to compare all of them.

Of a quarter of a million logits for every token, forming, moving and comparing takes longer than
the model. What a clamp does shows where it acted and after: those tokens come first, and a seeded
sample of the others stands beside them. Answers are given at the ends of prompts, which are always
among them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from bake.questions.prompts import Batch, Prompt

COMPARED_LOGITS = 1 << 30
"""About how many logits of one engine are compared in all."""
AT_FIRINGS = 0.75
"""Share of them that goes to tokens at or after a firing, where there are so many."""
FEWEST = 8
"""Tokens of a prompt that are compared at least."""


def share_compared(prompts: Sequence[Prompt], vocab_size: int) -> float:
    """Of the tokens whose logits could be compared, how many are: 1 where all of them are."""
    n_tokens = sum(
        len(prompt.ids) if prompt.every_token else int(prompt.choice is None) for prompt in prompts
    )
    return min(1.0, COMPARED_LOGITS / vocab_size / max(1, n_tokens))


def choose(batch: Batch, fired: Tensor, share: float) -> Tensor:
    """The tokens of a batch that are compared.

    Args:
        batch: any.
        fired: [batch, seq] bool, on which tokens a clamp of the reference acted.
        share: as `share_compared` gives it.

    Returns:
        [batch, seq] bool. The same whenever it is asked for: the sample is seeded by the prompt.
    """
    import torch

    if share >= 1 or batch.last_only:
        return batch.wanted
    chosen = batch.ends
    seq = batch.input_ids.shape[1]
    for row, prompt in enumerate(batch.prompts):
        n = len(prompt.ids)
        quota = min(n, max(FEWEST, math.ceil(share * n)))
        seed = torch.Generator().manual_seed(prompt.row * 8191 + n)
        order = torch.rand(n, generator=seed)
        acted = fired[row, seq - n :].cpu()
        begun = acted.cumsum(dim=0) > 0
        # Smallest first: tokens that fired, those after a firing, the others.
        ranked = (order - begun.float() - acted.float()).argsort()
        at_firings = ranked[: math.ceil(AT_FIRINGS * quota)]
        left = order.index_fill(0, at_firings, torch.inf).argsort()
        places = torch.cat([at_firings, left[: quota - len(at_firings)]])
        chosen[row, seq - n + places] = True
    return chosen
