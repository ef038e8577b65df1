"""`AuditReport` → one self-contained HTML page: no script, nothing loaded from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bake.new_folder import write_whole
from verify.audit.audit_report import AuditReport
from verify.audit.audit_words import (
    Line,
    lines_of_audit,
    relearned,
    scores_texts,
    sentences,
    what_is_right,
)
from verify.audit.levels import tried
from verify.audit.outcome import FolderAudit, Sweep
from verify.page.html import environment, shown
from verify.page.plots import SHARE_TICKS, Mark, Plot, Row, Tone
from verify.report.measures import Share

WIDTH, HEIGHT = 640.0, 300.0
LEFT, RIGHT, TOP, BOTTOM = 48.0, 12.0, 10.0, 34.0
TONES = ("one", "two", "three", "four", "five", "six")
"""CSS classes of curves, in their order."""


@dataclass(frozen=True)
class Curve:
    """One sweep: accuracy against steps."""

    attack: str
    tone: str
    points: tuple[tuple[float, float, float, float, str], ...]
    """(x, y, y of the interval's low end, of its high end, words)."""
    line: str
    """`x,y x,y …`."""


@dataclass(frozen=True)
class Curves:
    """Several sweeps on common axes, steps on a log scale."""

    curves: tuple[Curve, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    chance: float
    width: float = WIDTH
    height: float = HEIGHT
    left: float = LEFT
    right: float = WIDTH - RIGHT
    top: float = TOP
    bottom: float = HEIGHT - BOTTOM


@dataclass(frozen=True)
class FolderView:
    """One folder's part of the page."""

    audit: FolderAudit
    sentences: tuple[str, ...]
    relearned: tuple[str, ...]
    plot: Plot
    curves: Curves | None
    lines: list[Line]
    models: tuple[tuple[str, Sequence[str]], ...]
    """(which, figures): base, as it is, its clamp taken out."""


def render_audit(report: AuditReport) -> str:
    """The page."""
    made = environment("verify.page")
    made.filters |= {"shown": shown, "pct": lambda share: f"{100 * share:.2f}%"}
    views = [view_of(audit) for audit in report.folders]
    template = made.get_template("audit.html.j2")
    return template.render(report=report, views=views, tried=tried(report.level))


def write_audit(report: AuditReport, file: Path) -> None:
    """Write the page.

    Raises:
        OutputError: it cannot be written.
    """
    write_whole(file, render_audit(report), option=f"--html {file}")


def view_of(audit: FolderAudit) -> FolderView:
    """What the page shows of a folder."""
    models = [("base", audit.base), ("as it is", audit.before)]
    if audit.stripped is not None:
        models.append(("its clamp taken out", audit.stripped))
    return FolderView(
        audit=audit,
        sentences=sentences(audit),
        relearned=relearned(audit),
        plot=worst_plot(audit),
        curves=effort_curves(audit.sweeps, audit.known.chance),
        lines=lines_of_audit(audit),
        models=tuple((name, scores_texts(scores, audit.form)) for name, scores in models),
    )


def worst_plot(audit: FolderAudit) -> Plot:
    """The worst of every sweep with its interval, the folder as it is above it."""
    before, chance = _mark(audit.known.before), audit.known.chance
    rows = []
    for line in lines_of_audit(audit):
        if (point := line.sweep.worst) is None:
            continue
        tone: Tone = "before" if line.sweep.apart else "after"
        note = f"{line.needs}; {line.effort}"
        rows.append(
            Row(
                line.attack,
                line.right,
                point.right.accuracy or 0.0,
                tone,
                point.interval.low,
                point.interval.high,
                before=before,
                note=note,
            )
        )
    note = (
        f"Share of {what_is_right(audit.form)}, {audit.form} form, at the worst point that keeps "
        "the retained ones; 95 % intervals over answers and seeds. Hollow: as it is. The dashed "
        f"line is chance, {chance:g}. Grey: needs the base or the very facts, or is a control."
    )
    return Plot("What comes back", note, tuple(rows), SHARE_TICKS, line=chance, wide=True)


def _mark(share: Share) -> Mark:
    low, high = share.interval or (0.0, 1.0)
    return Mark(share.accuracy or 0.0, low, high)


def effort_curves(sweeps: Sequence[Sweep], chance: float) -> Curves | None:
    """Accuracy against steps of training; None where nothing was trained."""
    shown_ones = [s for s in sweeps if len([p for p in s.curve if p.steps]) > 1]
    steps = sorted({point.steps for sweep in shown_ones for point in sweep.curve})
    if not steps:
        return None
    first, last = math.log(steps[0]), math.log(steps[-1])

    def x(at: int) -> float:
        return LEFT + 12 + (math.log(at) - first) / (last - first) * (WIDTH - RIGHT - LEFT - 24)

    def y(share: float) -> float:
        return HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)

    curves = []
    for number, sweep in enumerate(shown_ones):
        points = tuple(
            (
                x(point.steps),
                y(point.right.accuracy or 0.0),
                y(point.interval.low),
                y(point.interval.high),
                f"{sweep.attack}, {point.steps} steps: {point.right.right} of {point.right.n}"
                + ("" if point.keeps else "; of no use any more"),
            )
            for point in sweep.curve
        )
        line = " ".join(f"{at:.1f},{high:.1f}" for at, high, *_ in points)
        curves.append(Curve(sweep.attack, TONES[number % len(TONES)], points, line))
    return Curves(
        tuple(curves),
        tuple((x(at), str(at)) for at in steps),
        tuple((y(at), label) for at, label in SHARE_TICKS),
        y(chance),
    )
