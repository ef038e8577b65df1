"""Going on with prompts greedily, over any engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bake.families import END_OF_TURN, LATER_TURNS
from bake.questions.prompts import Batch, Prompt, batches
from verify.engines.runners import Runner
from verify.engines.scoring import token_ids

if TYPE_CHECKING:
    from torch import Tensor

AT_ONCE = 32
"""Prompts of a batch at most: several engines hold keys, values and logits of one at a time."""


def prompt_batches(texts: Sequence[str], tokenizer: Any) -> list[Batch]:
    """Texts without BOS in batches that have it, each prompt's `item` its place among them."""
    if not texts:
        return []
    prompts = [
        Prompt("prompts", "text", item + 1, ids, every_token=False, item=item)
        for item, ids in enumerate(token_ids(texts, tokenizer))
    ]
    prompts.sort(key=lambda prompt: -len(prompt.ids))
    pad_id, vocab_size = tokenizer.pad_token_id or 0, len(tokenizer)
    return [
        batch
        for start in range(0, len(prompts), AT_ONCE)
        for batch in batches(prompts[start : start + AT_ONCE], pad_id=pad_id, vocab_size=vocab_size)
    ]


def stop_ids(tokenizer: Any) -> frozenset[int]:
    """The tokens after which all is said: EOS, and the end of a turn where there is one."""
    ends = (END_OF_TURN, LATER_TURNS[END_OF_TURN])
    named = (tokenizer.eos_token_id, *map(tokenizer.convert_tokens_to_ids, ends))
    return frozenset(int(i) for i in named if i is not None and i != tokenizer.unk_token_id)


def go_on(
    runner: Runner, batch: Batch, stops: frozenset[int], max_new_tokens: int
) -> list[list[int]]:
    """Per prompt, the likeliest tokens that follow it; one that ends a continuation is its last.

    Args:
        runner: an engine.
        batch: prompts, padded on the left.
        stops: tokens that end a continuation.
        max_new_tokens: of each prompt, at most.
    """
    said = runner.go_on(batch.input_ids, batch.attention_mask, sorted(stops), max_new_tokens)
    return [[token for token in row if token >= 0] for row in said.tolist()]


def mean_next(runner: Runner, shown: Sequence[Batch]) -> Tensor:
    """Each token's mean probability right after some prompts: [vocab] float64, 0 to 1."""
    import torch

    sums = []
    for batch in shown:
        logits = runner.logits(batch.input_ids, batch.attention_mask)
        sums.append(logits.double().softmax(dim=-1).sum(dim=0))
    return torch.stack(sums).sum(dim=0) / sum(len(batch.prompts) for batch in shown)
