"""What follows several prompts: what they share is computed once where that goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bake.files.halving import in_halves, joined
from bake.questions.answers import (
    LetterTokens,
    best_choice,
    best_letters,
    choice_log_likelihoods,
)
from bake.questions.prompts import Prompt, batches, bos_id, by_question, encoded
from verify.engines.runners import Runner
from verify.engines.token_tree import TokenTree, TreeRunner, merge, work_of_batch

if TYPE_CHECKING:
    from torch import Tensor

TREE_TOKENS = 2048
"""Most tokens of one tree; larger ones are read in parts."""
LEAST_SAVED = 0.15
"""Share of the work that trees must save, or batches are read."""


def token_ids(texts: Sequence[str], tokenizer: Any) -> list[tuple[int, ...]]:
    """Each text as tokens, BOS first."""
    return [(bos_id(tokenizer), *ids) for ids in encoded(texts, tokenizer)]


def last_logits(runner: Runner, sequences: Sequence[Sequence[int]], tokenizer: Any) -> Tensor:
    """Next-token logits after each of several sequences; no other logits are formed.

    Args:
        runner: an engine. One that reads trees is given one where that saves enough; else batches.
        sequences: token ids, BOS first. Neighbours should share their beginnings.
        tokenizer: the base model's.

    Returns:
        [sequences, vocab] float32.
    """
    if isinstance(runner, TreeRunner) and runner.reads_trees:
        width = runner.width()
        parts = _parts(sequences, merge(sequences), width)
        plain = work_of_batch([len(ids) for ids in sequences], width)
        if sum(tree.work(width) for _, tree in parts) <= (1 - LEAST_SAVED) * plain:
            return _through_trees(runner, parts)
    return _in_batches(runner, sequences, tokenizer)


def choices_made(
    runner: Runner, asked: Sequence[Sequence[Prompt]], letters: LetterTokens, tokenizer: Any
) -> list[int]:
    """Which choice an engine makes of each of several questions.

    Args:
        runner: an engine.
        asked: per question, what `bake.questions.prompts.asking` gave; all in one form.
        letters: the answer tokens.
        tokenizer: the base model's.
    """
    prompts = [replace(p, item=item) for item, of in enumerate(asked) for p in of]
    if prompts and prompts[0].choice is None:
        logits = last_logits(runner, [prompt.ids for prompt in prompts], tokenizer)
        return best_letters(logits, getattr(letters, prompts[0].form))
    found: dict[int, int] = {}
    pad_id = tokenizer.pad_token_id or 0
    for batch in batches(prompts, pad_id=pad_id, vocab_size=len(tokenizer)):
        seen = runner.read(batch.input_ids, batch.attention_mask, batch.ends, batch.scored)
        of_each = choice_log_likelihoods(seen.losses, batch.prompts)
        for of, likelihoods in zip(by_question(batch.prompts), of_each, strict=True):
            found[of[0].item] = best_choice(likelihoods, of)
    return [found[item] for item in range(len(asked))]


Part = tuple[Sequence[Sequence[int]], TokenTree]
"""Some sequences, and their tree."""


def _parts(sequences: Sequence[Sequence[int]], tree: TokenTree, width: int) -> list[Part]:
    """Sequences in as many trees as are least work: neighbours share most, and in a smaller tree
    fewer tokens stand beside one another that do not see one another.
    """
    if len(sequences) > 1:
        middle = len(sequences) // 2
        halves = [(half, merge(half)) for half in (sequences[:middle], sequences[middle:])]
        less = sum(half.work(width) for _, half in halves) < tree.work(width)
        if less or len(tree.ids) > TREE_TOKENS:
            return [part for half in halves for part in _parts(*half, width)]
    return [(sequences, tree)]


def _through_trees(runner: TreeRunner, parts: Sequence[Part]) -> Tensor:
    """One tree after another, each in halves where memory does not suffice."""
    import torch

    def read(sequences: Sequence[Sequence[int]], tree: TokenTree) -> Tensor:
        def run(some: slice) -> Tensor:
            whole = len(sequences[some]) == len(sequences)
            return runner.tree_logits(tree if whole else merge(sequences[some]))

        each = -(-len(tree.ids) // len(sequences))
        return joined(in_halves(runner, "reading trees", run, len(sequences), each))

    return torch.cat([read(*part) for part in parts])


def _in_batches(runner: Runner, sequences: Sequence[Sequence[int]], tokenizer: Any) -> Tensor:
    """Whole sequences, those of like length together."""
    import torch

    prompts = [
        Prompt("questions", "chat", 0, tuple(ids), every_token=False, item=item)
        for item, ids in enumerate(sequences)
    ]
    found: dict[int, Tensor] = {}
    pad_id = tokenizer.pad_token_id or 0
    for batch in batches(prompts, pad_id=pad_id, vocab_size=len(tokenizer)):
        logits = runner.logits(batch.input_ids, batch.attention_mask)
        found |= {prompt.item: row for prompt, row in zip(batch.prompts, logits, strict=True)}
    return torch.stack([found[item] for item in range(len(sequences))])
