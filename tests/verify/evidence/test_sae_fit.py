"""The kind `fit`: the figures of bake by the whole SAE in float64, and what fails."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from bake.errors import BakeoutError
from bake.questions.multiple_choice import load_texts
from bake.questions.prompts import left_padded, text_prompts
from bake.recipe import Recipe
from bake.sae.fit_figures import LEAST_EXPLAINED, UNMEASURED, Fit
from bake.search.cache import cache_folder
from bake.stock import load_base, load_tokenizer
from bakeout.cli import run
from bakeout.gemma.gemma_files import SHA256
from bakeout.verbs.demo import MINIATURE
from tests.defects import UNFIT, at_layer
from tests.engines import InProcess
from tests.reports import full_report
from verify.evidence.sae_fit import failures, lines, measured_fits
from verify.reference.whole_sae import Site, load_sites
from verify.report.findings import VerifyReport

FIT = Fit(508, -2.5, -3.25, 65.0, 0.25, 180.0)
NEARBY = replace(FIT, variance_explained=0.5, standardised=0.25, elsewhere="layer 2's output")
ALIKE = "the layer before, which is much alike"
GEMMA_SAES = Path(__file__).parents[4] / "shared" / "gemma-3-270m"


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
    files = ["--json", str(world / "report.json"), "--html", str(world / "report.html")]
    code = run([*asked, *files])
    found = json.loads((world / "report.json").read_text())
    return code, found, " ".join(capsys.readouterr().out.split())


def test_a_sound_one_passes(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bake", str(world / "recipe.toml"), "--out", str(world / "out")]) == 0
    code, found, said = verified(world, capsys)
    assert (code, found["scope"], found["failures"]) == (0, "fit", [])
    (row,) = found["fit"]
    baked = json.loads((world / "out" / "manifest.json").read_text())["clamps"][0]["fit"]
    assert row["layer"] == 0 and row["fit"]["elsewhere"] is None
    for name in ("variance_explained", "standardised"):  # on more of the same text
        assert row["fit"][name] == pytest.approx(baked[name], abs=0.02)
    assert row["fit"]["agreement"] == pytest.approx(baked["agreement"], rel=1e-3)
    assert "fit layer 0: variance explained 0.98" in said


def test_one_that_does_not_fit_fails_whatever_the_folder_says(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at_layer(2)(world)
    asked = ["bake", str(world / "recipe.toml"), "--out", str(world / "out"), "--unfit"]
    assert run(asked) == 0
    code, found, said = verified(world, capsys)
    assert code == 1
    (failure,) = found["failures"]
    assert failure["kind"] == "fit" and failure["measured"] < -10
    assert failure["bar"] == LEAST_EXPLAINED
    assert "variance that the SAE at layer 2 explains" in said


def test_one_of_the_layer_before_fails_by_name(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    UNFIT[ALIKE](world)
    asked = ["bake", str(world / "recipe.toml"), "--out", str(world / "out")]
    capsys.readouterr()
    assert run(asked) == 2 and "clearly more of layer 0's output" in capsys.readouterr().err
    assert run([*asked, "--unfit"]) == 0
    code, found, said = verified(world, capsys)
    assert code == 1
    (failure,) = found["failures"]
    assert failure["what"] == "variance that the SAE at layer 1 explains"
    assert failure["measured"] > LEAST_EXPLAINED and "layer 0's output" in failure["bar"]
    assert found["fit"][0]["fit"]["elsewhere"] == "layer 0's output"
    assert "clearly more of layer 0's output: it does not fit" in said
    assert "layer 0&#39;s output" in (world / "report.html").read_text()


@pytest.mark.parametrize("name", UNFIT)
def test_what_bake_refuses_is_unfit_here(world: Path, name: str) -> None:
    UNFIT[name](world)
    recipe = Recipe.load(world / "recipe.toml")
    (fit,) = fits_of(load_base(recipe), load_sites(recipe), recipe, 8).values()
    assert fit is not None and fit.unfit
    near = {"half": "its half", "twice": "its double", ALIKE: "layer 0's output"}
    assert not fit.explains or fit.elsewhere == near[name]
    assert fit.explains == (name in near)


def fits_of(model: Any, sites: list[Site], recipe: Recipe, n_texts: int) -> dict[int, Fit | None]:
    """On the first texts of a recipe's text."""
    assert recipe.verify is not None
    tokenizer = load_tokenizer(recipe)
    windows = text_prompts(load_texts(recipe.verify.text, recipe)[:n_texts], tokenizer)
    batch = left_padded(windows, pad_id=0, last_only=False)
    return measured_fits(model, sites, [batch], tokenizer.all_special_ids)


def test_a_real_gemmas_fit_at_their_layers_and_not_beside(tmp_path: Path) -> None:
    gemma = cache_folder() / f"gemma-3-270m-{SHA256[:8]}"
    if not (gemma.is_dir() and GEMMA_SAES.is_dir()):
        pytest.skip("no Gemma 3 270M in the cache (`bakeout demo --gemma`), or no SAEs of it")
    clamp = {"method": "zero", "features": [1]}
    saes = [{"sae": {"path": str(GEMMA_SAES / f"sae-layer-{layer}")}} for layer in (4, 7)]
    text = {"path": str(GEMMA_SAES / "text.jsonl")}
    verify = {"forget_questions": text, "retain_questions": text, "text": text}
    data = {"schema": 1, "base": {"model": str(gemma), "license": "gemma"}, "verify": verify}
    data["clamp"] = [{**sae, **clamp} for sae in saes]
    recipe = Recipe.parse(data, name="recipe.toml", folder=tmp_path)
    sites = load_sites(recipe)
    beside = [replace(site, layer=site.layer + by) for site in sites for by in (-1, 0, 1)]
    found = fits_of(load_base(recipe), beside, recipe, 1)
    unfit = {layer: fit.unfit for layer, fit in found.items() if fit is not None}
    assert unfit == {3: True, 4: False, 5: True, 6: True, 7: False, 8: True}
    last = found[8]  # explains 0.2, plain and standardised
    assert last is not None and last.explains and last.elsewhere == "layer 7's output"


def report_of(**row: object) -> VerifyReport:
    return replace(full_report(), more={"fit": [{"layer": 3, **row}]})


def test_what_fails() -> None:
    (failure,) = failures(report_of(fit=vars(FIT)))
    assert (failure.kind, failure.measured, failure.bar) == ("fit", -3.25, 0.0)
    (failure,) = failures(report_of(fit=vars(NEARBY)))
    assert str(failure) == (
        "fit: base: variance that the SAE at layer 3 explains is 0.25, "
        "expected that of layer 2's output to be at most 0.05 more"
    )
    assert not list(failures(report_of(fit=None)))
    assert not list(failures(report_of(fit={**vars(FIT), "agreement": 1.0})))
    (failure,) = failures(report_of(fit={**vars(FIT), "standardised": None}))
    assert failure.measured is None


def test_what_is_said() -> None:
    assert list(lines(report_of(fit=None))) == [f"fit        layer 3: {UNMEASURED}"]
    (line,) = lines(report_of(fit=vars(NEARBY)))
    assert line.endswith("clearly more of layer 2's output: it does not fit")
    sound = replace(NEARBY, elsewhere=None)
    assert "does not fit" not in next(iter(lines(report_of(fit=vars(sound)))))
    with pytest.raises(BakeoutError, match=r"report: fit\.0\.fit"):
        list(lines(report_of(fit={"tokens": 3})))
