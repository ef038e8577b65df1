"""What engines are shown: a recipe's questions and texts, ready for the tokenizer at hand."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from bake.questions.answers import LetterTokens, letter_tokens
from bake.questions.forms import forms_beside
from bake.questions.multiple_choice import Question, load_questions, load_texts
from bake.questions.prompts import Batch, Prompt, batches, prompts_of, text_prompts
from bake.recipe import PromptForm, Recipe

T = TypeVar("T")
FEWEST = 8
"""Questions, windows or prompts that a budget leaves."""


@dataclass(frozen=True)
class Material:
    """What engines are shown."""

    questions: Mapping[str, Sequence[Question]]
    """Of `forget` and of `retain`."""
    windows: Sequence[Prompt]
    """Of text; those of the recipe's other texts have their name as form."""
    letters: LetterTokens
    tokenizer: Any
    """The base model's."""
    form: PromptForm = "chat"
    """The prompt form that leads."""
    one_in: int = 1
    """Of everything that the recipe names, one in so many is shown."""

    def part(self, one_in: int) -> Material:
        """One in so many of everything, evenly; of what is few, more."""
        return replace(
            self,
            questions={name: evenly(of, one_in) for name, of in self.questions.items()},
            windows=evenly(self.windows, one_in),
            one_in=one_in,
        )

    @property
    def pad_id(self) -> int:
        """What stands in front of shorter prompts."""
        return int(self.tokenizer.pad_token_id or 0)

    def prompts(self, shown: Collection[str], *, compared: bool) -> list[Prompt]:
        """What every engine is shown.

        Args:
            shown: `texts`, `questions` (each in every form that is measured), or both.
            compared: whether logits are needed at every token of some questions.
        """
        prompts = list(self.windows) if "texts" in shown else []
        if "questions" in shown:
            forms = forms_beside(self.form)
            prompts += prompts_of(self.questions, self.tokenizer, forms, compared=compared)
        return prompts

    def batches(self, prompts: Sequence[Prompt]) -> Iterator[Batch]:
        """Prompts in batches of like length."""
        return batches(prompts, pad_id=self.pad_id, vocab_size=len(self.tokenizer))


def evenly(items: Sequence[T], one_in: int) -> list[T]:
    """One in so many, from the first on; at least `FEWEST`, where there are so many."""
    step = max(1, min(one_in, len(items) // FEWEST))
    return list(items[::step])


def load_material(recipe: Recipe, tokenizer: Any) -> Material:
    """Read a recipe's questions and texts.

    Raises:
        DataError: a source cannot be read, or a row of it is wrong.
        ModelError: the tokenizer is none that multiple choice can be asked with.
    """
    assert recipe.verify is not None
    questions = {
        "forget": load_questions(recipe.verify.forget_questions, recipe),
        "retain": load_questions(recipe.verify.retain_questions, recipe),
    }
    windows = text_prompts(load_texts(recipe.verify.text, recipe), tokenizer)
    for name, source in recipe.verify.texts.items():
        more = text_prompts(load_texts(source, recipe), tokenizer)
        windows += [replace(window, form=name) for window in more]
    letters = letter_tokens(tokenizer)
    return Material(questions, windows, letters, tokenizer, recipe.verify.prompt)
