"""What an audit found, in words: for terminal, page and card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from verify.audit.attempts import OPEN, Lead, Scores
from verify.audit.outcome import MOSTLY, FolderAudit, Point, Sweep, comes_back
from verify.report.measures import Share
from verify.report.wording import accuracy_text

STRIP = "strip"
"""What the attacks that take a clamp out are called by."""


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
    differs neither from the folder as it is nor from the base cannot be told.
    """
    known = audit.known
    base, before = known.base, known.before
    assert base.interval is not None

    def of(share: Share) -> str:
        return f"{share.right} of {share.n} {what_is_right(audit.form)}"

    def back(share: Share) -> str:
        gap = _above(before.accuracy, base)
        whole = _above(before.accuracy, share) >= MOSTLY * gap
        return "has the topic back" if whole else "has part of the topic back"

    if not known.tells:
        what = "It has the topic as it is" if known.has else "Whether it forgot cannot be told"
        return (f"{what}: {of(before)} (the base, {base.right} of {base.n}).",)
    beside = f" (before, {before.right} of {before.n}; the base, {base.right} of {base.n})"
    found = []
    stripped = None if audit.stripped is None else audit.stripped.right(audit.form)
    if stripped is not None:
        found.append(f"Whoever takes the clamp out {back(stripped)}: {of(stripped)}{beside}.")
    sweep = worst_kept(audit)
    point = None if sweep is None else sweep.worst
    if sweep is None or point is None:
        if any(sweep.curve for sweep in _clamp_kept(audit)):
            found.append("Nothing that was tried left a model that is of use.")
        else:
            found.append(f"Nothing that was tried tells more{beside}.")
        return tuple(found)
    does, right = point.does or sweep.does, point.right
    said_before = "" if found else beside
    if comes_back(point.interval, before, known.chance):
        found.append(f"Whoever {does} {back(right)}: {of(right)}{said_before}.")
    else:
        kept = " with the clamp in place" if found else ""
        said = f"Nothing that was tried{kept} brings the topic back"
        if point.interval.high >= base.interval.low:
            said = f"Whether anything that was tried{kept} brings the topic back cannot be told"
        found.append(f"{said}: {of(right)} at most, for whoever {does}{said_before}.")
    return tuple(found)


def what_is_right(lead: Lead) -> str:
    """What shares of an audit are of."""
    return "continuations right" if lead == OPEN else "answers right"


def worst_kept(audit: FolderAudit) -> Sweep | None:
    """The worst sweep among those that leave the clamp in."""
    found = [sweep for sweep in _clamp_kept(audit) if sweep.worst is not None]
    return max(found, key=lambda sweep: sweep.accuracy, default=None)


def _clamp_kept(audit: FolderAudit) -> list[Sweep]:
    return [s for s in audit.sweeps if not s.apart and not s.attack.startswith(STRIP)]


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


def scores_texts(scores: Scores, lead: Lead) -> Sequence[str]:
    """(forget, retained, cloze, open) of a model that nobody attacked."""
    shares = (scores.right(lead), scores.kept(lead), scores.forget.get("cloze"))
    return [accuracy_text(share) for share in (*shares, scores.open)]


def _above(accuracy: float | None, share: Share) -> float:
    """By how much more is right."""
    return (share.accuracy or 0.0) - (accuracy or 0.0)


def _of(share: Share) -> str:
    return f"{share.right} of {share.n} answers right"
