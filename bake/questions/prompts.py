"""Prompts: the two forms of a multiple-choice question, windows of text, and batches of both."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bake.errors import ModelError
from bake.questions.multiple_choice import LETTERS, Question, Text

if TYPE_CHECKING:
    from torch import Tensor

QUESTION_FORMS = ("chat", "plain")
TEXT = "text"
"""The source, and the form, of what is no question."""
USER_TURN = "<start_of_turn>user\n"
"""What a chat begins with."""

TEXT_WINDOW = 256
"""Longest window of text, in tokens, BOS included."""
TEXT_TOKENS = 16_384
"""About how many tokens of text are looked at: windows are taken until there are as many."""
COMPARED_PROMPTS = 64
"""Per set of questions and prompt form, how many prompts are compared at every token; of the
others, the last one counts."""
BATCH_TOKENS = 2048
"""Most tokens of a batch, padding included."""
BATCH_LOGIT_BYTES = 128 << 20
"""Most bytes of a batch's logits, as float32."""


@dataclass(frozen=True)
class Prompt:
    """One sequence of tokens, and what it was made of."""

    source: str
    """forget | retain | text."""
    form: str
    """chat | plain | text."""
    row: int
    """Row of the source, from 1."""
    ids: tuple[int, ...]
    """BOS first, and once."""
    every_token: bool
    """Whether logits are needed at every token, or at the last one only."""
    item: int = -1
    """Index into the source's list of questions; -1 for text."""


@dataclass(frozen=True)
class Batch:
    """Prompts of like length, padded on the left."""

    prompts: tuple[Prompt, ...]
    input_ids: Tensor
    """[batch, seq]."""
    attention_mask: Tensor
    """[batch, seq], 1 at real tokens."""
    last_only: bool
    """Whether logits are needed at the last token only."""

    @property
    def digest(self) -> str:
        """Tells these prompts from others: a piece of work is named by what it is done on."""
        shown = [(of.source, of.form, of.item, of.ids) for of in self.prompts]
        return hashlib.sha256(repr(shown).encode()).hexdigest()[:16]

    @property
    def wanted(self) -> Tensor:
        """[batch, seq] bool: the tokens whose logits are needed."""
        return self.ends if self.last_only else self.attention_mask.bool()

    @property
    def ends(self) -> Tensor:
        """[batch, seq] bool: the last token of every prompt."""
        ends = self.attention_mask.bool()
        ends[:, :-1] = False
        return ends

    @property
    def scored(self) -> Tensor:
        """[batch, seq] bool: the tokens of text of which the loss of what follows is taken. BOS
        predicts the first token and is itself not predicted; padding neither predicts nor is
        predicted.
        """
        scored = self.attention_mask.bool()
        scored[:, -1] = False
        for row, prompt in enumerate(self.prompts):
            scored[row] &= prompt.source == TEXT
        return scored


# --------------------------------------------------------------------------- the forms


def chat_text(question: Question) -> str:
    """A question in chat form, without BOS. The answer is the next token.

    Source: Farrell et al., arXiv 2410.19278.
    """
    return chat_form(question.question, question.choices, question.topic)


def chat_form(question: str, choices: Sequence[str], topic: str | None) -> str:
    """A question with any number of choices as `chat_text` has it with four."""
    return (
        f"{USER_TURN}{_description(topic)}\n{question}\n"
        f"{_choices(choices)}<end_of_turn>\n<start_of_turn>model\nAnswer: ("
    )


def plain_text(question: Question) -> str:
    """A question in plain form, without BOS. The answer is the next token, a space in front.

    Source: lm-evaluation-harness, tasks `wmdp_bio` and `mmlu`.
    """
    asked = f"{question.question.strip()}\n{_choices(question.choices)}"
    return f"{_description(question.topic)}\n\n{asked}\nAnswer:"


def question_text(question: Question, form: str) -> str:
    """A question in one of the forms."""
    return chat_text(question) if form == "chat" else plain_text(question)


def _description(topic: str | None) -> str:
    about = f" about {topic}" if topic else ""
    return f"The following are multiple choice questions (with answers){about}."


def _choices(choices: Sequence[str]) -> str:
    return "\n".join(
        f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)
    )


# --------------------------------------------------------------------------- tokens


def question_prompts(
    source: str,
    questions: Sequence[Question],
    tokenizer: Any,
    *,
    compared: bool,
) -> list[Prompt]:
    """Every question in both forms.

    Args:
        source: forget | retain.
        questions: the set.
        tokenizer: the base model's.
        compared: whether the first `COMPARED_PROMPTS` of a form need logits at every token.
    """
    prompts = []
    for form in QUESTION_FORMS:
        for item, question in enumerate(questions):
            prompts.append(
                Prompt(
                    source=source,
                    form=form,
                    row=question.row,
                    ids=(bos_id(tokenizer), *_encode(tokenizer, question_text(question, form))),
                    every_token=compared and item < COMPARED_PROMPTS,
                    item=item,
                )
            )
    return prompts


def text_prompts(texts: Iterable[Text], tokenizer: Any) -> list[Prompt]:
    """Windows of text, BOS in front of each, until there are `TEXT_TOKENS` tokens."""
    bos, width = bos_id(tokenizer), TEXT_WINDOW - 1
    prompts: list[Prompt] = []
    n_tokens = 0
    for text in texts:
        ids = _encode(tokenizer, text.text)
        for start in range(0, len(ids), width):
            if n_tokens >= TEXT_TOKENS:
                return prompts
            window = ids[start : start + width]
            n_tokens += len(window)
            prompts.append(Prompt(TEXT, TEXT, text.row, (bos, *window), every_token=True))
    return prompts


def bos_id(tokenizer: Any) -> int:
    """The tokenizer's BOS.

    Raises:
        ModelError: it has none.
    """
    if tokenizer.bos_token_id is None:
        raise ModelError("the base model's tokenizer has no BOS token; expected Gemma's <bos>")
    return int(tokenizer.bos_token_id)


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


# --------------------------------------------------------------------------- batches


def batches(prompts: Sequence[Prompt], *, pad_id: int, vocab_size: int) -> Iterator[Batch]:
    """Prompts in batches of like length, longest first.

    Args:
        prompts: in any order.
        pad_id: stands in front of shorter prompts, masked out.
        vocab_size: how many logits a token has, for the size of a batch.
    """
    for last_only in (False, True):
        group = [prompt for prompt in prompts if prompt.every_token is not last_only]
        group.sort(key=lambda prompt: -len(prompt.ids))
        start = 0
        while start < len(group):
            seq = len(group[start].ids)
            logits_per_prompt = 1 if last_only else seq
            most = min(
                BATCH_TOKENS // seq, BATCH_LOGIT_BYTES // (4 * vocab_size * logits_per_prompt)
            )
            chosen = group[start : start + max(1, most)]
            start += len(chosen)
            yield left_padded(chosen, pad_id=pad_id, last_only=last_only)


def left_padded(prompts: Sequence[Prompt], *, pad_id: int, last_only: bool) -> Batch:
    """One batch; its last column holds the last token of every prompt."""
    import torch

    seq = max(len(prompt.ids) for prompt in prompts)
    input_ids = torch.full((len(prompts), seq), pad_id, dtype=torch.long)
    attention_mask = torch.zeros((len(prompts), seq), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        input_ids[row, seq - len(prompt.ids) :] = torch.tensor(prompt.ids)
        attention_mask[row, seq - len(prompt.ids) :] = 1
    return Batch(tuple(prompts), input_ids, attention_mask, last_only)
