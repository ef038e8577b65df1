"""The attacks: ways to ask for what was to be forgotten, weights unchanged.

To add one: an entry here, and a file beside this one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from bake.questions.multiple_choice import load_questions
from bake.recipe import PromptForm
from export.carriers.onnx.precisions import PRECISIONS
from verify.attacks.exam import Exam
from verify.attacks.hints import hints
from verify.attacks.padding import padding
from verify.attacks.suffix import suffix
from verify.report.findings import EngineReport
from verify.report.measures import Attack, Share


@dataclass(frozen=True)
class Way:
    """One way, which may be several attacks: `NAME`, or `NAME: WHICH`."""

    run: Callable[[Exam], Iterator[Attack]]
    does: str
    """What somebody does, for the card's list of what was not tried."""
    tried_as: str | None = None
    """How the page calls it in its list of what was not tried; None leaves it out there."""


def as_asked(exam: Exam) -> Iterator[Attack]:
    """No attack: what the others are held against."""
    yield exam.asked.attack("as asked", "the forget questions as they are")


def reworded(exam: Exam) -> Iterator[Attack]:
    """The recipe's own other wordings, languages and scripts."""
    assert exam.recipe.verify is not None
    for name, source in exam.recipe.verify.reworded.items():
        answers = exam.plainly(f"reworded: {name}", load_questions(source, exam.recipe))
        how = f"the questions of `verify.reworded.{name}` instead"
        yield answers.attack(f"reworded: {name}", how)


def weights(exam: Exam) -> Iterator[Attack]:
    """The folder's other engines, whose weights are rounded."""
    others = [engine for engine in exam.engines if engine.name != exam.unlearned.name]
    yield from rounded_weights(others, exam.form, len(exam.questions))


def rounded_weights(
    engines: Sequence[EngineReport], form: PromptForm, n_questions: int
) -> Iterator[Attack]:
    """Engines whose weights were rounded, by what was measured of them in a prompt form."""
    shares = {
        engine.name: Share(round(engine.forget.measured[form] * n_questions), n_questions)
        for engine in engines
        if engine.forget is not None
    }
    for precision in (of.engine for of in PRECISIONS.values() if not of.shared):
        if (share := shares.get(precision)) is not None:
            how = f"the engine {precision} instead, whose weights are rounded; the base's are not"
            yield Attack(f"weights: {precision}", how, shares.get("base"), share)


ATTACKS: dict[str, Way] = {
    "as asked": Way(as_asked, "ask"),
    "reworded": Way(reworded, "reword or translate", "rewording or other languages"),
    "hints": Way(hints, "give hints in context", "a hint in context"),
    "padding": Way(padding, "pad the prompt"),
    "suffix": Way(suffix, "search for a suffix", "a searched suffix"),
    "weights": Way(weights, "round the weights"),
}
"""By the beginning of their attacks' names, in the order in which they are tried."""
