"""Prompts of token ids, and logits: random ones, and those of a model."""

from __future__ import annotations

from typing import Any

import torch

from bake.questions.prompts import Prompt

PARITY_VOCAB = 7


def tiny_prompts() -> torch.Tensor:
    """[4, 24] token ids, BOS first and once more in the middle."""
    ids = torch.randint(3, 90, (4, 24), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = ids[1, 9] = 2
    return ids


def forget_prompt(row: int, ids: tuple[int, ...]) -> Prompt:
    return Prompt("forget", "chat", row, ids, every_token=True, item=row - 1)


def random_logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def flat_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """[tokens, vocab] float32."""
    with torch.no_grad():
        return model(input_ids=ids).logits.float().flatten(0, 1)


class TokenNames:
    def convert_ids_to_tokens(self, token: int) -> str:
        return f"token {token}"
