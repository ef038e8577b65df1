"""Folders of one base side by side: what reports say of each, what loads it, what removes it.

No folder is believed: what was measured comes from reports of `verify` and `audit` alone, and from
those only that were made of a folder's very manifest, whose hashes its files still have. What no
report says was not measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bake.errors import FolderError, ReportError
from bake.new_folder import MANIFEST
from bake.reading.capped import CAPS, read_json
from export.carriers.carriers import CARRIERS, claim_of
from export.manifest import BaseEntry, Manifest
from verify.audit.attempts import Lead, Scores
from verify.audit.audit_report import AuditReport, read_audit
from verify.audit.audit_words import worst_kept
from verify.audit.outcome import Sweep
from verify.evidence.integrity import check_integrity, code_failures
from verify.report.findings import EngineReport, VerifyReport
from verify.report.intervals import Interval
from verify.report.measures import Share
from verify.report.reading import read_report, speaks_of
from verify.report.wording import measured_engine, share_of

SCHEMA = 1
BASE = "base"
UNKNOWN = "not known to this bakeout"


@dataclass(frozen=True)
class Figures:
    """What was measured of one model; None where nothing did."""

    forget: Share | None = None
    """Forget questions answered right, in `form`."""
    retain: Share | None = None
    form: str | None = None
    """The prompt form that leads the report."""
    loss_added: float | None = None
    """Nats per token of text."""
    mean_kl: float | None = None
    """From the hook, in nats per token."""
    tokens_per_second: float | None = None
    """Measured just now, where that was asked for."""


@dataclass(frozen=True)
class WorstAttack:
    """The worst case of an audit among what leaves the clamp in, and model of use."""

    attack: str
    does: str
    right: Share
    interval: Interval
    level: str
    """How much the audit tried."""


@dataclass(frozen=True)
class Compared:
    """One folder."""

    folder: str
    """Its own name."""
    carrier: str
    claim: str
    """What it says of itself: exact, …"""
    loads: str
    """What loading needs."""
    removed: str
    """How the forgetting comes off."""
    size: int
    """Bytes on disk."""
    broken: str | None
    """What is not as its manifest says; then no report speaks of it."""
    verdict: str | None = None
    """Of the verification, and its scope."""
    figures: Figures = Figures()
    told_by: str | None = None
    """By what an audit tells what follows: a prompt form, or open prompts."""
    stripped: Share | None = None
    """What is right with the clamp taken out, in an audit."""
    worst: WorstAttack | None = None
    reports: tuple[str, ...] = ()
    """The files that all this is from."""


@dataclass(frozen=True)
class Comparison:
    """Several folders of one base."""

    base: str
    """What all were made from."""
    before: Figures
    """The base's own."""
    folders: tuple[Compared, ...]

    @property
    def exit_code(self) -> int:
        """1 where a folder is broken."""
        return int(any(folder.broken for folder in self.folders))

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        return {"schema": SCHEMA, **asdict(self)}


@dataclass(frozen=True)
class _Found:
    """A report, and where."""

    file: Path
    report: VerifyReport | AuditReport


def compare(
    folders: Sequence[Path],
    reports: Sequence[Path] = (),
    speed: Callable[[Path], dict[str, float]] | None = None,
) -> Comparison:
    """Put folders side by side.

    Args:
        folders: that bakeout wrote, at least one.
        reports: what `verify --json` and `audit --json` wrote; those that lie beside a folder are
            found by themselves.
        speed: of a folder, the tokens per second of its engines and of `base`, by name; None
            measures none.

    Raises:
        FolderError: a folder is none that bakeout wrote, or they are of different bases.
        ReportError: a report that was named cannot be read, or speaks of none of the folders.
    """
    manifests = [Manifest.read(folder) for folder in folders]
    base = _one_base(folders, manifests)
    given = [_Found(file, _read(file)) for file in reports]
    spoken: set[Path] = set()
    found, before = [], Figures()
    for folder, manifest in zip(folders, manifests, strict=True):
        of = [r for r in (*given, *_beside(folder)) if _is_of(r.report, folder, manifest)]
        spoken |= {one.file for one in of}
        compared, own = _compared(folder, manifest, of)
        if speed is not None and compared.broken is None:
            rates = speed(folder)
            compared = replace(compared, figures=_timed(compared.figures, rates, manifest.carrier))
            own = replace(own, tokens_per_second=rates.get(BASE))
        found.append(compared)
        before = _filled(before, own)
    if strange := [one.file for one in given if one.file not in spoken]:
        raise ReportError(
            f"report {strange[0]}: speaks of none of these folders as they are now; expected one "
            "whose manifest_sha256 is a folder's. Run `bakeout verify` or `bakeout audit` again"
        )
    return Comparison(base.title, before, tuple(found))


def _one_base(folders: Sequence[Path], manifests: Sequence[Manifest]) -> BaseEntry:
    first = manifests[0].base
    for folder, manifest in zip(folders, manifests, strict=True):
        if (manifest.base.model, manifest.base.revision) != (first.model, first.revision):
            raise FolderError(
                f"{folder}: was made from {manifest.base.title}, {folders[0]} from {first.title}; "
                "expected folders of one base, whose figures can stand side by side"
            )
    return first


# --------------------------------------------------------------------------- reports


def _beside(folder: Path) -> list[_Found]:
    """Reports that lie in the folder's own folder, by name."""
    found = []
    for file in sorted(folder.resolve().parent.glob("*.json")):
        try:
            found.append(_Found(file, _read(file)))
        except ReportError:  # other JSON
            continue
    return found


def _read(file: Path) -> VerifyReport | AuditReport:
    """A report of either kind.

    Raises:
        ReportError: it is none.
    """
    try:
        data = read_json(file, CAPS["report.json"])
    except (OSError, ValueError):
        return read_report(file)  # which says what is wrong
    is_audit = isinstance(data, dict) and data.get("audit") is True
    return read_audit(file) if is_audit else read_report(file)


def _is_of(report: VerifyReport | AuditReport, folder: Path, manifest: Manifest) -> bool:
    if isinstance(report, VerifyReport):
        return speaks_of(report, folder, manifest)
    return any(speaks_of(audit, folder, manifest) for audit in report.folders)


# --------------------------------------------------------------------------- one folder


def _compared(
    folder: Path, manifest: Manifest, found: Sequence[_Found]
) -> tuple[Compared, Figures]:
    """A folder, and what its reports say of the base."""
    broken = code_failures(folder, manifest) or check_integrity(folder, manifest)
    carrier = CARRIERS.get(manifest.carrier)
    listed = [folder / name for name in (MANIFEST, *manifest.files)]
    compared = Compared(
        folder=folder.resolve().name,
        carrier=manifest.carrier,
        claim=claim_of(manifest.carrier, exact=manifest.exact),
        loads=UNKNOWN if carrier is None else carrier.needs,
        removed=UNKNOWN if carrier is None else carrier.comes_off,
        size=sum(of.stat().st_size for of in listed if of.is_file()),
        broken=broken[0].what if broken else None,
    )
    before = Figures()
    for one in () if broken else found:
        if isinstance(one.report, VerifyReport) and compared.verdict is None:
            report = one.report
            figures = _filled(_figures(report, measured_engine(report)), compared.figures)
            before = _filled(_figures(report, report.engine(BASE)), before)
            verdict = f"{report.verdict}, {report.scope}"
            compared = replace(compared, figures=figures, verdict=verdict)
        elif isinstance(one.report, AuditReport) and compared.worst is None:
            audit = next(a for a in one.report.folders if speaks_of(a, folder, manifest))
            before = _filled(before, _audited(audit.base, audit.form))
            compared = replace(
                compared,
                figures=_filled(compared.figures, _audited(audit.before, audit.form)),
                told_by=audit.form,
                stripped=None if audit.stripped is None else audit.stripped.right(audit.form),
                worst=_worst(worst_kept(audit), one.report.level),
            )
        else:
            continue
        compared = replace(compared, reports=(*compared.reports, one.file.name))
    return compared, before


def _figures(report: VerifyReport, engine: EngineReport | None) -> Figures:
    """What a verification measured of an engine."""
    if engine is None:
        return Figures()
    return Figures(
        forget=share_of(report, engine, "forget"),
        retain=share_of(report, engine, "retain"),
        form=report.prompt,
        loss_added=engine.loss_added,
        mean_kl=None if engine.parity is None else engine.parity.mean_kl,
    )


def _audited(scores: Scores, lead: Lead) -> Figures:
    return Figures(scores.right(lead), scores.kept(lead), lead)


def _worst(sweep: Sweep | None, level: str) -> WorstAttack | None:
    if sweep is None or sweep.worst is None:
        return None
    point = sweep.worst
    return WorstAttack(sweep.attack, sweep.does, point.right, point.interval, level)


def _filled(figures: Figures, more: Figures) -> Figures:
    """Figures, with others in place of what was not measured."""
    if figures.forget is None and figures.retain is None:
        figures = replace(figures, forget=more.forget, retain=more.retain, form=more.form)
    rest = ("loss_added", "mean_kl", "tokens_per_second")
    absent = {name: getattr(more, name) for name in rest if getattr(figures, name) is None}
    return replace(figures, **absent)


def _timed(figures: Figures, rates: dict[str, float], carrier: str) -> Figures:
    known = CARRIERS.get(carrier)
    rate = None if known is None else rates.get(known.engine)
    return replace(figures, tokens_per_second=rate)
