"""Folders side by side: figures of reports that speak of them as they are, and of no other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bake.errors import FolderError, ReportError
from bakeout.cli import run
from export.manifest import Manifest
from tests.folders import make_adapter
from tests.reports import error_line, full_evidence
from verify.audit.attempts import Attempt, Scores
from verify.audit.audit_report import AuditReport
from verify.audit.compared import compare
from verify.audit.outcome import FolderAudit, sweeps_of
from verify.report.findings import VerifyReport
from verify.report.measures import Share


@pytest.fixture
def world(tmp_path: Path) -> Path:
    return make_adapter(tmp_path)


def verified(folder: Path) -> VerifyReport:
    sha256 = Manifest.read(folder).sha256
    return full_evidence(folder=folder.name, manifest_sha256=sha256, card_sha256=None)


def audited(folder: Path) -> AuditReport:
    """An audit in which fine-tuning brings 70 of 120 back, and the base's weights more."""

    def scores(right: int) -> Scores:
        return Scores({"chat": Share(right, 120)}, {"chat": Share(100, 100)})

    attempts = [
        Attempt("relearn: other facts", "fine-tunes", scores(70), needs=("other facts",), steps=10),
        Attempt("strip: delete", "takes out the clamp", scores(118)),
        Attempt("strip: interpolation", "has the base", scores(119), needs=("base",)),
    ]
    of = FolderAudit(
        folder=folder.name,
        carrier="layer",
        exact=True,
        manifest_sha256=Manifest.read(folder).sha256,
        form="chat",
        base=scores(118),
        before=scores(30),
        stripped=scores(117),
        sweeps=sweeps_of(attempts, scores(30), "chat"),
        attempts=tuple(attempts),
    )
    return AuditReport("quick", (0,), (of,))


def write(report: VerifyReport | AuditReport, file: Path) -> Path:
    file.write_text(json.dumps(report.to_dict()))
    return file


def test_what_no_report_says_was_not_measured(world: Path) -> None:
    (world / "other.json").write_text('{"schema": 1}')
    (world / "broken.json").write_text("{")
    found = compare([world / "checkpoint", world / "adapter"])
    layer, adapter = found.folders
    assert (found.base, found.exit_code) == ("base", 0)
    assert [layer.carrier, adapter.carrier] == ["layer", "adapter"]
    assert (adapter.loads, adapter.removed) == ("bakeout and peft imported", "not loading it")
    assert layer.size == sum(f.stat().st_size for f in (world / "checkpoint").iterdir())
    assert adapter.size < layer.size
    for folder in found.folders:
        assert folder.figures.forget is None and folder.verdict is None and folder.worst is None
        assert folder.reports == ()


def test_figures_come_from_the_reports_of_each_folder(world: Path) -> None:
    layer, adapter = world / "checkpoint", world / "adapter"
    write(verified(layer), world / "report.json")
    elsewhere = world / "apart"
    elsewhere.mkdir()
    given = write(audited(layer), elsewhere / "audit.json")
    found = compare([layer, adapter], [given])
    one, two = found.folders
    assert one.figures.forget is not None and one.figures.mean_kl is not None
    assert one.verdict == "pass, full"
    assert one.stripped == Share(117, 120)
    assert one.worst is not None
    assert (one.worst.attack, one.worst.right) == ("relearn: other facts", Share(70, 120))
    assert one.reports == ("audit.json", "report.json")
    assert two.figures.forget is None and two.reports == ()
    assert found.before.forget is not None
    assert found.before.forget.right > one.figures.forget.right


def test_an_audit_alone_says_what_was_answered(world: Path) -> None:
    write(audited(world / "checkpoint"), world / "audit.json")
    (one,) = compare([world / "checkpoint"]).folders
    assert one.figures.forget == Share(30, 120)
    assert one.figures.loss_added is None and one.verdict is None


def test_a_report_of_another_manifest_says_nothing(world: Path) -> None:
    layer = world / "checkpoint"
    stale = write(replace(verified(layer), manifest_sha256="0" * 64), world / "report.json")
    (one,) = compare([layer]).folders
    assert one.figures.forget is None
    with pytest.raises(ReportError, match=r"report\.json: speaks of none of these folders"):
        compare([layer], [stale])
    with pytest.raises(ReportError, match="cannot be read"):
        compare([layer], [world / "nothing.json"])


def test_a_report_within_the_folder_is_the_folders_word(world: Path) -> None:
    layer = world / "checkpoint"
    report = verified(layer)
    write(report, layer / "report.json")
    found = compare([layer])
    assert found.folders[0].figures.forget is None
    assert found.folders[0].broken is not None  # a file that its manifest does not list


def test_a_changed_file_takes_every_figure_away(world: Path) -> None:
    layer = world / "checkpoint"
    write(verified(layer), world / "report.json")
    with (layer / "model-sae-clamp.safetensors").open("r+b") as file:
        file.seek(-3, 2)
        file.write(b"\x7f")
    found = compare([layer, world / "adapter"])
    assert found.exit_code == 1
    assert "model-sae-clamp.safetensors" in (found.folders[0].broken or "")
    assert found.folders[0].figures.forget is None


def test_folders_of_different_bases(world: Path, tmp_path: Path) -> None:
    other = make_adapter(tmp_path / "other")
    manifest = json.loads((other / "adapter" / "manifest.json").read_text())
    manifest["base"]["model"] = "another"
    (other / "adapter" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(FolderError, match=r"was made from another, .* from base; expected folders"):
        compare([world / "checkpoint", other / "adapter"])


def test_the_verb(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layer, adapter = world / "checkpoint", world / "adapter"
    write(verified(layer), world / "report.json")
    out = world / "table" / "compared.json"
    out.parent.mkdir()
    page = world / "table" / "compared.html"
    asked = ["compare", str(layer), str(adapter), "--json", str(out), "--html", str(page)]
    assert run(asked) == 0
    shown = capsys.readouterr().out
    for said in (
        "deleting the layer",
        "not loading it",
        "0.300 chat",
        "not measured",
        "report.json",
    ):
        assert said in shown
        assert said in page.read_text().replace("\n", " ")
    data = json.loads(out.read_text())
    assert [folder["carrier"] for folder in data["folders"]] == ["layer", "adapter"]
    assert run(["compare", str(world)]) == 2
    assert "has no manifest.json; expected a folder that bakeout wrote" in error_line(capsys)
    assert run(["compare", str(layer), "--report", str(out)]) == 2
    assert "compared.json" in error_line(capsys)
