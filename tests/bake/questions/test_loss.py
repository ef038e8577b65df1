from __future__ import annotations

import math

import pytest
import torch

from bake.questions.loss import LossSum, token_losses
from bake.questions.prompts import Prompt, left_padded

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


def prompt(ids: list[int], source: str = "text") -> Prompt:
    form = "text" if source == "text" else "chat"
    return Prompt(source, form, 1, tuple(ids), every_token=True)


ROWS = [[2, 5, 6, 7, 8], [2, 9], [2, 3, 4]]


def test_loss_is_the_mean_over_real_tokens_after_bos() -> None:
    batch = left_padded([prompt(ids) for ids in ROWS], pad_id=0, last_only=False)
    logits = torch.randn(3, 5, VOCAB, generator=torch.Generator().manual_seed(1)) * 3
    expected = by_hand(ROWS, logits)
    assert len(expected) == 4 + 1 + 2
    found = token_losses(logits, batch.input_ids, batch.attention_mask)
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    loss = LossSum()
    loss.add(batch, logits)
    loss.add(batch, logits)
    assert loss.n_tokens == 14
    assert loss.mean == pytest.approx(sum(expected) / len(expected), abs=1e-6)


def test_padding_changes_nothing() -> None:
    logits = torch.randn(3, 5, VOCAB, generator=torch.Generator().manual_seed(2))
    batch = left_padded([prompt(ids) for ids in ROWS], pad_id=0, last_only=False)
    together, alone = LossSum(), LossSum()
    together.add(batch, logits.masked_fill(batch.attention_mask[..., None] == 0, torch.nan))
    for b, ids in enumerate(ROWS):
        one = left_padded([prompt(ids)], pad_id=0, last_only=False)
        alone.add(one, logits[b : b + 1, 5 - len(ids) :])
    assert together.mean == pytest.approx(alone.mean, abs=1e-9)


def test_uniform_logits_cost_log_vocab_and_questions_do_not_count() -> None:
    batch = left_padded([prompt(ROWS[0]), prompt(ROWS[1], "forget")], pad_id=0, last_only=False)
    loss = LossSum()
    loss.add(batch, torch.zeros(2, 5, VOCAB))
    assert loss.n_tokens == 4
    assert loss.mean == pytest.approx(math.log(VOCAB))


def test_no_text_has_no_loss() -> None:
    assert math.isnan(LossSum().mean)
