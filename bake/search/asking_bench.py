"""Measures settings on a recipe's questions: those that settings are picked on, or the others."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from bake.clamp import ClampWeights, find_site
from bake.questions.forms import forms_beside
from bake.questions.multiple_choice import Question, Text
from bake.questions.prompts import Prompt, prompts_of, text_prompts
from bake.recipe import Clamp, PromptForm, Recipe
from bake.search.bench import Bench, Clamper, Results, bench_of
from bake.search.corpus_statistics import Material, Progress
from bake.search.selection import SplitQuestions

Split = Literal["validation", "test"]
SIDES = ("forget", "retain")


@dataclass(frozen=True)
class Scored:
    """What a setting does on one set of questions."""

    forget: dict[str, float]
    """Accuracy by prompt form."""
    retain: dict[str, float]
    loss: float | None = None
    """Nats per token of text, where text was measured."""
    tokens_fired: int = 0


@dataclass(frozen=True)
class Outcome:
    """What came of a setting, and of no clamp."""

    found: Scored
    base: Scored
    seconds: float


@dataclass(frozen=True)
class Asked:
    """What settings are measured on."""

    split: SplitQuestions
    form: PromptForm
    """Prompt form that settings are compared in."""
    texts: list[Text]
    """Whose loss is taken beside the test questions."""


class AskingBench:
    """A recipe's model, SAEs and questions, ready for any setting.

    What lies below the hook layer is run once per question, as long as layer and split stay.

    Args:
        material: the recipe's.
        asked: on what is measured.
        progress: told what is being read.
    """

    def __init__(
        self,
        material: Material,
        asked: Asked,
        progress: Progress = lambda _what, _share: None,
    ) -> None:
        self.material, self.recipe, self.asked = material, material.recipe, asked
        self._progress = progress
        self._clampers: dict[str, Clamper] = {}
        self._bench: tuple[tuple[int, Split], Bench] | None = None

    def measure(self, recipe: Recipe, which: Split) -> Outcome:
        """What a setting does on the validation questions in the form that settings are compared
        in; or on the test questions in all forms, and on text.

        Args:
            recipe: the bench's own, at a setting, with feature numbers.
            which: of the questions.

        Raises:
            SAEError: a feature is out of range, or an SAE does not fit into memory.
            DataError: the activations of the questions do not.
        """
        started = time.monotonic()
        clamps = self.weights(recipe)
        bench = self._ready(min(clamp.layer for clamp in clamps), which)
        questions, forms = getattr(self.asked.split, which), self._forms(which)
        found, base = (
            scored(results, questions, forms, text=which == "test")
            for results in (bench.measure(clamps), bench.base)
        )
        return Outcome(found, base, time.monotonic() - started)

    def weights(self, recipe: Recipe) -> list[ClampWeights]:
        """The clamps of a recipe with feature numbers."""
        return [self._clamper(clamp).weights(clamp) for clamp in recipe.clamp]

    def bench(self, prompts: Sequence[Prompt], layer: int, what: str) -> Bench:
        """Prompts, cached at a layer."""
        return bench_of(self.material, prompts, layer, what, self._progress)

    def _forms(self, which: Split) -> Sequence[PromptForm]:
        return forms_beside(self.asked.form) if which == "test" else [self.asked.form]

    def _clamper(self, clamp: Clamp) -> Clamper:
        key = f"{clamp.sae} {clamp.hook_point}"
        if key not in self._clampers:
            if len(self._clampers) >= len(self.recipe.clamp):
                self._clampers.clear()  # of another layer
            self._clampers[key] = Clamper(find_site(clamp, self.recipe, self.material.base))
        return self._clampers[key]

    def _ready(self, layer: int, which: Split) -> Bench:
        if self._bench is None or self._bench[0] != (layer, which):
            self._bench = None
            words = self.material.tokenizer
            prompts = prompts_of(getattr(self.asked.split, which), words, self._forms(which))
            if which == "test":
                prompts = [*prompts, *text_prompts(self.asked.texts, words)]
            self._bench = ((layer, which), self.bench(prompts, layer, f"{which} questions"))
        return self._bench[1]


def scored(
    results: Results, asked: dict[str, list[Question]], forms: Sequence[str], *, text: bool = False
) -> Scored:
    """Accuracies, and the loss where text was among the prompts."""
    forget, retain = (
        {form: results.accuracy(side, form, asked[side]) for form in forms} for side in SIDES
    )
    return Scored(forget, retain, results.loss if text else None, results.tokens_fired)
