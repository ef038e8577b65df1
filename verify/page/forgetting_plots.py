"""Plots of the forgetting itself: known questions, subjects, letters, controls, attacks."""

from __future__ import annotations

from dataclasses import dataclass

from bake.questions.forms import FORMS, known_in
from verify.page.plots import CHANCE, SHARE_TICKS, Mark, Plot, Row, Tone, share_row, tone_of
from verify.report.findings import VerifyReport
from verify.report.measures import Share
from verify.report.wording import (
    SOURCES,
    answers_of,
    known_how,
    letters_text,
    measured_attacks,
    measured_engine,
    percent,
    share_of,
    share_text,
    title_of,
)

SHOWN_SUBJECTS = 60
"""Most subjects of a set in the page; report.json has all."""


@dataclass(frozen=True)
class Segment:
    """One letter's part of a bar. Places are shares of its width, 0 to 1."""

    letter: str
    start: float
    width: float


@dataclass(frozen=True)
class LetterRow:
    """How often an engine said each letter."""

    label: str
    value: str
    """The letter that is said most."""
    said: str
    """All of them."""
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class LetterPlot:
    """The letters of one set of questions, engine by engine."""

    title: str
    rows: tuple[LetterRow, ...]


# --------------------------------------------------------------------------- accuracies


def known_plots(report: VerifyReport) -> tuple[Plot, ...]:
    """Accuracy on the questions that the base knows, as asked in the prompt form that leads."""
    form = report.prompt or "chat"
    plots = []
    for source, title in SOURCES.items():
        found = [
            (engine, answers.known)
            for engine in report.engines
            if (answers := answers_of(engine, source, form)) is not None and answers.known
        ]
        rows = tuple(share_row(title_of(e), share, tone_of(e)) for e, share in found if share.n)
        if rows:
            note = (
                f"Of the {found[0][1].n} questions that the base answers right "
                f"{known_how(known_in(form))}, those answered right as they stand, {form} form."
            )
            plots.append(Plot(f"{title.capitalize()}, known", note, rows, SHARE_TICKS, line=CHANCE))
    return tuple(plots)


def subject_plots(report: VerifyReport) -> tuple[Plot, ...]:
    """Every subject's accuracy before and after, the largest fall first."""
    form, base, after = report.prompt or "chat", report.engine("base"), measured_engine(report)
    if base is None or after is None:
        return ()
    plots = []
    for source, title in SOURCES.items():
        pair = answers_of(base, source, form), answers_of(after, source, form)
        if pair[0] is None or pair[1] is None:
            continue
        was = {of.subject: of.share for of in pair[0].subjects}
        rows = [
            (of.subject, was[of.subject], of.share)
            for of in pair[1].subjects
            if of.subject in was and of.share.n and was[of.subject].n
        ]
        if not any(subject for subject, _, _ in rows):
            continue
        rows.sort(key=lambda row: (row[2].accuracy or 0) - (row[1].accuracy or 0))
        more = len(rows) - SHOWN_SUBJECTS
        note = (
            f"Base (hollow) → {title_of(after)} (filled), {form} form, 95 % Wilson intervals, "
            "the largest fall first. The dashed line is chance."
            + (f" … and {more} more subjects, all in report.json." if more > 0 else "")
        )
        drawn = tuple(
            _pair(subject or "no subject named", before, now)
            for subject, before, now in rows[:SHOWN_SUBJECTS]
        )
        plots.append(Plot(title.capitalize(), note, drawn, SHARE_TICKS, line=CHANCE, wide=True))
    return tuple(plots)


def order_plots(report: VerifyReport) -> tuple[Plot, ...]:
    """Known questions under the 24 orders of their choices, or asked once."""
    plots = []
    for known in report.known:
        base = Share(known.known, known.asked)
        engine = title_of(known.engine)
        every: tuple[tuple[str, Share, Tone], ...] = (
            ("base", base, "before"),
            (engine, known.still_known, "after"),
        )
        in_orders = FORMS[known.form].letters
        beside = ", every order" if in_orders else ""
        rows = [
            share_row(f"{name}{beside}", share, tone, f", {share.right:,} of {share.n:,}")
            for name, share, tone in every
            if share.n
        ]
        if in_orders and known.orders.accuracy is not None:
            # Orders of one question are no independent answers: an interval would be too narrow.
            text = f"{known.orders.accuracy:.3f}, {known.orders.right:,} of {known.orders.n:,}"
            rows.append(Row(f"{engine}, single orders", text, known.orders.accuracy, "after"))
        note = (
            f"The base was asked {known.asked} questions and knows {known.known}: those it answers "
            f"right {known_how(known.form)}. {engine} was asked those. Intervals are Wilson's."
        )
        if in_orders:
            note += " Single orders of one question are not independent, so they have none."
        title = SOURCES.get(known.source, known.source).capitalize()
        plots.append(Plot(title, note, tuple(rows), SHARE_TICKS, wide=True))
    return tuple(plots)


def control_plots(report: VerifyReport) -> tuple[Plot, ...]:
    """Accuracies of the controls, between the base's and the unlearned model's."""
    if not report.controls:
        return ()
    form, after = report.prompt or "chat", measured_engine(report)
    plots = []
    for source in ("forget", "retain"):
        found: list[tuple[str, Share | None, Tone]] = [
            ("base", share_of(report, report.engine("base"), source), "before"),
            *((control.name, getattr(control, source), "before") for control in report.controls),
        ]
        if after is not None:
            found.append(
                (f"unlearned: {title_of(after)}", share_of(report, after, source), "after")
            )
        rows = tuple(
            share_row(name, share, tone) for name, share, tone in found if share and share.n
        )
        if rows:
            note = f"{form.capitalize()} form, 95 % Wilson intervals. The dashed line is chance."
            title = SOURCES[source].capitalize()
            plots.append(Plot(title, note, rows, SHARE_TICKS, line=CHANCE))
    return tuple(plots)


def attack_plot(report: VerifyReport) -> Plot | None:
    """Forget accuracy under each attack that was measured, beside the base's."""
    if (robustness := report.robustness) is None:
        return None
    rows = tuple(
        _pair(attack.name, attack.base, share, attack.how)
        for attack, share in measured_attacks(robustness)
    )
    if not rows:
        return None
    note = (
        f"Questions to be forgotten, {robustness.form} form: base (hollow) → "
        f"{title_of(robustness.engine)} (filled), with 95 % Wilson intervals. The dashed line is "
        "chance."
    )
    return Plot("Forget accuracy under attack", note, rows, SHARE_TICKS, line=CHANCE, wide=True)


def _pair(label: str, before: Share | None, now: Share, note: str = "") -> Row:
    low, high = now.interval or (0.0, 1.0)
    n = f"n\u00a0=\u00a0{now.n:,}"  # on a phone it wraps as one
    text = f"{share_text(before)} → {share_text(now)}, {n}"
    at = now.accuracy or 0.0
    return Row(label, text, at, "after", low, high, before=_mark(before), note=note)


def _mark(share: Share | None) -> Mark | None:
    if share is None or share.accuracy is None or share.interval is None:
        return None
    return Mark(share.accuracy, *share.interval)


# --------------------------------------------------------------------------- letters


def letter_plots(report: VerifyReport) -> tuple[LetterPlot, ...]:
    """How often each engine said A, B, C and D, in the prompt form that leads."""
    form = report.prompt or "chat"
    plots = []
    for source, title in SOURCES.items():
        rows = tuple(
            LetterRow(
                title_of(engine),
                _most_said(segments),
                letters_text(answers.letters),
                segments,
            )
            for engine in report.engines
            if (answers := answers_of(engine, source, form)) is not None and any(answers.letters)
            for segments in [_segments(answers.letters)]
        )
        if rows:
            plots.append(LetterPlot(f"Letters said: {title}", rows))
    return tuple(plots)


def _most_said(segments: tuple[Segment, ...]) -> str:
    most = max(segments, key=lambda segment: segment.width)
    return f"{most.letter} {percent(most.width)}"


def _segments(counts: tuple[int, ...]) -> tuple[Segment, ...]:
    n = sum(counts)
    return tuple(
        Segment(letter, sum(counts[:i]) / n, count / n)
        for i, (letter, count) in enumerate(zip("ABCD", counts, strict=True))
    )
