"""What an audit found, as types and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from bake.errors import ReportError
from bake.reading.capped import CAPS, read_json
from export.manifest import Manifest
from verify.audit.audit_words import relearned, sentences
from verify.audit.outcome import FolderAudit
from verify.report.reading import speaks_of

SCHEMA = 1
AGAIN = "run `bakeout audit FOLDER --recipe RECIPE --json FILE` again"


@dataclass(frozen=True)
class AuditReport:
    """Several folders under the same attacks."""

    level: str
    """How much was tried: full, short or quick."""
    seeds: tuple[int, ...]
    folders: tuple[FolderAudit, ...] = ()
    failures: tuple[tuple[str, str], ...] = ()
    """(folder, what is broken): nothing was tried then."""

    @property
    def exit_code(self) -> int:
        """0: the audit ran; it judges nothing. 1: a folder is not what its manifest says."""
        return 1 if self.failures else 0

    def to_dict(self) -> dict[str, Any]:
        """As JSON data: what `read_audit` reads, and of each folder what it comes to."""
        folders = [
            {
                **asdict(audit),
                "worst": None if audit.worst is None else audit.worst.attack,
                "sentences": [*relearned(audit), *sentences(audit)],
            }
            for audit in self.folders
        ]
        return {"schema": SCHEMA, "audit": True, **asdict(self), "folders": folders}


def read_audit(file: str | Path) -> AuditReport:
    """Read what `bakeout audit --json FILE` wrote.

    Raises:
        ReportError: the file is missing, is no such report, or is of a newer schema.
    """
    try:
        data = read_json(file, CAPS["report.json"])
    except (OSError, ValueError) as error:
        raise ReportError(
            f"audit {file}: cannot be read ({error}); expected what "
            "`bakeout audit FOLDER --recipe RECIPE --json FILE` writes"
        ) from error
    schema = data.get("schema") if isinstance(data, dict) and data.get("audit") is True else None
    if type(schema) is not int:
        raise ReportError(f"audit {file}: is no audit's report; {AGAIN}")
    if schema > SCHEMA:
        raise ReportError(
            f"audit {file}: schema is {schema}, and this bakeout knows up to {SCHEMA}; update "
            "bakeout"
        )
    try:
        return TypeAdapter(AuditReport).validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ReportError(f"audit {file}: {key}: {first['msg']}; {AGAIN}") from error


def audit_of(file: str | Path, folder: Path) -> tuple[FolderAudit, str]:
    """What an audit's report says of a folder, and how much was tried.

    Raises:
        FolderError: the folder's manifest cannot be read.
        ReportError: the file is no such report, or says nothing of the folder as it is now.
    """
    report, manifest = read_audit(file), Manifest.read(folder)
    for audit in report.folders:
        if speaks_of(audit, folder, manifest):
            return audit, report.level
    named = ", ".join(audit.folder for audit in report.folders) or "none"
    raise ReportError(
        f"audit {file}: is of {named}, and of none with the manifest of {folder}: the folder has "
        f"changed since, or is another; {AGAIN}"
    )
