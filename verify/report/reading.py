"""A report read back, and whether it still speaks of the folder beside it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

from pydantic import TypeAdapter, ValidationError

from bake.errors import ReportError
from bake.new_folder import MANIFEST
from bake.reading.capped import CAPS, read_json
from export.manifest import CARD, Manifest
from verify.evidence.integrity import check_integrity
from verify.evidence.kinds import KINDS
from verify.report.findings import SCHEMA, VerifyReport

_AGAIN = "run `bakeout verify FOLDER --recipe RECIPE --json FILE` again"


def read_report(file: str | Path) -> VerifyReport:
    """Read what `bakeout verify --json FILE` wrote.

    Raises:
        ReportError: the file is missing, is no report, or is of a newer schema.
    """
    try:
        data = read_json(file, CAPS["report.json"])
    except OSError as error:
        raise ReportError(
            f"report {file}: cannot be read ({error.strerror}); expected what "
            "`bakeout verify FOLDER --json FILE` writes"
        ) from error
    except ValueError as error:
        raise ReportError(f"report {file}: cannot be read ({error}); {_AGAIN}") from error
    return report_from_dict(data, name=str(file))


def report_from_dict(data: Any, *, name: str = "report") -> VerifyReport:
    """The inverse of `VerifyReport.to_dict`. Numbers that JSON does not know come back infinite.

    Raises:
        ReportError: this is no report, is of a newer schema, or contradicts itself.
    """
    if not isinstance(data, dict) or type(data.get("schema")) is not int:
        raise ReportError(f'report {name}: has no "schema"; expected a report of bakeout; {_AGAIN}')
    if data["schema"] > SCHEMA:
        raise ReportError(
            f"report {name}: schema is {data['schema']}, and this bakeout knows up to {SCHEMA}; "
            "update bakeout"
        )
    own = {field.name for field in fields(VerifyReport)}
    try:
        found = data | {
            "engines": [_engine(engine, of) for engine, of in data["engines"].items()],
            "fired_by_layer": list(data.get("tokens_fired_by_layer", {}).items()),
            "more": {key: data[key] for key in KINDS if key in data and key not in own},
        }
        report = TypeAdapter(VerifyReport).validate_python(found)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ReportError(f"report {name}: {key}: {first['msg']}; {_AGAIN}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ReportError(
            f"report {name}: is incomplete ({type(error).__name__}: {error}); {_AGAIN}"
        ) from error
    if data.get("verdict") != report.verdict:
        raise ReportError(
            f'report {name}: "verdict" is {data.get("verdict")!r}, and its failures make it '
            f"{report.verdict!r}; {_AGAIN}"
        )
    return report


def _engine(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """An engine's JSON as the fields of `EngineReport`."""
    engine = {**found, "name": name, "witnessed": found.get("witnesses")}
    if (parity := found.get("parity")) is not None:
        engine["parity"] = _finite(parity, "max_abs_logit", "mean_kl", "largest_logit")
        if parity.get("worst") is not None:
            engine["parity"]["worst"] = _finite(parity["worst"], "abs_logit")
        for part in ("rounding", "float32"):
            if (rounding := parity.get(part)) is not None:
                engine["parity"][part] = _rounding(rounding)
    if engine["witnessed"] is not None:
        engine["witnessed"] = _finite(engine["witnessed"], "max_abs_logit", "effect")
    if (detail := found.get("loss_detail")) is not None:
        parts = {
            when: {k: math.nan if v is None else v for k, v in part.items()}
            for when, part in detail["split"].items()
        }
        engine["loss_detail"] = detail | {"split": parts}
    for loss in ("loss", "loss_added"):
        if loss in found and found[loss] is None:
            engine[loss] = math.inf
    return engine


def _rounding(found: dict[str, Any]) -> dict[str, Any]:
    rounding = _finite(found, "worst", "mean_kl", "edge_max_abs_logit")
    if rounding["at"] is not None:
        rounding["at"] = _finite(rounding["at"], "abs_logit")
    return rounding


def _finite(found: dict[str, Any], *names: str) -> dict[str, Any]:
    return found | {name: math.inf for name in names if found[name] is None}


class OfFolder(Protocol):
    """What was found of a folder, and of which state of it."""

    @property
    def folder(self) -> str:
        """The folder's own name."""
        ...

    @property
    def manifest_sha256(self) -> str | None:
        """Of its manifest.json; None where it had none."""
        ...

    @property
    def card_sha256(self) -> str | None:
        """Of its card, which may be written anew from what was found."""
        ...


def check_fresh(
    report: OfFolder, folder: Path, progress: Callable[[float], None] | None = None
) -> None:
    """Refuse a report of another folder, or of this one before it was changed.

    Every file is hashed. README.md may have been written anew from the report.

    Raises:
        FolderError: the folder's manifest cannot be read.
        ReportError: the report is stale, or a file is not what the manifest says.
    """
    manifest = Manifest.read(folder)
    found = _manifest_hash(report, folder, manifest)
    if found != report.manifest_sha256:
        was = "none" if report.manifest_sha256 is None else f"{report.manifest_sha256[:12]}…"
        raise ReportError(
            f"report of {report.folder}: is stale: it was made of a {MANIFEST} with sha256 {was}, "
            f"{folder}'s is {found[:12]}…: the folder has changed since; {_AGAIN}"
        )
    if broken := check_integrity(folder, manifest, progress):
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise ReportError(
            f"report of {report.folder}: is stale: the folder has changed since: "
            f"{broken[0].what}{more}; {_AGAIN}"
        )


def speaks_of(report: OfFolder, folder: Path, manifest: Manifest) -> bool:
    """Whether a report was made of a folder with this manifest, its card apart; files are not
    looked at.

    Args:
        report: any.
        folder: where the manifest lies.
        manifest: as it was just read.
    """
    return _manifest_hash(report, folder, manifest) == report.manifest_sha256


def _manifest_hash(report: OfFolder, folder: Path, manifest: Manifest) -> str:
    """Of a folder's manifest.json with the card that the report knew."""
    before = (folder / MANIFEST).read_bytes()  # as `Manifest.read` just did
    if report.card_sha256 and CARD in manifest.files:
        now, then = (json.dumps(hash_) for hash_ in (manifest.files[CARD], report.card_sha256))
        entry = f"{json.dumps(CARD)}: "
        before = before.replace(f"{entry}{now}".encode(), f"{entry}{then}".encode())
    return hashlib.sha256(before).hexdigest()
