"""Reports read back, and reports that speak of another state of the folder."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bake.errors import ReportError
from export.manifest import Manifest
from tests.folders import manifest_data
from tests.reports import FAILURE, PARITY, cloze_evidence, full_report, rich_report
from verify.report.findings import VerifyReport
from verify.report.reading import check_fresh, read_report, report_from_dict


@pytest.mark.parametrize(
    "report",
    [
        rich_report(),
        rich_report(failures=(FAILURE,)),
        cloze_evidence(),
        VerifyReport("folder", "layer", True, "integrity", ()),
    ],
)
def test_what_was_written_is_what_is_read(report: VerifyReport, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    file.write_text(json.dumps(report.to_dict(), allow_nan=False))
    assert read_report(file) == report


def test_numbers_that_json_does_not_know_come_back_infinite() -> None:
    report = full_report(parity=replace(PARITY, max_abs_logit=math.inf, mean_kl=math.nan))
    engine = report_from_dict(report.to_dict()).engine("checkpoint")
    assert engine is not None and engine.parity is not None
    assert engine.parity.max_abs_logit == engine.parity.mean_kl == math.inf


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"schema": 2}, "schema is 2, and this bakeout knows up to 1; update bakeout"),
        ({"schema": "1"}, 'has no "schema"'),
        ({"engines": None}, "is incomplete"),
        ({"engines": {"base": {"forget": {"plain": "x", "chat": 1}}}}, r"engines\.0\.forget"),
        ({"engines": {"base": {"forget": {"plain": 1.5, "chat": 1}}}}, "expected 0 to 1"),
        ({"engines": {"base": {"forget": {"plain": -1, "chat": 1}}}}, "expected 0 to 1"),
        ({"items": {"forget_questions": 1}}, r"items\.retain_questions: Field required"),
        ({"verdict": "pass", "failures": [vars(FAILURE)]}, "\"verdict\" is 'pass'"),
        ({"folder": None}, "folder: Input should be a valid string"),
    ],
)
def test_what_is_no_report_is_one_line(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ReportError, match=match) as error:
        report_from_dict(rich_report().to_dict() | change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("text", "match"), [(None, "cannot be read"), ("[", "no JSON")])
def test_a_file_that_is_none(text: str | None, match: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "r.json").write_text(text)
    with pytest.raises(ReportError, match=match):
        read_report(tmp_path / "r.json")
    with pytest.raises(ReportError, match='has no "schema"'):
        report_from_dict([])


# --------------------------------------------------------------------------- staleness


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write(folder: Path, **files: str) -> VerifyReport:
    """A folder of those files, README.md among them, and a report of it."""
    folder.mkdir(exist_ok=True)
    files = {name.replace("_", "."): text for name, text in files.items()}
    for name, text in files.items():
        (folder / name).write_text(text)
    hashes = {name: sha256(text) for name, text in files.items()}
    (folder / "manifest.json").write_text(json.dumps(manifest_data(hashes), indent=2))
    manifest = Manifest.read(folder)
    return replace(
        full_report(), manifest_sha256=manifest.sha256, card_sha256=manifest.files["README.md"]
    )


def test_the_hash_is_that_of_the_file(tmp_path: Path) -> None:
    report = write(tmp_path / "f", README_md="card", config_json="{}")
    data = (tmp_path / "f" / "manifest.json").read_bytes()
    assert report.manifest_sha256 == hashlib.sha256(data).hexdigest()
    check_fresh(report, tmp_path / "f")


def test_another_card_alone_leaves_it_fresh(tmp_path: Path) -> None:
    report = write(tmp_path / "f", README_md="card", config_json="{}")
    write(tmp_path / "f", README_md="a card with figures", config_json="{}")
    check_fresh(report, tmp_path / "f")


def test_another_file_makes_it_stale(tmp_path: Path) -> None:
    report = write(tmp_path / "f", README_md="card", config_json="{}")
    write(tmp_path / "f", README_md="card", config_json='{"a": 1}')
    with pytest.raises(ReportError, match=r"is stale: .* the folder has changed since"):
        check_fresh(report, tmp_path / "f")
    write(tmp_path / "f", README_md="card", config_json="{}", model_onnx="new")
    with pytest.raises(ReportError, match="is stale"):
        check_fresh(report, tmp_path / "f")


def test_a_file_that_changed_behind_the_manifest_makes_it_stale(tmp_path: Path) -> None:
    report = write(tmp_path / "f", README_md="card", config_json="{}")
    (tmp_path / "f" / "config.json").write_text("[]")
    with pytest.raises(ReportError, match=r"stale: .*config\.json: changed"):
        check_fresh(report, tmp_path / "f")


def test_a_report_that_names_no_manifest_is_stale(tmp_path: Path) -> None:
    report = write(tmp_path / "f", README_md="card", config_json="{}")
    with pytest.raises(ReportError, match="sha256 none"):
        check_fresh(replace(report, manifest_sha256=None), tmp_path / "f")
