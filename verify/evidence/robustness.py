"""What can still be had of what was to be forgotten, by asking otherwise; no weight is changed.

Every attack puts the same prompts to the base and to the unlearned model, in the prompt form that
leads. What an attack brings back shows in the unlearned model's answers beside those to the
questions as they are asked; what it spoils for any model shows in the base's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from bake.questions.answers import LetterTokens
from bake.questions.multiple_choice import Question, load_questions
from bake.recipe import Recipe
from verify.attacks.attacks import ATTACKS, Way
from verify.attacks.exam import Exam
from verify.engines.runners import Runner
from verify.journal import Journal
from verify.report.findings import EngineReport, VerifyReport
from verify.report.measures import Attack, Robustness
from verify.work import Work

if TYPE_CHECKING:
    from verify.reference.oracle import Oracle


def attack(
    recipe: Recipe,
    questions: Sequence[Question],
    base: Runner,
    unlearned: Runner,
    oracle: Oracle,
    tokenizer: Any,
    letters: LetterTokens,
    *,
    journal: Journal,
    budget: int,
    engines: Sequence[EngineReport] = (),
    progress: Callable[[float], None] | None = None,
) -> Robustness:
    """Ask for what was to be forgotten in every way that is known here.

    Args:
        recipe: with a `[verify]` table.
        questions: its forget questions.
        base: the base model.
        unlearned: the engine that is attacked.
        oracle: the hooked reference, for the suffix search; its counts of firings go on, so it is
            one that nobody else reads.
        tokenizer: the base model's.
        letters: of that tokenizer.
        journal: keeps every piece of work.
        budget: steps of the suffix search; 0 leaves it out.
        engines: what was measured of them; those of rounded weights are attacks too.
        progress: called with the share done, 0 to 1.

    Raises:
        DataError: a source of the recipe cannot be used.
    """
    assert recipe.verify is not None
    tried: list[str] = []

    def tell(share: float) -> None:
        if progress is not None:
            progress((len(tried) + share) / len(ATTACKS))

    exam = Exam(
        recipe=recipe,
        questions=questions,
        engines=engines,
        budget=budget,
        progress=tell,
        form=recipe.verify.prompt,
        base=base,
        unlearned=unlearned,
        oracle=oracle,
        tokenizer=tokenizer,
        letters=letters,
        journal=journal,
    )
    if journal.others is not None:
        exam.asked  # noqa: B018  what other attacks ask for
    journal.ahead({f"attack {name}": partial(_tried, way, exam) for name, way in ATTACKS.items()})
    found: list[Attack] = []
    for name, way in ATTACKS.items():
        tell(0)
        found += way.run(exam)
        tried.append(name)
    tell(0)
    return Robustness(unlearned.name, exam.form, tuple(found))


def _tried(way: Way, exam: Exam) -> None:
    """Try an attack, for the journal."""
    for _ in way.run(exam):
        pass


def gather(work: Work, report: VerifyReport) -> VerifyReport:
    """Add forget accuracy under every attack."""
    from verify.reference.oracle import Oracle

    hooked, material = work.hooked, work.hooked.material
    found = attack(
        work.recipe,
        material.questions["forget"],
        hooked.base,
        work.unlearned,
        Oracle(hooked.model, hooked.sites),
        material.tokenizer,
        material.letters,
        journal=work.journal,
        budget=work.options.budget,
        engines=report.engines,
        progress=lambda share: work.progress("robustness", share),
    )
    return replace(report, robustness=found)


def check(recipe: Recipe) -> None:
    """Read the reworded questions: a bad row is known before hours of work."""
    assert recipe.verify is not None
    for questions in recipe.verify.reworded.values():
        load_questions(questions, recipe)
