"""An audit's report is read back as it was written, and nothing else is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bake.errors import ReportError
from tests.verify.audit.audited import an_audit
from verify.audit.audit_report import read_audit


def test_it_reads_back(tmp_path: Path) -> None:
    report = an_audit()
    file = tmp_path / "audit.json"
    file.write_text(json.dumps(report.to_dict()))
    assert read_audit(file) == report


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read"),
        ("[]", "is no audit's report"),
        ('{"schema": 1, "verdict": "pass"}', "is no audit's report"),
        ('{"schema": 99, "audit": true}', "schema is 99, and this bakeout knows up to 1; update"),
        ('{"schema": 1, "audit": true, "level": 3, "seeds": []}', "level"),
    ],
)
def test_what_is_none_is_said(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "audit.json"
    file.write_text(text)
    with pytest.raises(ReportError, match=said):
        read_audit(file)
    with pytest.raises(ReportError, match="cannot be read"):
        read_audit(tmp_path / "nothing.json")
