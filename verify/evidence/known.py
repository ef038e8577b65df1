"""Known questions: those that a model answers right whatever the order of their choices.

Unlearning is measured on what the base knew: a right guess forgets nothing. A question is shown in
chat form under all 24 orders of its choices; the orders are one tree of tokens where the engine
reads trees, so what they share is computed once and logits are formed at their ends only. Where a
form leads that asks for no letter, it is shown in that one, and once: of choices that are not
listed, order means nothing. A guess among four is then right one time in four.

Source: Farrell et al., arXiv 2410.19278.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bake.errors import ModelError, OutputError
from bake.new_folder import whole_file
from bake.questions.answers import letter_log_likelihoods
from bake.questions.forms import FORMS, chat_text, known_in
from bake.questions.multiple_choice import Question
from bake.questions.orders import ORDERS, all_orders
from bake.questions.prompts import Prompt, asking
from bake.reading.capped import read_json
from bake.recipe import PromptForm
from verify.engines.runners import Runner
from verify.engines.scoring import choices_made, last_logits, token_ids
from verify.journal import Journal, Progress, arithmetic, files_below
from verify.material import Material
from verify.report.findings import VerifyReport
from verify.report.measures import KnownSet, Share

if TYPE_CHECKING:
    from verify.work import Work

AHEAD = 4
"""Most questions that the base is ahead of the engine beside it."""
PROTOCOLS: dict[PromptForm, str] = {
    "chat": "chat form, 24 orders, better of bare and spaced letter, 1",
    "cloze": "cloze form, once, log-likelihood of a choice's text per character, 1",
}
"""By the form, how questions are asked in it. Part of every cache key: known questions of another
protocol are not these."""


@dataclass(frozen=True)
class OrderScores:
    """A question under the 24 orders."""

    row: int
    """Of the question."""
    log_likelihoods: np.ndarray
    """[24, 4, 2] float64, nats: per order and letter, bare and after a space."""
    answers: tuple[int, ...]
    """[24] the right letter under each order."""

    @property
    def chosen(self) -> tuple[int, ...]:
        """[24] the letter chosen under each order."""
        return tuple(int(letter) for letter in self.log_likelihoods.max(axis=-1).argmax(axis=-1))

    @property
    def n_right(self) -> int:
        """Under how many orders the right choice is chosen, 0 to 24."""
        return sum(a == b for a, b in zip(self.chosen, self.answers, strict=True))

    @property
    def known(self) -> bool:
        """Whether it is chosen under every order."""
        return self.n_right == len(ORDERS)


def order_ids(question: Question, material: Material) -> list[tuple[int, ...]]:
    """[24] the question's prompt under each order, as tokens."""
    texts = [chat_text(turned) for turned in all_orders(question)]
    return token_ids(texts, material.tokenizer)


def score_orders(
    runner: Runner, question: Question, ids: Sequence[tuple[int, ...]], material: Material
) -> OrderScores:
    """A question under the 24 orders.

    Args:
        runner: an engine. Of a hooked reference, `tokens_fired` counts what is shared once.
        question: any.
        ids: its `order_ids`. Tokenizers do not like threads, and engines run in several.
        material: whose letters are taken.
    """
    logits = last_logits(runner, ids, material.tokenizer)
    return OrderScores(
        row=question.row,
        log_likelihoods=letter_log_likelihoods(logits, material.letters),
        answers=tuple(order.index(question.answer) for order in ORDERS),
    )


def measure_known(
    base: Runner,
    unlearned: Runner,
    material: Material,
    *,
    model: str,
    cache: Path | None,
    journal: Journal,
    progress: Progress,
) -> tuple[dict[str, tuple[int, ...]], tuple[KnownSet, ...]]:
    """Which questions the base knows, and which of those an engine still knows.

    Args:
        base: the base.
        unlearned: the engine, with a model of its own: it computes beside the base.
        material: forget and retain questions.
        model: what tells this base from others: `model_digest` of its folder, its dtype and device.
        cache: folder in which the base's known questions are kept; None keeps nothing.
        journal: of a run that was interrupted, or empty.
        progress: told how far it is.

    Returns:
        By source, the rows of the known questions; and what became of them.

    Raises:
        OutputError: the cache cannot be written.
    """
    rows: dict[str, tuple[int, ...]] = {}
    sets = []
    form = known_in(material.form)
    pool = ThreadPoolExecutor(1)  # the engine computes beside the base
    try:
        for source, questions in material.questions.items():
            path = None
            if cache is not None and journal.others is None:  # who have other caches
                path = cache / f"{_key(model, questions, form)}.json"
            kept = None if path is None else _read(path, questions)
            pair = _Pair(base, unlearned, source, material, form, journal, pool)
            journal.ahead(
                {
                    f"known {source} {of.start} to {of.stop}": partial(
                        pair.done, questions[of.start : of.stop]
                    )
                    for of in journal.parts(len(questions))
                }
            )
            known, after = pair.counts(questions, kept, progress)
            if path is not None and kept is None:
                _write(path, known, form)
            rows[source] = known
            sets.append(
                KnownSet(
                    source=source,
                    asked=len(questions),
                    known=len(known),
                    engine=unlearned.name,
                    still_known=Share(sum(n == pair.n_orders for n in after), len(after)),
                    orders=Share(sum(after), pair.n_orders * len(after)),
                    form=form,
                )
            )
    finally:
        pool.shutdown(cancel_futures=True)
    return rows, tuple(sets)


@dataclass(frozen=True)
class _Pair:
    """The base and an engine, asked the same questions."""

    base: Runner
    unlearned: Runner
    source: str
    material: Material
    form: PromptForm
    journal: Journal
    pool: ThreadPoolExecutor

    @property
    def n_orders(self) -> int:
        """In how many orders a question is shown."""
        return len(ORDERS) if FORMS[self.form].letters else 1

    def counts(
        self, questions: Sequence[Question], kept: Sequence[int] | None, progress: Progress
    ) -> tuple[tuple[int, ...], list[int]]:
        """The rows that the base knows; and of each, under how many orders the engine is right.

        Args:
            questions: of the source.
            kept: the rows that the base knows, where that is known already.
            progress: told how far it is.
        """
        known: list[int] = []
        after: list[int] = []
        waiting: list[tuple[str, Future[int]]] = []

        def collect(most: int) -> None:
            """What is done, in order; waits where more is under way than may be."""
            while waiting and (len(waiting) > most or waiting[0][1].done()):
                name, future = waiting.pop(0)
                after.append(int(self.journal.once(name, future.result)))

        for done, question in enumerate(questions, 1):
            n_right = self._asking(question)
            if kept is None:
                ask = partial(n_right, self.base)
                knows = self.journal.once(self._name(self.base, question), ask) == self.n_orders
            else:
                knows = question.row in kept
            if knows:
                known.append(question.row)
                name, future = self._name(self.unlearned, question), Future[int]()
                if self.journal.has(name):
                    future.set_result(0)  # nobody looks at it
                else:
                    future = self.pool.submit(n_right, self.unlearned)
                waiting.append((name, future))
            collect(AHEAD)
            progress("known", done / len(questions))
        collect(0)
        return tuple(known), after

    def done(self, questions: Sequence[Question]) -> None:
        """Ask some of the questions, for the journal."""
        self.counts(questions, None, lambda _what, _share: None)

    def _name(self, runner: Runner, question: Question) -> str:
        return f"orders {runner.name} {self.source} {question.row}"

    def _asking(self, question: Question) -> Callable[[Runner], int]:
        """Under how many orders an engine is right; the question is tokenised already."""
        material = self.material
        if FORMS[self.form].letters:
            ids = order_ids(question, material)
            return lambda runner: score_orders(runner, question, ids, material).n_right
        at = Prompt(self.source, self.form, question.row, (), every_token=False)
        asked = asking(FORMS[self.form].text(question), question, material.tokenizer, at)

        def once(runner: Runner) -> int:
            (made,) = choices_made(runner, [asked], material.letters, material.tokenizer)
            return int(made == question.answer)

        return once


# --------------------------------------------------------------------------- kept on disk


def _key(model: str, questions: Sequence[Question], form: PromptForm) -> str:
    """sha256 over the protocol, the model, this machine's arithmetic (two choices that are nearly
    as likely may change places on another), and all of the questions that a prompt shows.
    """
    asked = [astuple(question) for question in questions]
    work = [PROTOCOLS[form], model, arithmetic(), asked]
    return hashlib.sha256(json.dumps(work).encode()).hexdigest()


def model_digest(folder: Path) -> str:
    """What tells a model's folder from others without reading its weights: the names, sizes and
    times of change of its files.

    Raises:
        ModelError: it is no folder, or an empty one.
    """
    files = files_below([folder])
    if not files:
        raise ModelError(f"{folder}: is no folder with files; expected a model's")
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def _read(path: Path, questions: Sequence[Question]) -> tuple[int, ...] | None:
    """Rows of an earlier run; None where there was none, or its file is damaged."""
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return None
    rows = found.get("known") if isinstance(found, dict) else None
    there = {question.row for question in questions}
    if not isinstance(rows, list) or not all(type(row) is int and row in there for row in rows):
        return None
    return tuple(rows)


def _write(path: Path, known: Sequence[int], form: PromptForm) -> None:
    text = json.dumps({"schema": 1, "protocol": PROTOCOLS[form], "known": list(known)})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as part:
            part.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"{path.parent}: known questions cannot be kept there ({error.strerror}); set "
            "BAKEOUT_CACHE to a folder that can be written"
        ) from error


def gather(work: Work, report: VerifyReport) -> VerifyReport:
    """Add what became of the questions that the base knows."""
    return replace(report, known=work.known[1])
