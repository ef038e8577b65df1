"""Going on with prompts greedily, over any engine: forward passes, and nothing cached."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bake.questions.prompts import Batch, Prompt, batches
from verify.engines.runners import Runner
from verify.engines.scoring import token_ids

if TYPE_CHECKING:
    from torch import Tensor

END_OF_TURN = "<end_of_turn>"


def prompt_batches(texts: Sequence[str], tokenizer: Any) -> list[Batch]:
    """Texts without BOS in batches that have it, each prompt's `item` its place among them."""
    if not texts:
        return []
    prompts = [
        Prompt("prompts", "text", item + 1, ids, every_token=False, item=item)
        for item, ids in enumerate(token_ids(texts, tokenizer))
    ]
    pad_id = tokenizer.pad_token_id or 0
    return list(batches(prompts, pad_id=pad_id, vocab_size=len(tokenizer)))


def stop_ids(tokenizer: Any) -> frozenset[int]:
    """The tokens after which all is said: EOS, and the end of a turn where there is one."""
    named = (tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END_OF_TURN))
    return frozenset(int(i) for i in named if i is not None and i != tokenizer.unk_token_id)


def go_on(
    runner: Runner, batch: Batch, stops: frozenset[int], max_new_tokens: int
) -> list[list[int]]:
    """The likeliest next token, again and again.

    Args:
        runner: an engine.
        batch: prompts, padded on the left.
        stops: tokens that end a continuation; the one that did is its last.
        max_new_tokens: of each prompt, at most.

    Returns:
        Per prompt, the tokens that follow it.
    """
    import torch

    ids, mask = batch.input_ids, batch.attention_mask
    said: list[list[int]] = [[] for _ in batch.prompts]
    speaking = list(range(len(said)))  # the row of `said` of each row of `ids`
    for _ in range(max_new_tokens):
        chosen = runner.logits(ids, mask, last_only=True)[:, -1].argmax(dim=-1)  # [speaking]
        for row, token in zip(speaking, chosen.tolist(), strict=True):
            said[row].append(token)
        going = [at for at, token in enumerate(chosen.tolist()) if token not in stops]
        if not going:
            break
        speaking = [speaking[at] for at in going]
        ids = torch.cat([ids, chosen[:, None]], dim=1)[going]
        mask = torch.cat([mask, torch.ones_like(chosen)[:, None]], dim=1)[going]
    return said


def mean_next(runner: Runner, shown: Sequence[Batch]) -> Tensor:
    """Each token's mean probability right after some prompts: [vocab] float64, 0 to 1."""
    import torch

    sums = []
    for batch in shown:
        logits = runner.logits(batch.input_ids, batch.attention_mask, last_only=True)[:, -1]
        sums.append(logits.double().softmax(dim=-1).sum(dim=0))
    return torch.stack(sums).sum(dim=0) / sum(len(batch.prompts) for batch in shown)
