"""`bakeout sweep` on tiny files: every point once, controls beside it, a winner that bakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bake.recipe import Recipe
from bake.search import corpus_statistics
from bake.search.grid import Point
from bake.search.study import Finished, Study
from bake.search.sweep import Sweep, _rank
from bakeout.cli import run
from tests.bake.swept import GRID


def test_a_sweep_from_grid_to_a_recipe_that_bakes(
    swept_recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "sweep"
    loads: list[int] = []
    real = corpus_statistics.load_base
    monkeypatch.setattr(corpus_statistics, "load_base", lambda *r: (loads.append(1), real(*r))[1])
    assert run(["sweep", str(swept_recipe), "--out", str(out), *GRID]) == 0
    assert loads == [1]
    shown = capsys.readouterr().out
    assert "8 points on 4 forget and 4 retain questions" in shown and "Pareto front" in shown
    report = json.loads((out / "report.json").read_text())
    points = report["validation"]["points"]
    assert len({json.dumps(point["settings"]) for point in points}) == 8
    assert {len(point["features"][0]) for point in points} == {2, 4}
    for one in (*report["validation"]["front"], report["validation"]["best"]):
        assert set(one["controls"]) == {"random features", "random_decoder"}
    assert set(report["test"]) == {"base", "best", "random features", "random_decoder"}
    assert report["questions"]["test"] == {"forget": 6, "retain": 6}
    winner = Recipe.load(out / "recipe.toml")
    settings = report["validation"]["best"]["settings"]
    assert winner.clamp[0].value == settings["value"]
    assert winner.clamp[0].sae.path == f"../layer_{settings['layer']}"
    assert len(winner.clamp[0].features) == settings["n_features"]
    assert run(["bake", str(out / "recipe.toml"), "--out", str(tmp_path / "baked")]) == 0

    measured: list[int] = []
    real_tell = Study.tell

    def counted(self: Study, trial: Any, *found: Any) -> None:
        measured.append(trial.number)
        real_tell(self, trial, *found)

    monkeypatch.setattr(Study, "tell", counted)
    assert run(["sweep", str(swept_recipe), "--out", str(out), *GRID]) == 0
    assert not measured  # nothing is computed twice
    assert json.loads((out / "report.json").read_text()) == report
    assert (
        run(["sweep", str(swept_recipe), "--out", str(out), *GRID, "--grid", "trigger=0,0.5"]) == 0
    )
    assert len(measured) == 16  # trigger is now part of each point


def test_controls(swept_recipe: Path, tmp_path: Path) -> None:
    sweep = Sweep(Recipe.load(swept_recipe), None, cache=tmp_path / "cache")
    chosen = sweep.at(Point((("value", -3.0),)))
    random, decoder = sweep.controls(chosen).values()
    features = chosen.clamp[0].features
    assert isinstance(features, list) and isinstance(random.clamp[0].features, list)
    assert len(random.clamp[0].features) == len(features)
    assert not set(features) & set(random.clamp[0].features)
    assert decoder.clamp[0].method == "random_decoder"
    assert (decoder.clamp[0].features, decoder.clamp[0].value) == (features, -3.0)


def finished(number: int, forget: float, retain: float) -> Finished:
    about = {"base": [1.0, 0.8], "tokens_fired": 5}
    return Finished(number, Point(()), forget, retain, about)


def test_what_is_best() -> None:
    strong, kept, weak = finished(0, 0.25, 0.6), finished(1, 0.4, 0.8), finished(2, 0.9, 0.8)
    for objective, expected in (("forget", kept), ("alignment", kept)):
        best = max((strong, kept, weak), key=lambda f: _rank(f, objective, 0.99))  # type: ignore[arg-type]
        assert best == expected
    assert max((strong, kept), key=lambda f: _rank(f, "forget", 0.5)) == strong


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ([], "no --grid: expected at least one axis"),
        (["--grid", "value=-1", "--objective", "best"], "expected one of alignment, forget"),
        (["--grid", "value=-1", "--floor", "2"], "expected a share of the base's accuracy"),
        (["--grid", "layer=1,3"], "no SAE there"),
    ],
)
def test_bad_usage(
    swept_recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    match: str,
) -> None:
    assert run(["sweep", str(swept_recipe), "--out", str(tmp_path / "out"), *arguments]) == 2
    assert match in capsys.readouterr().err and not (tmp_path / "out").exists()
