"""Prompts: questions in any of their forms and windows of text as tokens, and batches of both."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from bake.errors import DataError, ModelError, shown
from bake.families import LATER_TURNS
from bake.questions.forms import FORMS, forms_beside
from bake.questions.multiple_choice import LETTERS, Question, Text
from bake.recipe import PromptForm

if TYPE_CHECKING:
    from torch import Tensor

TEXT = "text"
"""The source, and the form, of what is no question."""
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
class Choice:
    """A choice of which a prompt ends with the text."""

    index: int
    """Of the choice."""
    n_tokens: int
    """Of its text, the space in front included."""
    n_characters: int
    """Of its text, without that space."""


@dataclass(frozen=True)
class Prompt:
    """One sequence of tokens, and what it was made of."""

    source: str
    """forget | retain | text."""
    form: str
    """A key of `FORMS`, or text."""
    row: int
    """Row of the source, from 1."""
    ids: tuple[int, ...]
    """BOS first, and once."""
    every_token: bool
    """Whether logits are needed at every token, or at the last one only."""
    item: int = -1
    """Index into the source's list of questions; -1 for text."""
    choice: Choice | None = None
    """Where a choice's own text is the answer: the one that this prompt ends with."""

    @property
    def answer_places(self) -> range:
        """Positions, from 0 (BOS), at which the answer is predicted."""
        last = len(self.ids) - 1
        if self.choice is None:
            return range(last, last + 1)
        return range(last - self.choice.n_tokens, last)


@dataclass(frozen=True)
class Batch:
    """Prompts of like length, padded on the left. Those that end with choices are in batches of
    their own, the four of a question together.
    """

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

    def part(self, rows: slice) -> Batch:
        """Some of its prompts, as wide."""
        ids, mask = self.input_ids[rows], self.attention_mask[rows]
        return Batch(self.prompts[rows], ids, mask, self.last_only)

    @property
    def of_choices(self) -> bool:
        """Whether its prompts end with choices: no logits are needed, but the losses of these."""
        return self.prompts[0].choice is not None

    @property
    def wanted(self) -> Tensor:
        """[batch, seq] bool: the tokens whose logits are needed."""
        return self.ends if self.last_only else self.attention_mask.bool()

    @property
    def ends(self) -> Tensor:
        """[batch, seq] bool: the last token of every prompt; none where choices are the ends."""
        ends = self.attention_mask.bool()
        ends[:, :-1] = False
        return ends & (not self.of_choices)

    @property
    def n_last(self) -> int:
        """How many of the last columns hold every token whose logits or loss is needed."""
        needed = (self.wanted | self.scored).any(dim=0)
        return len(needed) - int(needed.nonzero()[0])

    @property
    def scored(self) -> Tensor:
        """[batch, seq] bool: the tokens of which the loss of what follows is taken, text or a
        choice. BOS predicts the first token and is itself not predicted; padding neither predicts
        nor is predicted.
        """
        scored = self.attention_mask.bool()
        scored[:, -1] = False
        for row, prompt in enumerate(self.prompts):
            if prompt.choice is not None:
                scored[row, : -1 - prompt.choice.n_tokens] = False
            else:
                scored[row] &= prompt.source == TEXT
        return scored


# --------------------------------------------------------------------------- tokens


def question_prompts(
    source: str,
    questions: Sequence[Question],
    tokenizer: Any,
    *,
    compared: bool,
    forms: Sequence[PromptForm] = forms_beside(None),
) -> list[Prompt]:
    """Every question in some forms.

    Args:
        source: forget | retain.
        questions: the set.
        tokenizer: the base model's.
        compared: whether the first `COMPARED_PROMPTS` of a form need logits at every token; of a
            form without letters none do.
        forms: which.

    Raises:
        DataError: a choice is empty, and its text is the answer.
    """
    prompts: list[Prompt] = []
    for form in forms:
        for item, question in enumerate(questions):
            at = Prompt(source, form, question.row, (), every_token=False, item=item)
            asked = asking(FORMS[form].text(question), question, tokenizer, at)
            every_token = compared and item < COMPARED_PROMPTS and FORMS[form].letters
            prompts += [replace(prompt, every_token=every_token) for prompt in asked]
    return prompts


def prompts_of(
    asked: Mapping[str, Sequence[Question]],
    tokenizer: Any,
    forms: Sequence[PromptForm],
    *,
    compared: bool = False,
) -> list[Prompt]:
    """`question_prompts` of the questions of every source."""
    return [
        prompt
        for source, of in asked.items()
        for prompt in question_prompts(source, of, tokenizer, compared=compared, forms=forms)
    ]


def asking(text: str, question: Question, tokenizer: Any, at: Prompt) -> list[Prompt]:
    """What asks a question: one prompt, or one for each choice where its text is the answer.

    The text with a choice is tokenised as a whole, and what it has more than the text alone is the
    choice's. Source: lm-evaluation-harness, `TemplateLM._encode_pair`.

    Args:
        text: what asks it in the form of `at`, without BOS.
        question: whose choices these are.
        tokenizer: the base model's.
        at: everything else about the prompts.

    Raises:
        DataError: a choice is empty, and its text is the answer.
    """
    bos, form = bos_id(tokenizer), FORMS[cast(PromptForm, at.form)]
    ids = _encode(tokenizer, text)
    if form.letters:
        return [replace(at, ids=(bos, *ids))]
    found = []
    for index, choice in enumerate(question.choices):
        own = _encode(tokenizer, f"{text}{form.opens}{choice}")[len(ids) :]
        if not choice or not own:
            raise DataError(
                f"{at.source} questions, row {question.row}: choice {LETTERS[index]} is "
                f"{shown(choice)}; expected some text, whose likelihood the {at.form} form takes"
            )
        of = Choice(index, len(own), len(choice))
        found.append(replace(at, ids=(bos, *ids, *own), choice=of))
    return found


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
    (said,) = _turned([text], tokenizer)
    return list(tokenizer(said, add_special_tokens=False)["input_ids"])


def encoded(texts: Iterable[str], tokenizer: Any) -> list[list[int]]:
    """Texts as tokens, without BOS, their turns marked as the tokenizer knows them."""
    said = _turned(texts, tokenizer)
    return [list(ids) for ids in tokenizer(said, add_special_tokens=False)["input_ids"]]


def _turned(texts: Iterable[str], tokenizer: Any) -> list[str]:
    """Texts in which marks of turns that a tokenizer does not know are as Gemma 4 has them, where
    it knows those.
    """

    def known(token: str) -> bool:
        return tokenizer.convert_tokens_to_ids(token) not in (None, tokenizer.unk_token_id)

    said = list(texts)
    for mark, later in LATER_TURNS.items():
        if any(mark in text for text in said) and known(later) and not known(mark):
            said = [text.replace(mark, later) for text in said]
    return said


# --------------------------------------------------------------------------- batches


def batches(prompts: Sequence[Prompt], *, pad_id: int, vocab_size: int) -> Iterator[Batch]:
    """Prompts in batches of like length, longest first; those that end with choices come last.

    Args:
        prompts: in any order; the four of a question that end with its choices one after another.
        pad_id: stands in front of shorter prompts, masked out.
        vocab_size: how many logits a token has, for the size of a batch.
    """
    for last_only in (False, True):
        group = [p for p in prompts if p.every_token is not last_only and p.choice is None]
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
    some: list[Prompt] = []
    for asked in sorted(by_question(prompts), key=lambda of: -max(len(p.ids) for p in of)):
        both = [*some, *asked]
        n_scored = sum(len(prompt.answer_places) for prompt in both)
        n_tokens = len(both) * max(len(prompt.ids) for prompt in both)
        if n_tokens > BATCH_TOKENS or n_scored > BATCH_LOGIT_BYTES // (4 * vocab_size):
            if some:
                yield left_padded(some, pad_id=pad_id, last_only=True)
            both = list(asked)
        some = both
    if some:
        yield left_padded(some, pad_id=pad_id, last_only=True)


def by_question(prompts: Sequence[Prompt]) -> list[Sequence[Prompt]]:
    """Those of some prompts that end with choices, the four of a question together."""
    of_choices = [prompt for prompt in prompts if prompt.choice is not None]
    n = len(LETTERS)
    return [of_choices[start : start + n] for start in range(0, len(of_choices), n)]


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
