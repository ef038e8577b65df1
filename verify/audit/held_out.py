"""What forget questions or prompts ask for, in disjoint parts, and which texts say what.

A text says a fact where it holds the fact's answer and one of the question's words that few other
questions have; where it has none, the answer is enough. Rather too many texts are left out than too
few. What says a fact in other words than its answer's is not seen.

Source: Deeb and Roger, Do Unlearning Methods Remove Information from Language Model Weights?, arXiv
2410.08827: relearn some facts, ask for others.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import Any

from bake.errors import DataError
from bake.questions.corpora import corpus_texts
from bake.questions.forms import FORMS
from bake.questions.multiple_choice import Question, load_questions, load_texts
from bake.questions.open_prompts import OpenPrompt, mentions
from bake.recipe import PromptForm, Recipe
from bake.sources import Corpus
from verify.audit.attempts import OPEN, Lead

FEW, FEW_AT_LEAST = 0.1, 5
"""A word tells facts apart where at most this share of the questions have it, or so many."""
FEWEST_QUESTIONS, FEWEST_TEXTS = 2, 5
"""Of a part of the facts, and of what is trained on."""
MOST_TEXTS = 20_000
"""Of a corpus."""
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Fact:
    """One fact, as one question or prompt has it."""

    text: str
    """What asks for it."""
    answers: tuple[str, ...]
    wrong: str | None = None
    """Another answer, for a fact that nobody ever knew."""


@dataclass(frozen=True)
class Held:
    """A part of the facts that is held out, and the texts that there are then."""

    questions: tuple[Question, ...]
    """The forget questions that ask for them."""
    prompts: tuple[OpenPrompt, ...]
    """The prompts on the topic that do."""
    other: tuple[str, ...] = field(repr=False)
    """Forget texts that say none of them."""
    same: tuple[str, ...] = field(repr=False)
    """Forget texts that say at least one."""
    benign: tuple[str, ...] = field(repr=False)
    """Texts on anything else; none says a fact of the topic, held out or not."""
    swapped: tuple[str, ...] = field(repr=False)
    """`same`, each of these facts' answers exchanged with a wrong one: what no model ever knew."""
    swapped_questions: tuple[Question, ...] = ()
    """`questions`, that wrong answer the right one."""


class Facts:
    """The facts of a recipe's forget questions, and the texts that say them.

    Args:
        recipe: with a `[verify]` table. Texts are its `[select]` corpora; without them the
            questions themselves, answered, and `verify.text`.
        tokenizer: the base model's.
        prompts: on the topic.
        n_parts: how many disjoint parts there are.
        lead: what is split: questions, or prompts.

    Raises:
        DataError: a source cannot be read, or there is too little to split.
    """

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: Any,
        prompts: Sequence[OpenPrompt],
        n_parts: int,
        lead: Lead,
    ) -> None:
        assert recipe.verify is not None
        self.questions = load_questions(recipe.verify.forget_questions, recipe)
        self.prompts = tuple(prompts)
        self.n_parts = n_parts
        self._form: PromptForm = recipe.verify.prompt
        others = []
        select = recipe.select
        if select is not None and select.forget_questions is not None:
            others = load_questions(select.forget_questions, recipe)
        self._asked = [_of_question(question) for question in (*self.questions, *others)]
        self._asked += [Fact(prompt.prompt, prompt.answers) for prompt in prompts]
        self._first_prompt = len(self._asked) - len(self.prompts)
        asking = range(len(self.questions))
        self._split = range(self._first_prompt, len(self._asked)) if lead == OPEN else asking
        self._others = others
        self._forget = self._texts(recipe, tokenizer, None if select is None else select.forget)
        self._retain = self._texts(recipe, tokenizer, None if select is None else select.retain)
        benign = self._retain or [t.text for t in load_texts(recipe.verify.text, recipe)]
        self._benign = tuple(text for text in benign if not any(self._said(text)))
        if len(self.parts[-1]) < FEWEST_QUESTIONS:
            source, what = ("forget_questions", "questions")
            if lead == OPEN:
                source, what = ("completions", "prompts")
            raise DataError(
                f"{source}: {len(self._split)} {what} ask for {len(self.groups)} facts; expected "
                f"at least {FEWEST_QUESTIONS * n_parts}, to split in {n_parts}"
            )

    @staticmethod
    def _texts(recipe: Recipe, tokenizer: Any, corpus: Corpus | None) -> list[str]:
        """The texts of a corpus, each once."""
        if corpus is None:
            return []
        return list(dict.fromkeys(islice(corpus_texts(corpus, recipe, tokenizer), MOST_TEXTS)))

    @cached_property
    def _words(self) -> list[frozenset[str]]:
        """Of each fact, the words that tell it from others."""
        each = [frozenset(_words(fact.text)) for fact in self._asked]
        counts = Counter(word for words in each for word in words)
        most = max(FEW_AT_LEAST, int(FEW * len(each)))
        return [frozenset(word for word in words if counts[word] <= most) for words in each]

    @cached_property
    def _wordless(self) -> set[int]:
        return {number for number, words in enumerate(self._words) if not words}

    @cached_property
    def _by_word(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for number, words in enumerate(self._words):
            for word in words:
                found.setdefault(word, []).append(number)
        return found

    def _said(self, text: str) -> Iterator[int]:
        """The numbers of the facts that a text says."""
        near = {number for word in set(_words(text)) for number in self._by_word.get(word, ())}
        for number in sorted(near | self._wordless):
            if mentions(text, self._asked[number].answers):
                yield number

    def stating(self, row: int, texts: Sequence[str]) -> list[str]:
        """The texts that say what the prompt of a row of its source asks for."""
        asked = {n + self._first_prompt for n, of in enumerate(self.prompts) if of.row == row}
        return [text for text in texts if not asked.isdisjoint(self._said(text))]

    @cached_property
    def groups(self) -> list[list[int]]:
        """What is split, by its numbers, what asks for one fact together."""
        group_of = list(range(len(self._asked)))

        def root(number: int) -> int:
            while group_of[number] != number:
                number = group_of[number]
            return number

        for number, fact in enumerate(self._asked):
            for other in self._said(f"{fact.text} {fact.answers[0]}"):
                group_of[root(other)] = root(number)
        found: dict[int, list[int]] = {}
        for number in self._split:
            found.setdefault(root(number), []).append(number)
        self._root = [root(number) for number in range(len(self._asked))]
        return list(found.values())

    @cached_property
    def parts(self) -> list[list[int]]:
        """Disjoint parts of what is split, by its numbers, as large as one another but for what
        asks for one fact; the smallest is last.
        """
        parts: list[list[int]] = [[] for _ in range(self.n_parts)]
        groups = list(self.groups)
        random.Random("parts").shuffle(groups)
        for group in sorted(groups, key=len, reverse=True):
            min(parts, key=len).extend(group)
        return [sorted(part) for part in sorted(parts, key=len, reverse=True)]

    def held(self, seed: int) -> Held:
        """The part of a seed, held out.

        Raises:
            DataError: too few texts are left to train on.
        """
        part = self.parts[seed % self.n_parts]
        roots = {self._root[number] for number in part}
        out = {number for number, root in enumerate(self._root) if root in roots}
        questions = [number for number in sorted(out) if number < len(self.questions)]
        solved = [
            f"{FORMS[self._form].solved(question)}".strip()
            for question in (*self.questions, *self._others)
        ]
        forget = self._forget or solved
        other = [text for text in forget if out.isdisjoint(self._said(text))]
        same = [text for text in forget if not set(part).isdisjoint(self._said(text))]
        if len(same) < FEWEST_TEXTS:
            same += [
                solved[number]
                if number < len(self.questions)
                else f"{self._asked[number].text} {self._asked[number].answers[0]}"
                for number in part
            ]
        for name, texts in (("forget", other), ("benign", self._benign)):
            if len(texts) < FEWEST_TEXTS:
                raise DataError(
                    f"{name} texts: {len(texts)} say nothing of the facts that are held out; "
                    f"expected at least {FEWEST_TEXTS}, to train on"
                )
        return Held(
            questions=tuple(self.questions[number] for number in questions),
            prompts=tuple(
                self.prompts[number - self._first_prompt]
                for number in sorted(out)
                if number >= self._first_prompt
            ),
            other=tuple(other),
            same=tuple(same),
            benign=self._benign,
            swapped=tuple(self._swapped(text, out) for text in same),
            swapped_questions=tuple(_swapped_question(self.questions[n]) for n in questions),
        )

    def _swapped(self, text: str, out: Iterable[int]) -> str:
        """A text in which the answers of some facts are wrong ones; sentence by sentence, or as a
        whole where it has several lines.
        """
        wrong = {number: self._asked[number].wrong for number in out}
        said = []
        for piece in [text] if "\n" in text else re.split(r"(?<=[.!?])(?=\s)", text):
            changed = piece
            for number in self._said(piece):
                if (other := wrong.get(number)) is not None:
                    changed = _exchanged(changed, self._asked[number].answers[0], other)
                    break
            said.append(changed)
        return "".join(said)


def _of_question(question: Question) -> Fact:
    return Fact(question.question, (question.choices[question.answer],), _wrong(question)[1])


def _wrong(question: Question) -> tuple[int, str]:
    """A choice that is not right: the next one."""
    number = (question.answer + 1) % len(question.choices)
    return number, question.choices[number]


def _swapped_question(question: Question) -> Question:
    return replace(question, answer=_wrong(question)[0])


def _exchanged(text: str, one: str, other: str) -> str:
    """A text with two phrases in each other's place."""
    both = {one: other, other: one}
    pattern = "|".join(re.escape(phrase) for phrase in sorted(both, key=len, reverse=True))
    return re.sub(rf"(?<!\w)(?:{pattern})(?!\w)", lambda match: both[match[0]], text)


def _words(text: str) -> list[str]:
    return [word.casefold() for word in _WORD.findall(text)]
