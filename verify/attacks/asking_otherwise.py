"""Attacks: ask the model otherwise, its weights as they are; and what stands in an open book."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from bake.questions.multiple_choice import Question
from bake.questions.open_prompts import mentions
from verify.attacks.attacks import reworded
from verify.attacks.exam import Exam, longest_of, unmeasured
from verify.attacks.hints import hints
from verify.attacks.padding import padded, padding
from verify.attacks.suffix import prefix, suffix
from verify.attacks.to_go_on import to_go_on
from verify.audit.attempts import OPEN, Attempt, Need, Scores, Settings
from verify.audit.target import Target
from verify.audit.work_order import Work
from verify.engines.runners import HookedRunner
from verify.journal import Journal
from verify.report.measures import Attack

BUDGETS = {"suffix": (200, 40), "prefix": (50, 10)}
"""Steps of a search, and where there is little time. Behind a prefix all is read anew."""


@dataclass(frozen=True)
class Way:
    """One way of asking."""

    run: Callable[[Exam], Iterator[Attack]]
    does: str
    needs: tuple[Need, ...] = ()


WAYS: dict[str, Way] = {
    "reworded": Way(reworded, "asks in other words"),
    "hints": Way(hints, "puts solved questions on other facts in front", ("other facts",)),
    "padding": Way(padding, "puts text about nothing in front"),
    "suffix": Way(suffix, "searches for tokens behind the question", ("other facts",)),
    "prefix": Way(prefix, "searches for tokens before the question", ("other facts",)),
}
"""Those of `verify` that are tried on an audited model too."""
OPEN_BOOK = "open book"


def asking(work: Work) -> Iterator[Attempt]:
    """Every way, and an open book; of open prompts, where these lead."""
    if work.lead == OPEN:
        for found in work.each(to_go_on, [{"seeds": list(work.seeds)}]):
            yield from found
        return
    budgets = {way: BUDGETS.get(way, (0, 0))[work.level.quick] for way in WAYS}
    asked: list[Settings] = [{"way": way, "budget": budgets[way]} for way in WAYS]
    asked.append({"way": OPEN_BOOK, "budget": 0, "seeds": list(work.seeds)})
    for found in work.each(asked_otherwise, asked):
        yield from found


def asked_otherwise(target: Target, settings: Settings) -> list[Attempt]:
    """One of them."""
    if settings["way"] == OPEN_BOOK:
        way = Way(
            lambda exam: open_book(exam, _book(target, settings["seeds"])),
            "puts a text that states the fact in front of the question",
            ("same facts",),
        )
    else:
        way = WAYS[settings["way"]]
    return [
        Attempt(
            f"input: {found.name}",
            way.does,
            Scores({} if found.unlearned is None else {target.form: found.unlearned}),
            needs=way.needs,
            note=found.how,
        )
        for found in way.run(exam_of(target, settings["budget"]))
    ]


def exam_of(target: Target, budget: int) -> Exam:
    """An audited model as what attacks of `verify` are aimed at.

    Args:
        target: the folder.
        budget: steps of a search, which begins at what the base knows; without one the model stands
            for the base too, and is asked once.
    """
    subject = target.subject
    model = subject.model()
    unlearned = HookedRunner(subject.name, model)
    return Exam(
        recipe=target.recipe,
        questions=target.questions["forget"],
        engines=(),
        budget=budget,
        progress=lambda _: None,
        form=target.form,
        base=HookedRunner(f"{subject.name}, base", subject.base()) if budget else unlearned,
        unlearned=unlearned,
        oracle=_AsItIs(model),  # type: ignore[arg-type]
        tokenizer=target.tokenizer,
        letters=target.letters,
        journal=Journal(),
    )


class _AsItIs:
    """A model that needs no hook to have forgotten, in the place of an oracle."""

    gated = False
    """What came before a token is its own affair."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @contextmanager
    def applied(self) -> Iterator[Any]:
        yield self.model


# --------------------------------------------------------------------------- open book


def open_book(exam: Exam, book: dict[int, str]) -> Iterator[Attack]:
    """A text that states the fact in front, which says whether the model can still read it there.

    Args:
        exam: whom is asked.
        book: such a text by the question's row.
    """
    asked = [question for question in exam.questions if question.row in book]
    if not asked:
        yield unmeasured(OPEN_BOOK, "no text states a fact that is asked for")
        return
    texts = [padded(question, book[question.row], exam.written) for question in asked]
    prompts = exam.encoded(asked, texts)
    if longest_of(prompts) > exam.longest:
        yield unmeasured(OPEN_BOOK, f"the texts leave no room in {exam.longest} tokens")
        return
    how = f"a text that states the fact stands in front of each of {len(asked)} questions"
    yield exam.answers(OPEN_BOOK, asked, prompts).attack(OPEN_BOOK, how)


def _book(target: Target, seeds: Sequence[int]) -> dict[int, str]:
    """For each question, by its row, a text that states its fact, where there is one."""
    found = {}
    for seed in seeds:
        held = target.held(seed)
        for question in held.questions:
            if (text := stating(question, held.same)) is not None:
                found[question.row] = text
    return found


def stating(question: Question, texts: Sequence[str]) -> str | None:
    """The text that holds the answer and most of the question's words; the shortest of several."""
    answer = (question.choices[question.answer],)
    words = _words(question.question)
    likely = [text for text in texts if mentions(text, answer)]
    return min(likely, key=lambda text: (-len(words & _words(text)), len(text)), default=None)


def _words(text: str) -> set[str]:
    return {word.casefold() for word in re.findall(r"\w+", text)}
