"""Prompts of token ids, and logits: random ones, and those of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bake.questions.prompts import Prompt
from verify.engines.runners import Runner

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


def every_logit(runner: Runner, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[batch, seq, vocab], padding included."""
    everything = torch.ones_like(mask, dtype=torch.bool)
    return runner.logits(ids, mask, everything).view(*ids.shape, -1)


def token_losses(
    logits: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> torch.Tensor:
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


def one_after_another(
    runner: Runner, ids: torch.Tensor, mask: torch.Tensor, stops: Sequence[int], most: int
) -> list[list[int]]:
    """What `go_on` says, prompt by prompt, with no padding, no cache, and every logit formed."""
    said = []
    for row, real in zip(ids, mask.bool(), strict=True):
        prompt, new = row[real].tolist(), list[int]()
        while len(new) < most and not set(new) & set(stops):
            whole = torch.tensor([prompt + new])
            new.append(int(every_logit(runner, whole, torch.ones_like(whole))[0, -1].argmax()))
        said.append(new)
    return said


class TokenNames:
    def convert_ids_to_tokens(self, token: int) -> str:
        return f"token {token}"
