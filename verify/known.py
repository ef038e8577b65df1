"""Known questions: those that a model answers right whatever the order of their choices.

Unlearning is measured on what the base knew: a right guess forgets nothing. A question is shown in
chat form under all 24 orders of its choices; the orders are one tree of tokens where the engine
reads trees, so what they share is computed once and logits are formed at their ends only.

Source: Farrell et al., arXiv 2410.19278.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bake.errors import ModelError, OutputError
from verify.choices import LetterTokens
from verify.prompts import chat_text
from verify.questions import LETTERS, Question
from verify.runners import Runner
from verify.scoring import last_logits, letter_log_likelihoods, token_ids

ORDERS = tuple(itertools.permutations(range(len(LETTERS))))
"""Per order, which choice stands at A, at B, at C and at D; the first is as written."""
PROTOCOL = "chat form, 24 orders, better of bare and spaced letter, 1"
"""Part of every cache key: known questions of another protocol are not these."""


def in_order(question: Question, order: Sequence[int]) -> Question:
    """The same question with its choices in another order."""
    a, b, c, d = (question.choices[choice] for choice in order)
    return replace(question, choices=(a, b, c, d), answer=order.index(question.answer))


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


def score_orders(
    runner: Runner, questions: Sequence[Question], tokenizer: Any, letters: LetterTokens
) -> Iterator[OrderScores]:
    """Every question under the 24 orders, one after another.

    Args:
        runner: an engine. Of a hooked reference, `tokens_fired` counts what is shared once.
        questions: any.
        tokenizer: the base model's.
        letters: of that tokenizer.
    """
    for question in questions:
        orders = [in_order(question, order) for order in ORDERS]
        sequences = token_ids([chat_text(order) for order in orders], tokenizer)
        logits = last_logits(runner, sequences, tokenizer)
        yield OrderScores(
            row=question.row,
            log_likelihoods=letter_log_likelihoods(logits, letters),
            answers=tuple(order.answer for order in orders),
        )


# --------------------------------------------------------------------------- kept on disk


def known_questions(
    runner: Runner,
    questions: Sequence[Question],
    tokenizer: Any,
    letters: LetterTokens,
    *,
    model: str,
    cache: Path | None = None,
    progress: Callable[[float], None] | None = None,
) -> tuple[int, ...]:
    """Rows of the questions that an engine knows, from the cache where they are there.

    Args:
        runner: the base.
        questions: any.
        tokenizer: the base model's.
        letters: of that tokenizer.
        model: what tells this model from others: `model_digest` of its folder, and its dtype.
        cache: a folder, which need not exist; None keeps nothing.
        progress: called with the share done, 0 to 1.

    Raises:
        OutputError: the cache cannot be written.
    """
    key = hashlib.sha256(
        json.dumps([PROTOCOL, model, questions_digest(questions)]).encode()
    ).hexdigest()
    path = None if cache is None else cache / f"known-{key}.json"
    if path is not None and (rows := _read(path, key)) is not None:
        return rows
    known = []
    for done, scores in enumerate(score_orders(runner, questions, tokenizer, letters), 1):
        if scores.known:
            known.append(scores.row)
        if progress is not None:
            progress(done / len(questions))
    if path is not None:
        _write(path, key, known)
    return tuple(known)


def questions_digest(questions: Sequence[Question]) -> str:
    """sha256 over everything of the questions that a prompt shows, and their order."""
    return hashlib.sha256(json.dumps([astuple(q) for q in questions]).encode()).hexdigest()


def model_digest(folder: Path) -> str:
    """What tells a model's folder from others without reading its weights.

    Its manifest and the names and sizes of its files; without a manifest, names, sizes and times of
    change.

    Raises:
        ModelError: it is no folder, or an empty one.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    if not files:
        raise ModelError(f"{folder}: is no folder with files; expected a model's")
    manifest = folder / "manifest.json"
    told = manifest.read_text(encoding="utf-8", errors="replace") if manifest.is_file() else None
    listing = [
        (path.name, path.stat().st_size, None if told is not None else path.stat().st_mtime_ns)
        for path in files
    ]
    return hashlib.sha256(json.dumps([told, listing]).encode()).hexdigest()


def _read(path: Path, key: str) -> tuple[int, ...] | None:
    """Rows of an earlier run; None where there was none, or its file is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or found.get("key") != key:
        return None
    rows = found.get("known")
    if not isinstance(rows, list) or not all(type(row) is int for row in rows):
        return None
    return tuple(rows)


def _write(path: Path, key: str, known: Sequence[int]) -> None:
    """All of the file or nothing: a reader never meets half of it."""
    text = json.dumps({"schema": 1, "key": key, "protocol": PROTOCOL, "known": list(known)})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(text + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise OutputError(
            f"{path.parent}: known questions cannot be kept there ({error.strerror}); expected a "
            "folder that can be written"
        ) from error
