"""What an audit comes to, in a sentence that its figures bear out."""

from __future__ import annotations

from dataclasses import replace

from tests.verify.audit.audited import an_audit
from verify.audit.attempts import Scores
from verify.audit.audit_words import lines_of_audit, relearned, sentences
from verify.audit.outcome import FolderAudit, sweeps_of, told_by
from verify.report.measures import Share


def test_it_says_who_has_the_topic_back() -> None:
    merged, layer = an_audit().folders
    (said,) = sentences(merged)
    assert said == (
        "Whoever fine-tunes all weights for 50 steps on 100 texts about other facts has the topic "
        "back: 108 of 120 answers right (before, 30 of 120; the base, 118 of 120)."
    )
    stripped, kept = sentences(layer)
    assert stripped == (
        "Whoever takes the clamp out has the topic back: 118 of 120 answers right (before, 30 of "
        "120; the base, 118 of 120)."
    )
    assert kept.startswith("Nothing that was tried with the clamp in place brings the topic back: ")
    assert "36 of 120" in kept


def with_worst(audit: FolderAudit, right: int, kept: int = 72) -> FolderAudit:
    attempts = [
        replace(
            attempt,
            scores=Scores({"chat": Share(right, 40)}, {"chat": Share(kept, 72)}),
        )
        for attempt in audit.attempts
        if attempt.attack == "relearn: other facts, all weights"
    ]
    sweeps = sweeps_of(attempts, audit.before, "chat")
    return replace(audit, sweeps=sweeps, attempts=tuple(attempts))


def test_part_is_part_and_nothing_is_nothing() -> None:
    merged, _ = an_audit().folders
    assert "has part of the topic back: 75 of 120" in sentences(with_worst(merged, 25))[0]
    assert sentences(with_worst(merged, 12))[0].startswith("Nothing that was tried brings")
    assert sentences(with_worst(merged, 40, kept=20)) == (
        "Nothing that was tried left a model that is of use.",
    )
    known = replace(merged, before=merged.base)
    assert sentences(known) == (
        "It has the topic as it is: 118 of 120 answers right (the base, 118 of 120).",
    )


def test_few_questions_tell_nothing() -> None:
    merged, _ = an_audit().folders
    few = replace(
        merged,
        before=Scores({"chat": Share(1, 8)}, {"chat": Share(72, 72)}),
        base=Scores({"chat": Share(8, 8)}, {"chat": Share(72, 72)}),
    )
    attempts = [
        replace(few.attempts[0], scores=Scores({"chat": Share(4, 8)}, {"chat": Share(72, 72)}))
    ]
    half = replace(few, sweeps=sweeps_of(attempts, few.before, "chat"), attempts=tuple(attempts))
    (said,) = sentences(half)
    assert said.startswith(
        "Whether anything that was tried brings the topic back cannot be told: 4"
    )
    nearly = replace(few, before=Scores({"chat": Share(4, 8)}, {}))
    assert sentences(nearly) == (
        "Whether it forgot cannot be told: 4 of 8 answers right (the base, 8 of 8).",
    )
    guessed = Scores({"chat": Share(2, 8)}, {})
    assert sentences(replace(few, before=guessed, base=guessed))[0].startswith("Whether it forgot")


def test_open_prompts_tell_what_questions_do_not() -> None:
    _, layer = an_audit().folders
    asked = {"chat": Share(2, 8)}
    before = Scores(asked, {}, Share(9, 50))
    opened = replace(
        layer,
        form="open",
        base=Scores(asked, {}, Share(32, 50)),
        before=before,
        stripped=Scores(asked, {}, Share(32, 50)),
        sweeps=sweeps_of(layer.attempts, before, "open"),
    )
    stripped, kept = sentences(opened)
    assert stripped == (
        "Whoever takes the clamp out has the topic back: 32 of 50 continuations right (before, 9 "
        "of 50; the base, 32 of 50)."
    )
    assert kept == (
        "Whoever fine-tunes all weights for 10 steps on 100 texts about other facts has part of "
        "the topic back: 15 of 30 continuations right."
    )


def opened(right: int, n: int, *points: tuple[int, int]) -> FolderAudit:
    """An audit whose questions tell nothing: of open prompts the folder gets some right, the base
    40 of 200; and of every point how many answers of 8 and continuations of 50 are right.
    """
    _, layer = an_audit().folders
    asked = {"chat": Share(2, 8)}
    before = Scores(asked, {}, Share(right, n), Share(50, 60))
    attempts = [
        replace(
            layer.attempts[0],
            does=f"tries {steps} steps",
            seed=0,
            steps=steps,
            scores=Scores({"chat": Share(answers, 8)}, {}, Share(continuations, 50)),
        )
        for steps, (answers, continuations) in enumerate(points, 1)
    ]
    base = Scores(asked, {}, Share(40, 200))
    lead = told_by(base, before, "chat").lead
    sweeps = sweeps_of(attempts, before, lead)
    return replace(layer, form=lead, base=base, before=before, stripped=None, sweeps=sweeps)


def test_the_worst_by_open_prompts_is_another_than_that_by_questions() -> None:
    (said,) = sentences(opened(0, 200, (3, 2), (2, 44)))
    assert said.startswith("Whoever tries 2 steps has the topic back: 44 of 50 continuations right")


def test_nobody_guesses_a_continuation() -> None:
    (said,) = sentences(opened(0, 200, (2, 9)))
    assert said.startswith("Whoever tries 1 steps has the topic back: 9 of 50 continuations right")
    assert sentences(opened(40, 200, (2, 9))) == (
        "It has the topic as it is: 40 of 200 continuations right (the base, 40 of 200).",
    )


def test_where_nothing_was_tried_no_model_is_called_useless() -> None:
    assert sentences(opened(0, 200)) == (
        "Nothing that was tried tells more (before, 0 of 200; the base, 40 of 200).",
    )


def test_recovery_is_told_from_learning_anew() -> None:
    merged, layer = an_audit().folders
    (faster,) = relearned(merged)
    assert "after 10 steps 90 of 120" in faster
    assert "the true ones come back faster" in faster
    (alike,) = relearned(layer)
    assert "the true ones come no faster" in alike


def test_what_stands_apart_comes_last() -> None:
    merged, _ = an_audit().folders
    needs = [line.needs for line in lines_of_audit(merged)]
    assert needs == ["other facts", "same facts", "control"]
