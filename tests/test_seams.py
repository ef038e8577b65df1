"""Every seam is one table: a dummy that is put into it reaches whatever lists or switches on it."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from bake.base import find_base
from bake.families import FAMILIES
from bake.methods import METHODS, Method, own_gated
from bake.recipe import Recipe
from bake.sae.layouts import LAYOUTS, Layout, SAEFiles, find_sae
from bake.search.grid import parse_grid, points
from bakeout.cli import VERBS, Verb, run
from export.carriers.carriers import CARRIERS
from export.carriers.onnx.precisions import PRECISIONS, Precision
from model_cards.facts import facts_of_folder
from model_cards.render import render
from tests.engines import InProcess
from tests.folders import baked_world, recipe_variant
from tests.reports import error_line, full_evidence
from tests.verify.audit.audited import audited_world
from verify.attacks.attacks import ATTACKS, Way
from verify.attacks.audits import Audit
from verify.attacks.exam import Exam
from verify.audit import run_audit
from verify.audit.attempts import Attempt, Scores
from verify.audit.audit_report import read_audit
from verify.evidence.kinds import KINDS, Kind, lines_of
from verify.page.html import render_html
from verify.page.sections import SECTIONS, Section
from verify.reference.editing import EDITS
from verify.report.findings import VerifyReport
from verify.report.measures import Attack, Share
from verify.report.reading import report_from_dict
from verify.work import Work


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return baked_world(tmp_path_factory.mktemp("seams"), [1, 5, 9])


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("verify.engines.engines.TorchRunner", InProcess)
    monkeypatch.setenv("BAKEOUT_CACHE", str(tmp_path / "cache"))


def verified(world: Path, tmp_path: Path, folder: str, *only: str) -> tuple[dict[str, Any], str]:
    """The report and the page of the command line's `verify`."""
    report, page = tmp_path / "report.json", tmp_path / "report.html"
    asked = [str(world / folder), "--recipe", str(world / "recipe.toml"), "--only", ",".join(only)]
    assert run(["verify", *asked, "--json", str(report), "--html", str(page)]) == 0
    return json.loads(report.read_text()), page.read_text()


def test_a_kind_of_evidence(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def gather(work: Work, report: VerifyReport) -> VerifyReport:
        return replace(report, more={"dummy": {"layers": [s.layer for s in work.hooked.sites]}})

    def lines(report: VerifyReport) -> Iterator[str]:
        if "dummy" in report.more:
            yield f"dummy found layers {report.more['dummy']['layers']}"

    monkeypatch.setitem(KINDS, "dummy", Kind("what it is", gather, lines=lines))
    found, page = verified(world, tmp_path, "checkpoint", "dummy")
    assert (found["scope"], found["dummy"]) == ("dummy", {"layers": [1]})
    assert "dummy found layers [1]" in capsys.readouterr().out
    assert "dummy found layers [1]" in page
    report = report_from_dict(found)
    assert report.more == {"dummy": {"layers": [1]}}
    card = render(facts_of_folder(world / "checkpoint"), report)
    assert "dummy found layers \\[1\\]" in card
    capsys.readouterr()
    assert run(["verify", str(world / "checkpoint"), "--only", "dumy"]) == 2
    assert "did you mean dummy?" in error_line(capsys)


def test_an_attack(monkeypatch: pytest.MonkeyPatch) -> None:
    def dummy(exam: Exam) -> Iterator[Attack]:
        yield Attack("dummy", f"asked in {exam.form} form", Share(9, 10), Share(8, 10))

    monkeypatch.setitem(ATTACKS, "dummy", Way(dummy, "do something", "a dummy"))
    report = full_evidence()
    assert report.robustness is not None
    assert "a dummy" in render_html(report)  # among what was not tried
    exam = Exam(*([None] * 5), *("chat", *[None] * 6))  # type: ignore[arg-type]
    found = tuple(ATTACKS["dummy"].run(exam))
    report = replace(report, robustness=replace(report.robustness, attacks=found))
    assert "attack     dummy: forget 0.900 → 0.800, n = 10" in lines_of(report)
    page = render_html(report)
    assert "asked in chat form" in page
    limits = page[page.index('<section id="limits">') :]
    assert "a dummy" not in limits


def test_an_audited_attack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    audited_world(tmp_path)

    def dummy(work: Any) -> Iterator[Attempt]:
        known = Scores({"plain": Share(9, 9)}, work.before.retain)
        yield Attempt("dummy: all", "asks a dummy", known, needs=("other facts",))

    monkeypatch.setattr(run_audit, "AUDITS", {"dummy": Audit(dummy, "ask a dummy")})
    monkeypatch.setattr(run_audit, "fitting_processes", lambda *_: 1)
    files = (tmp_path / "audit.json", tmp_path / "audit.html")
    asked = ["audit", str(tmp_path / "checkpoint"), "--recipe", str(tmp_path / "recipe.toml")]
    assert run([*asked, "--json", str(files[0]), "--html", str(files[1])]) == 0
    (audit,) = read_audit(files[0]).folders
    assert audit.worst is not None
    assert audit.worst.attack == "dummy: all"
    assert "dummy: all" in capsys.readouterr().out
    assert "dummy: all" in files[1].read_text()


def test_a_section_of_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SECTIONS, "others", Section("A dummy title", "match", lambda page: True))
    page = render_html(full_evidence())
    assert "<h2>A dummy title</h2>" in page and '<a href="#others">A dummy title</a>' in page


def test_a_method(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    halved = Method("half of a", lambda clamp, _: own_gated(clamp.features, value=0.0, scale=0.5))  # type: ignore[arg-type]
    monkeypatch.setitem(METHODS, "dummy", halved)

    def halve(acts: Any, clamp: Any) -> Any:
        edited = acts.clone()
        for f in clamp.features:
            edited[..., f] = acts[..., f] * 0.5
        return edited

    monkeypatch.setitem(EDITS, "dummy", halve)

    def dummy(data: dict[str, Any]) -> None:
        data["clamp"][0]["method"] = "dummy"
        del data["clamp"][0]["value"]

    recipe = recipe_variant(world, "dummy", dummy)
    assert run(["bake", str(world / "dummy.toml"), "--out", str(world / "halved")]) == 0
    report = tmp_path / "report.json"
    asked = ["--recipe", str(world / "dummy.toml"), "--only", "parity", "--json", str(report)]
    assert run(["verify", str(world / "halved"), *asked]) == 0
    grid = parse_grid(["method=dummy,zero", "trigger=0.5"])
    assert [str(point) for point in points(recipe, grid)] == [
        "method dummy, trigger 0.5",
        "method zero, trigger 0.5",
    ]


def test_a_family(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(world / "base", world / "dummy-base")
    config = world / "dummy-base" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "dummy"}))
    recipe = recipe_variant(world, "family", lambda data: data["base"].update(model="dummy-base"))
    dummy = replace(FAMILIES["gemma2"], model_type="clamped_dummy")
    monkeypatch.setitem(FAMILIES, "dummy", dummy)
    assert find_base(recipe).family is dummy


def test_a_carrier(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "Carried by a dummy.\n"
    carrier = replace(CARRIERS["layer"], engine="dummied", card=text, claim="exact to rounding")
    monkeypatch.setitem(CARRIERS, "dummy", carrier)
    shutil.copytree(world / "checkpoint", world / "dummied")
    manifest = world / "dummied" / "manifest.json"
    data = json.loads(manifest.read_text()) | {"carrier": "dummy", "exact": False}
    manifest.write_text(json.dumps(data))
    assert run(["show", str(world / "dummied")]) == 0
    assert "dummy, exact to rounding" in capsys.readouterr().out
    found, page = verified(world, tmp_path, "dummied", "integrity", "parity")
    assert list(found["engines"]) == ["reference", "dummied"]
    assert found["engines"]["dummied"]["parity"]["rounding"]["worst"] < 4
    assert "dummied" in page and "exact to rounding" in page
    assert "rounding   dummied: worst token" in capsys.readouterr().out
    assert text in render(facts_of_folder(world / "dummied"))


def test_a_precision(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    precision = Precision("onnx/model_q2.onnx", "onnx-dummy", "a dummy", bits=8, rounding="int8")
    monkeypatch.setitem(PRECISIONS, "dummy", precision)
    folder = world / "graphs"
    shutil.copytree(world / "checkpoint", folder)
    assert run(["export", "onnx", str(folder), "--precision", "dummy"]) == 0
    assert (folder / "onnx" / "model_q2.onnx").is_file()
    found, _ = verified(world, tmp_path, "graphs", "integrity", "choices")
    assert "onnx-dummy" in found["engines"]
    capsys.readouterr()
    assert run(["export", "onnx", str(folder), "--precision", "none"]) == 2
    assert "expected one of shared, fp32, fp16, int8, int4, dummy" in error_line(capsys)


def test_a_format_of_saes(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(folder: Path, _: object) -> SAEFiles:
        return SAEFiles(folder / "sae.dummy", "standard", False, "blocks.1.hook_resid_post")

    monkeypatch.setitem(LAYOUTS, "dummy", Layout(("sae.dummy",), read))
    (world / "dummy-sae").mkdir()
    np.savez(world / "dummy-sae" / "x.npz")
    (world / "dummy-sae" / "x.npz").rename(world / "dummy-sae" / "sae.dummy")
    source = {"path": "dummy-sae"}
    recipe = recipe_variant(world, "format", lambda data: data["clamp"][0].update(sae=source))
    assert find_sae(recipe.clamp[0].sae, recipe).weights == world / "dummy-sae" / "sae.dummy"


def test_a_verb(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def dummy(name: str) -> None:
        print(f"this is {name}")

    module = ModuleType("bakeout.verbs.dummy")
    module.dummy = dummy  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bakeout.verbs.dummy", module)
    monkeypatch.setitem(VERBS, "dummy", Verb("dummy", "dummy", "Says its argument."))
    assert run(["--help"]) == 0
    assert re.search(r"dummy +Says its argument\.", capsys.readouterr().out)
    assert run(["dummy", "it"]) == 0
    assert capsys.readouterr().out == "this is it\n"


def test_a_tolerance(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("verify.tolerances.BAR", 0.0)
    report, recipe = tmp_path / "report.json", Recipe.load(world / "recipe.toml")
    asked = ["--recipe", str(world / "recipe.toml"), "--only", "parity", "--json", str(report)]
    assert recipe.verify is not None
    assert run(["verify", str(world / "checkpoint"), *asked]) == 1
    failures = json.loads(report.read_text())["failures"]
    assert {failure["what"] for failure in failures} == {"max_abs_logit"}
