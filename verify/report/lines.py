"""What a report says, as a few lines for the terminal: one function for each kind of evidence."""

from __future__ import annotations

from collections.abc import Iterator

from verify.report.findings import VerifyReport
from verify.report.measures import Share, Tally
from verify.report.wording import (
    accuracy_text,
    answers_of,
    change_text,
    guess_text,
    known_text,
    loss_text,
    measured_engine,
    nats,
    one_letter_lines,
    rounding_lines,
    text_shares_text,
    title_of,
)

SHOWN_ATTACKS = 10
"""Most attacks in the terminal; report.json has all."""
SHOWN_TASKS = 6
"""Most tasks of lm-evaluation-harness."""


def _line(what: str, said: str) -> str:
    return f"{what:<10} {said}"


def rounding_said(report: VerifyReport) -> Iterator[str]:
    """How each engine's distance compares with rounding."""
    for engine, said in rounding_lines(report):
        yield _line("rounding", f"{engine}: {said}")


def known_said(report: VerifyReport) -> Iterator[str]:
    """What became of the questions that the base knows."""
    for known in report.known:
        yield _line("known", f"{known.source}: {known_text(known)}")


def changes_said(report: VerifyReport) -> Iterator[str]:
    """What the folder's engine lost and gained, and what it says whatever it is asked."""
    for guess in report.guessing:
        yield _line("guessing", f"{guess.source}: {guess_text(guess)}")
    if (engine := measured_engine(report)) is None:
        return
    changes = [
        f"{source} {change_text(answers.change)}"
        for source in ("forget", "retain")
        if (answers := answers_of(engine, source, report.prompt or "chat")) is not None
        and answers.change is not None
    ]
    if changes:
        yield _line("changed", f"{title_of(engine)}: {'; '.join(changes)}")
    for of in engine.answers:
        if of.by_text is not None:
            said = f"{of.source} {text_shares_text(of.by_text)}"
            yield _line(of.form, f"{title_of(engine)}: {said}")
    scores = [
        f"{name} {value:.3f}"
        for name, value in (
            ("alignment", engine.alignment),
            ("unlearning score", engine.unlearning_score),
        )
        if value is not None
    ]
    if scores:
        yield _line("score", f"{title_of(engine)}: {', '.join(scores)}")
    yield from (_line("letters", said) for said in one_letter_lines(report))


def loss_said(report: VerifyReport) -> Iterator[str]:
    """Loss added before and from the first firing on."""
    engine = measured_engine(report)
    if engine is not None and engine.loss_detail is not None:
        split = engine.loss_detail.split
        yield _line(
            "loss",
            f"{title_of(engine)}: before any firing {loss_text(split.before)}, from the first "
            f"firing on {loss_text(split.after)}",
        )
        for text in engine.loss_detail.texts:
            yield _line("loss", f"on {text.name}: {nats(text.added)} ({text.tokens:,} tokens)")


def controls_said(report: VerifyReport) -> Iterator[str]:
    """What something else in the clamp's place does."""
    for control in report.controls:
        yield _line(
            "control",
            f"{control.name}: forget {accuracy_text(control.forget)}, "
            f"retained {accuracy_text(control.retain)}, loss added {nats(control.loss_added)}",
        )


def completions_said(report: VerifyReport) -> Iterator[str]:
    """What each variant went on with."""
    if (found := report.completions) is None:
        return
    for source in dict.fromkeys(tally.source for tally in found.tallies):
        said = "; ".join(_tally(tally) for tally in found.tallies if tally.source == source)
        yield _line("said", f"{source}: {said}")
    for own in found.engines:
        shares = {"topic": own.topic, "generic": own.generic}
        right = [f"{name} {_of(of)} right" for name, of in shares.items() if of is not None]
        same = f"{_of(own.as_reference)} as the hook, token for token"
        yield _line("said", f"{own.engine}: {', '.join([*right, same])}")
    if found.trivia:
        said = "; ".join(
            f"{one.variant} {_of(one.share)} (A {one.letters[0]}, B {one.letters[1]})"
            for one in found.trivia
        )
        yield _line("trivia", said)


def _tally(tally: Tally) -> str:
    parts = [] if tally.right is None else [f"{_of(tally.right)} right"]
    parts += [f"{_of(tally.on_topic)} on topic"]
    if tally.variant != "base":
        parts.append(f"{_of(tally.as_base)} as base")
    return f"{tally.variant} {', '.join(parts)}"


def _of(share: Share) -> str:
    return f"{share.right}/{share.n}"


def attacks_said(report: VerifyReport) -> Iterator[str]:
    """What asking otherwise brings back."""
    attacks = () if report.robustness is None else report.robustness.attacks
    for attack in attacks[:SHOWN_ATTACKS]:
        if attack.unlearned is None:
            yield _line("attack", f"{attack.name}: not measured: {attack.how}")
        else:
            base, now = accuracy_text(attack.base), accuracy_text(attack.unlearned)
            yield _line("attack", f"{attack.name}: forget {base} → {now}, n = {attack.unlearned.n}")
    if len(attacks) > SHOWN_ATTACKS:
        yield _line("attack", f"… and {len(attacks) - SHOWN_ATTACKS} more")


def harness_said(report: VerifyReport) -> Iterator[str]:
    """Tasks of lm-evaluation-harness."""
    engine, base = measured_engine(report), report.engine("base")
    if engine is None or not engine.harness:
        return
    before = {} if base is None else {score.task: score.accuracy for score in base.harness}
    for score in engine.harness[:SHOWN_TASKS]:
        was = f"base {before[score.task]:.3f}, " if score.task in before else ""
        scores = f"{was}{title_of(engine)} {score.accuracy:.3f}"
        guess = "" if score.guess is None else f"; guessing {guess_text(score.guess)}"
        yield _line("harness", f"{score.task}: {scores} (its own prompt form){guess}")
    if len(engine.harness) > SHOWN_TASKS:
        yield _line("harness", f"… and {len(engine.harness) - SHOWN_TASKS} more tasks")
