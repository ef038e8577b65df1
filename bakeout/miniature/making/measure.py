"""What the clamp does to the miniature: multiple choice and loss added.

The clamp here is the plain one: whole SAE, encode, set features, decode, add the error back.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from sae_lens import SAE
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Gemma2ForCausalLM, PreTrainedTokenizerFast

from bakeout.miniature.making.tokenizer import BOS, PAD
from bakeout.miniature.making.world import LETTERS, Question, chat_prompt, plain_prompt

BATCH = 64


@dataclass(frozen=True)
class Clamp:
    """Features of one SAE set to one value wherever they are active."""

    layer: int
    features: tuple[int, ...]
    value: float


@dataclass(frozen=True)
class Prompts:
    """Tokenised prompts of one length, so that no padding is needed."""

    ids: Tensor
    """[n, seq], `<bos>` first."""
    answers: Tensor
    """[n], index of the right letter."""


@dataclass(frozen=True)
class PromptSet:
    """The questions of one split in both prompt forms."""

    chat: tuple[Prompts, ...]
    plain: tuple[Prompts, ...]


def _by_length(rows: Sequence[list[int]], answers: Sequence[int]) -> tuple[Prompts, ...]:
    groups: dict[int, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        groups[len(row)].append(i)
    return tuple(
        Prompts(torch.tensor([rows[i] for i in group]), torch.tensor([answers[i] for i in group]))
        for _, group in sorted(groups.items())
    )


def tokenise(questions: Sequence[Question], tokenizer: PreTrainedTokenizerFast) -> PromptSet:
    """Both prompt forms of `questions`."""
    answers = [question.answer for question in questions]
    chat = [tokenizer.encode(chat_prompt(question)) for question in questions]
    plain = [tokenizer.encode(plain_prompt(question)) for question in questions]
    return PromptSet(_by_length(chat, answers), _by_length(plain, answers))


@contextmanager
def clamped(model: Gemma2ForCausalLM, sae: SAE, clamp: Clamp, ids: Tensor) -> Iterator[None]:
    """Within the block the layer's output is clamped; `<bos>` positions of `ids` are exempt."""
    features = torch.tensor(clamp.features)
    exempt = (ids == BOS)[..., None]

    def edit(module: torch.nn.Module, args: object, output: Tensor) -> Tensor:
        # h' = decode(a') + (h - decode(a)). Source: arXiv 2410.19278
        acts = sae.encode(output)
        edited = acts.clone()
        read = acts[..., features]
        edited[..., features] = torch.where(read > 0, torch.full_like(read, clamp.value), read)
        error = output - sae.decode(acts)
        return torch.where(exempt, output, sae.decode(edited) + error)

    handle = model.model.layers[clamp.layer].register_forward_hook(edit)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def logits_of(
    model: Gemma2ForCausalLM, ids: Tensor, sae: SAE | None, clamp: Clamp | None, keep: int = 0
) -> Tensor:
    """Logits [batch, seq or keep, vocab], clamped where a clamp is given."""
    editing = nullcontext() if clamp is None or sae is None else clamped(model, sae, clamp, ids)
    with editing:
        logits: Tensor = model(input_ids=ids, logits_to_keep=keep).logits
    return logits


def letter_ids(tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """[2, 4]: the tokens of "A".."D" and of " A".." D"."""
    forms = [[f"{space}{letter}" for letter in LETTERS] for space in ("", " ")]
    return torch.tensor(
        [[tokenizer.encode(form, add_special_tokens=False)[0] for form in row] for row in forms]
    )


def accuracy(
    model: Gemma2ForCausalLM,
    groups: Sequence[Prompts],
    letters: Tensor,
    sae: SAE | None = None,
    clamp: Clamp | None = None,
) -> float:
    """Share of questions whose right letter has the highest logit at the last token.

    Args:
        model: the base model.
        groups: prompts of one form.
        letters: [n_spellings, 4] token ids; the better spelling of each letter counts.
        sae: needed where a clamp is given.
        clamp: None measures the base.
    """
    right = 0
    total = 0
    for group in groups:
        for ids, answers in zip(
            torch.split(group.ids, BATCH), torch.split(group.answers, BATCH), strict=True
        ):
            last = logits_of(model, ids, sae, clamp, keep=1)[:, 0]  # [batch, vocab]
            scores = last[:, letters].amax(dim=1)  # [batch, 4]
            right += int((scores.argmax(dim=-1) == answers).sum())
            total += len(answers)
    return right / total


def mean_loss(
    model: Gemma2ForCausalLM,
    texts: Sequence[Tensor],
    sae: SAE | None = None,
    clamp: Clamp | None = None,
) -> float:
    """Mean cross-entropy in nats/token over right-padded batches [batch, seq]."""
    total = 0.0
    count = 0
    for ids in texts:
        logits = logits_of(model, ids, sae, clamp)[:, :-1]
        targets = ids[:, 1:].flatten()
        losses = cross_entropy(logits.flatten(0, 1), targets, reduction="sum", ignore_index=PAD)
        total += float(losses)
        count += int((targets != PAD).sum())
    return total / count


def text_batches(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> list[Tensor]:
    """Each text with `<bos>`, sorted by length and right-padded, in batches [batch, seq]."""
    rows = sorted((tokenizer.encode(text) for text in texts), key=len)
    batches = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
    return [
        torch.tensor([row + [PAD] * (len(batch[-1]) - len(row)) for row in batch])
        for batch in batches
    ]
