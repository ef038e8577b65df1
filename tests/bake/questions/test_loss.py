from __future__ import annotations

import math

import pytest
import torch

from bake.questions.loss import LossSum, scored_losses
from bake.questions.prompts import Batch, Prompt, left_padded

VOCAB = 11


def by_hand(rows: list[list[int]], logits: torch.Tensor) -> list[float]:
    """Cross-entropy of every token after BOS, token by token, from left-padded logits."""
    losses = []
    seq = logits.shape[1]
    for b, ids in enumerate(rows):
        for i in range(1, len(ids)):
            scores = logits[b, seq - len(ids) + i - 1].double().tolist()
            total = math.log(sum(math.exp(score) for score in scores))
            losses.append(total - scores[ids[i]])
    return losses


def batch_of(rows: list[list[int]]) -> Batch:
    prompts = [Prompt("text", "text", 1, tuple(ids), every_token=True) for ids in rows]
    return left_padded(prompts, pad_id=0, last_only=False)


def losses_of(logits: torch.Tensor, batch: Batch) -> list[float]:
    found: list[float] = scored_losses(logits, batch).tolist()
    return found


ROWS = [[2, 5, 6, 7, 8], [2, 9], [2, 3, 4]]


def test_loss_is_the_mean_over_real_tokens_after_bos() -> None:
    logits = torch.randn(3, 5, VOCAB, generator=torch.Generator().manual_seed(1)) * 3
    expected = by_hand(ROWS, logits)
    assert len(expected) == 4 + 1 + 2
    found = losses_of(logits, batch_of(ROWS))
    assert found == pytest.approx(expected, abs=1e-6)
    loss = LossSum()
    loss.losses += found
    loss.losses += found
    assert loss.n_tokens == 14
    assert loss.mean == pytest.approx(sum(expected) / len(expected), abs=1e-6)


def test_padding_changes_nothing() -> None:
    logits = torch.randn(3, 5, VOCAB, generator=torch.Generator().manual_seed(2))
    batch, alone = batch_of(ROWS), []
    together = losses_of(logits.masked_fill(batch.attention_mask[..., None] == 0, torch.nan), batch)
    for b, ids in enumerate(ROWS):
        alone += losses_of(logits[b : b + 1, 5 - len(ids) :], batch_of([ids]))
    assert together == pytest.approx(alone, abs=1e-9)


def test_uniform_logits_cost_log_vocab() -> None:
    loss = LossSum(losses_of(torch.zeros(1, 5, VOCAB), batch_of(ROWS[:1])))
    assert loss.n_tokens == 4
    assert loss.mean == pytest.approx(math.log(VOCAB))


def test_no_text_has_no_loss() -> None:
    assert math.isnan(LossSum().mean)
