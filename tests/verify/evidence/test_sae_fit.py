"""The kind `fit`: the figures of bake by the whole SAE in float64, and what fails."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tomli_w

from bake.errors import BakeoutError
from bake.recipe import Recipe
from bake.sae.fit_figures import LEAST_EXPLAINED, UNMEASURED, Fit
from bakeout.cli import run
from bakeout.verbs.demo import MINIATURE
from tests.engines import InProcess
from tests.reports import full_report
from verify.evidence.sae_fit import failures, lines
from verify.report.findings import VerifyReport

FIT = Fit(508, -2.5, -3.25, 65.0, 0.25, 180.0)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The miniature with a few features named."""
    monkeypatch.setattr("verify.engines.engines.TorchRunner", InProcess)
    shutil.copytree(MINIATURE, tmp_path / "miniature")
    folder = tmp_path / "miniature"
    data = Recipe.load(folder / "recipe.toml").to_dict()
    data["clamp"][0] |= {"features": [745, 693, 1475]}
    data["clamp"][0].pop("hook_point")
    for table in ("select", "distill"):
        data.pop(table)
    (folder / "recipe.toml").write_text(tomli_w.dumps(data))
    return folder


def verified(world: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict, str]:
    asked = ["verify", str(world / "out"), "--recipe", str(world / "recipe.toml"), "--only", "fit"]
    capsys.readouterr()
    code = run([*asked, "--json", str(world / "report.json")])
    found = json.loads((world / "report.json").read_text())
    return code, found, " ".join(capsys.readouterr().out.split())


def test_a_sound_one_passes(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bake", str(world / "recipe.toml"), "--out", str(world / "out")]) == 0
    code, found, said = verified(world, capsys)
    assert (code, found["scope"], found["failures"]) == (0, "fit", [])
    (row,) = found["fit"]
    baked = json.loads((world / "out" / "manifest.json").read_text())["clamps"][0]["fit"]
    assert row["layer"] == 0 and not row["chosen"]
    for name in ("variance_explained", "standardised"):  # on more of the same text
        assert row["fit"][name] == pytest.approx(baked[name], abs=0.02)
    assert row["fit"]["agreement"] == pytest.approx(baked["agreement"], rel=1e-3)
    assert "fit layer 0: variance explained 0.98" in said


def test_one_that_does_not_fit_passes_only_where_that_was_chosen(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((world / "sae" / "cfg.json").read_text())
    config["metadata"]["hook_name"] = "blocks.2.hook_resid_post"
    (world / "sae" / "cfg.json").write_text(json.dumps(config))
    asked = ["bake", str(world / "recipe.toml"), "--out", str(world / "out")]
    assert run([*asked, "--unfit"]) == 0
    code, _, said = verified(world, capsys)
    assert code == 0
    assert "it does not fit, and was baked with --unfit all the same" in said
    manifest = world / "out" / "manifest.json"
    data = json.loads(manifest.read_text())
    data["clamps"][0].pop("fit")  # as one was that was baked before this was asked
    manifest.write_text(json.dumps(data))
    code, found, said = verified(world, capsys)
    assert code == 1
    (failure,) = found["failures"]
    assert failure["kind"] == "fit" and failure["measured"] < -10
    assert failure["bar"] == LEAST_EXPLAINED
    assert "variance that the SAE at layer 2 explains" in said


def report_of(**row: object) -> VerifyReport:
    return replace(full_report(), more={"fit": [{"layer": 3, "chosen": False, **row}]})


def test_what_fails() -> None:
    (failure,) = failures(report_of(fit=vars(FIT)))
    assert (failure.kind, failure.measured, failure.bar) == ("fit", -3.25, 0.0)
    assert not list(failures(report_of(fit=vars(FIT), chosen=True)))
    assert not list(failures(report_of(fit=None)))
    assert not list(failures(report_of(fit={**vars(FIT), "agreement": 1.0})))
    (failure,) = failures(report_of(fit={**vars(FIT), "standardised": None}))
    assert failure.measured is None


def test_what_is_said() -> None:
    assert list(lines(report_of(fit=None))) == [f"fit        layer 3: {UNMEASURED}"]
    assert "--unfit" in next(iter(lines(report_of(fit=vars(FIT), chosen=True))))
    assert "--unfit" not in next(iter(lines(report_of(fit=vars(FIT)))))
    with pytest.raises(BakeoutError, match=r"report: fit\.0\.fit"):
        list(lines(report_of(fit={"tokens": 3})))
