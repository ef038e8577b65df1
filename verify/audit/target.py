"""What attacks are aimed at: an audited folder, and everything that it is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from bake.questions.answers import best_letters, letter_tokens
from bake.questions.forms import FORMS
from bake.questions.multiple_choice import Question, load_questions
from bake.questions.open_prompts import OpenPrompt, mentions
from bake.questions.prompts import Prompt, asking
from bake.recipe import PromptForm
from bake.stock import load_tokenizer
from verify.audit.attempts import OPEN, Lead, Scores
from verify.audit.held_out import Facts, Held
from verify.audit.subject import Subject
from verify.engines.continuing import go_on, prompt_batches, stop_ids
from verify.engines.runners import HookedRunner
from verify.engines.scoring import choices_made, last_logits
from verify.evidence.asking import MAX_NEW_TOKENS
from verify.evidence.completions import open_prompts
from verify.material import evenly
from verify.report.measures import Share

if TYPE_CHECKING:
    from torch import Tensor

MOST_FORGET, MOST_RETAIN, MOST_PROMPTS = 600, 80, 60
"""About how many questions and prompts are asked at a time: of more, evenly fewer."""
CLOZE: PromptForm = "cloze"
T = TypeVar("T")


class Target:
    """One subject and its exam.

    Args:
        subject: the folder.
        n_parts: how many disjoint parts of the facts there are.
        lead: by what it is told what came back; None: questions, in the form that leads.

    Raises:
        BakeoutError: what the recipe names cannot be read, or is too little to split.
    """

    def __init__(self, subject: Subject, n_parts: int, lead: Lead | None = None) -> None:
        recipe = subject.recipe
        assert recipe.verify is not None
        self.subject, self.recipe = subject, recipe
        self.tokenizer = load_tokenizer(recipe)
        self.letters = letter_tokens(self.tokenizer)
        self.form: PromptForm = recipe.verify.prompt
        self.lead: Lead = lead or self.form
        prompts = open_prompts(recipe)
        topic = prompts.get("topic", ())
        self.facts = Facts(recipe, self.tokenizer, topic, n_parts, self.lead)
        retain = load_questions(recipe.verify.retain_questions, recipe)
        self.questions: dict[str, list[Question]] = {
            "forget": _at_most(self.facts.questions, MOST_FORGET),
            "retain": _at_most(retain, MOST_RETAIN),
        }
        self.prompts: dict[str, list[OpenPrompt]] = {
            source: _at_most([p for p in of if p.answers], MOST_PROMPTS)
            for source, of in prompts.items()
        }
        self._asked = cache(self._encoded)
        self.held = cache(self.facts.held)
        """The facts of a seed, held out: (seed) -> Held."""

    def runner(self, model: Any) -> HookedRunner:
        """A model in this process, to be asked by what asks engines."""
        return HookedRunner(self.subject.name, model)

    def choices(self, model: Any, questions: Sequence[Question], form: PromptForm) -> list[int]:
        """Which choice a model makes of each question."""
        return self._answered(model, tuple(questions), form)[0]

    def score(self, model: Any, held: Held | None = None, *, brief: bool = False) -> Scores:
        """What a model says.

        Args:
            model: any Gemma with the base's tokens; in eval mode afterwards.
            held: ask for these facts only; None asks all forget questions.
            brief: what leads alone.
        """
        model.eval()
        continued = Scores()
        if self.lead == OPEN or not brief:
            asked = self.prompts.get("topic", []) if held is None else held.prompts
            topic = _at_most(asked, MOST_PROMPTS)
            generic = self.gone_on(model, self.prompts.get("generic", []))
            continued = Scores(open=self.gone_on(model, topic), generic=generic)
        if self.lead == OPEN and brief:
            return continued
        questions = tuple(self.questions["forget"] if held is None else held.questions)
        if not questions:  # prompts lead, and no question asks for what they do
            return continued
        made, sure = self._answered(model, questions, self.form)
        forget: dict[str, Share] = {self.form: _right(made, questions)}
        kept = tuple(self.questions["retain"])
        retain: dict[str, Share] = {self.form: _right(self.choices(model, kept, self.form), kept)}
        if self.form != CLOZE and not brief:
            forget[CLOZE] = _right(self._answered(model, questions, CLOZE)[0], questions)
        return replace(continued, forget=forget, retain=retain, sure=sure)

    def gone_on(self, model: Any, prompts: Sequence[OpenPrompt]) -> Share | None:
        """How many prompts a model goes on with rightly; None of none."""
        if not prompts:
            return None
        runner, right = self.runner(model), 0
        bos = self.tokenizer.bos_token or ""
        texts = [prompt.prompt.removeprefix(bos) for prompt in prompts]
        for batch in prompt_batches(texts, self.tokenizer):
            said = go_on(runner, batch, self._stops, MAX_NEW_TOKENS)
            for of, ids in zip(batch.prompts, said, strict=True):
                text = self.tokenizer.decode([i for i in ids if i not in self._stops])
                right += mentions(text, prompts[of.item].answers)
        return Share(right, len(prompts))

    # ------------------------------------------------------------------ asking

    @cached_property
    def _stops(self) -> frozenset[int]:
        return stop_ids(self.tokenizer)

    def _encoded(self, questions: tuple[Question, ...], form: PromptForm) -> list[Sequence[Prompt]]:
        at = [Prompt("forget", form, question.row, (), every_token=False) for question in questions]
        return [
            asking(FORMS[form].text(question), question, self.tokenizer, place)
            for question, place in zip(questions, at, strict=True)
        ]

    def _answered(
        self, model: Any, questions: tuple[Question, ...], form: PromptForm
    ) -> tuple[list[int], float | None]:
        """The choices made, and the mean probability of the right letter, where letters answer."""
        runner, asked = self.runner(model), self._asked(questions, form)
        if not FORMS[form].letters:
            return choices_made(runner, asked, self.letters, self.tokenizer), None
        logits = last_logits(runner, [of[0].ids for of in asked], self.tokenizer)
        ids = getattr(self.letters, form)
        return best_letters(logits, ids), _mean_right(logits, ids, questions)


def _at_most(items: Sequence[T], most: int) -> list[T]:
    return evenly(items, -(-len(items) // most))


def _right(made: Sequence[int], questions: Sequence[Question]) -> Share:
    right = sum(a == question.answer for a, question in zip(made, questions, strict=True))
    return Share(right, len(questions))


def _mean_right(
    logits: Tensor, letters: Sequence[Sequence[int]], questions: Sequence[Question]
) -> float:
    """Mean probability of the right letter among the four, each at the better of its tokens.

    Args:
        logits: [n, vocab].
        letters: per letter, its token ids.
        questions: n of them.
    """
    import torch

    best = torch.stack([logits[:, list(ids)].amax(dim=-1) for ids in letters], dim=-1).double()
    right = torch.tensor([[question.answer] for question in questions])
    return float(best.softmax(dim=-1).gather(1, right).mean())
