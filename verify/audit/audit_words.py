"""What an audit found, in words: for terminal, page and card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from verify.audit.attempts import Scores
from verify.audit.outcome import CHANCE, FolderAudit, Point, Sweep, comes_back
from verify.report.measures import Share
from verify.report.wording import accuracy_text

STRIP = "strip"
"""What the attacks that take a clamp out are called by."""
MOSTLY = 0.8
"""Share of what was forgotten that has to be back for the topic to be back."""


@dataclass(frozen=True)
class Line:
    """One sweep, as text."""

    attack: str
    needs: str
    effort: str
    right: str
    """The worst accuracy with its interval."""
    retained: str
    cloze: str
    open: str
    sweep: Sweep


def sentences(audit: FolderAudit) -> tuple[str, ...]:
    """What came back, in plain words; the first with the clamp taken out, where it can be. What
    neither differs from the folder as it is nor from the base cannot be told on so few questions.
    """
    before, base = audit.before.forget[audit.form], audit.base.forget[audit.form]
    assert before.interval is not None and base.interval is not None
    if before.interval.high >= base.interval.low:
        said = f"{_of(before)} (the base, {base.right} of {base.n})."
        knew = base.interval.low > CHANCE and _above(before.accuracy, base) <= _above(
            CHANCE, base
        ) * (1 - MOSTLY)
        what = "It has the topic as it is" if knew else "Whether it forgot cannot be told"
        return (f"{what}: {said}",)
    found = []
    if audit.stripped is not None:
        right = audit.stripped.forget[audit.form]
        back = _back(right.accuracy or 0.0, audit)
        found.append(f"Whoever takes the clamp out {back}: {_of(right)} ({_beside(audit)}).")
    sweep = worst_kept(audit)
    if sweep is None or sweep.worst is None:
        found.append("Nothing that was tried left a model that is of use.")
        return tuple(found)
    point = sweep.worst
    beside = "" if audit.stripped is not None else f" ({_beside(audit)})"
    if comes_back(point, before):
        back = _back(point.right.accuracy or 0.0, audit)
        found.append(f"Whoever {sweep.does} {back}: {_of(point.right)}{beside}.")
    else:
        kept = " with the clamp in place" if found else ""
        said = f"Nothing that was tried{kept} brings the topic back"
        if point.interval.high >= base.interval.low:
            said = f"Whether anything that was tried{kept} brings the topic back cannot be told"
        found.append(f"{said}: {_of(point.right)} at most, for whoever {sweep.does}{beside}.")
    return tuple(found)


def worst_kept(audit: FolderAudit) -> Sweep | None:
    """The worst sweep among those that leave the clamp in."""
    found = [
        sweep
        for sweep in audit.sweeps
        if sweep.worst is not None and not sweep.apart and not sweep.attack.startswith(STRIP)
    ]
    return max(found, key=lambda sweep: sweep.accuracy, default=None)


def relearned(audit: FolderAudit) -> tuple[str, ...]:
    """Training on the very facts beside training on them with wrong answers."""
    found = []
    for control in audit.sweeps:
        name = control.attack.replace("control, ", "")
        taught = next((s for s in audit.sweeps if s.attack == name), None)
        if not control.control or taught is None:
            continue
        anew = {point.steps: point for point in control.curve}
        both = [(p, anew[p.steps]) for p in taught.curve if p.steps in anew and p.keeps]
        if both:
            point, other = max(both, key=lambda pair: _above(pair[1].right.accuracy, pair[0].right))
            more = point.interval.low > other.interval.high
            found.append(
                f"{name}: after {point.steps} steps {_of(point.right)}; with wrong answers in "
                f"place, which nobody ever knew, {_of(other.right)}: "
                + ("the true ones come back faster" if more else "the true ones come no faster")
                + " than any are learned."
            )
    return tuple(found)


def lines_of_audit(audit: FolderAudit) -> list[Line]:
    """Every sweep: what counts for the worst case, then what stands beside it."""
    ordered = sorted(audit.sweeps, key=lambda sweep: (sweep.apart, sweep.control))
    return [_line(sweep) for sweep in ordered]


def _line(sweep: Sweep) -> Line:
    needs = "control" if sweep.control else ", ".join(sweep.needs) or "the folder"
    point = sweep.worst
    if point is None:
        said = "no model of use" if sweep.curve else "not tried"
        return Line(sweep.attack, needs, "–", said, "–", "–", "–", sweep)
    effort = "none"
    if point.steps:
        effort = f"{point.steps} steps, {point.samples} texts"
    return Line(
        attack=sweep.attack,
        needs=needs,
        effort=effort,
        right=interval_text(point),
        retained=accuracy_text(point.retained),
        cloze=accuracy_text(point.cloze),
        open=accuracy_text(point.open),
        sweep=sweep,
    )


def interval_text(point: Point) -> str:
    """An accuracy and its interval over answers and seeds."""
    low, high = point.interval
    return f"{accuracy_text(point.right)} ({low:.2f} to {high:.2f})"


def scores_texts(scores: Scores, form: str) -> Sequence[str]:
    """(forget, retained, cloze, open) of a model that nobody attacked."""
    shares = (scores.forget.get(form), scores.retain.get(form), scores.forget.get("cloze"))
    return [accuracy_text(share) for share in (*shares, scores.open)]


def _above(accuracy: float | None, share: Share) -> float:
    """By how much more is right."""
    return (share.accuracy or 0.0) - (accuracy or 0.0)


def _back(accuracy: float, audit: FolderAudit) -> str:
    """How much of what was forgotten is back."""
    before = audit.before.forget[audit.form].accuracy or 0.0
    base = audit.base.forget[audit.form].accuracy or 0.0
    if accuracy >= before + MOSTLY * (base - before):
        return "has the topic back"
    return "has part of the topic back"


def _of(share: Share) -> str:
    return f"{share.right} of {share.n} answers right"


def _beside(audit: FolderAudit) -> str:
    before, base = audit.before.forget[audit.form], audit.base.forget[audit.form]
    return f"before, {before.right} of {before.n}; the base, {base.right} of {base.n}"
