"""Grids: what is read, which points come of it, and the recipe of each."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from bake.errors import RecipeError
from bake.recipe import Recipe
from bake.search.grid import GridError, Point, parse_grid, points, variant

SELECT: dict[str, Any] = {"forget": {"path": "f.jsonl"}, "retain": {"path": "r.jsonl"}}


def recipe(**table: Any) -> Recipe:
    clamp = {"sae": {"release": "r", "id": "layer_7/width_16k"}, "method": "clamp", **table}
    clamp = {"features": "select", "value": -1.0} | clamp
    data = {"schema": 1, "base": {"model": "base"}, "clamp": [clamp], "select": SELECT}
    return Recipe.parse(data, name="test", folder=Path())


def test_reading_a_grid() -> None:
    grid = parse_grid(["value=-20, -40,-20", "n_features=10", "layer=3,7"])
    assert grid == {"layer": [3, 7], "n_features": [10], "value": [-20.0, -40.0]}
    assert list(grid) == ["layer", "n_features", "value"]


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        (["valeu=1"], r"no axis 'valeu'; .*did you mean value"),
        (["value=a"], r"'a' is no setting of value; expected numbers"),
        (["n_features=1.5"], "expected whole numbers"),
        (["value="], "'' is no setting of value"),
        (["value=nan"], "'nan' is no setting of value"),
        (["method=clmap"], "no method 'clmap'"),
        (["value=1", "value=2"], "value is given twice"),
    ],
)
def test_grids_that_cannot_be_read(asked: list[str], match: str) -> None:
    with pytest.raises(GridError, match=match):
        parse_grid(asked)


def test_points_leave_out_what_a_method_does_not_use() -> None:
    found = points(recipe(), parse_grid(["method=clamp,zero,scale", "value=-1,-2", "multiplier=5"]))
    assert [dict(point.settings) for point in found] == [
        {"method": "clamp", "value": -1.0},
        {"method": "clamp", "value": -2.0},
        {"method": "zero"},
        {"method": "scale", "multiplier": 5.0},
    ]
    made = [variant(recipe(), point).clamp[0] for point in found]
    assert [(c.method, c.value, c.multiplier) for c in made] == [
        ("clamp", -1.0, None),
        ("clamp", -2.0, None),
        ("zero", None, None),
        ("scale", None, 5.0),
    ]


def test_a_layer_is_another_sae() -> None:
    point = Point((("layer", 9), ("retain_threshold", 0.5)))
    made = variant(recipe(hook_point="blocks.7.hook_resid_post"), point)
    assert made.clamp[0].sae.id == "layer_9/width_16k"
    assert made.clamp[0].hook_point == "blocks.9.hook_resid_post"
    assert made.select is not None and made.select.retain_threshold == 0.5


@pytest.mark.parametrize(
    ("hook_point", "moved"),
    [
        ("blocks.7.hook_resid_post", "blocks.9.hook_resid_post"),
        ("blocks.7.hook_out", "blocks.9.hook_out"),
        ("model.layers.7", "model.layers.9"),
        ("model.language_model.layers.7.output", "model.language_model.layers.9.output"),
    ],
)
def test_a_layer_s_hook_point_goes_along_however_it_is_written(hook_point: str, moved: str) -> None:
    made = variant(recipe(hook_point=hook_point), Point((("layer", 9),)))
    assert made.clamp[0].hook_point == moved


@pytest.mark.parametrize(
    ("table", "asked", "error", "match"),
    [
        ({}, [], GridError, "no --grid"),
        ({"features": [1]}, ["n_features=3"], GridError, "the recipe names its features"),
        ({"sae": {"path": "sae"}}, ["layer=3"], GridError, "named by its layer"),
        ({}, ["method=scale"], RecipeError, 'method "scale" needs `multiplier`'),
        ({}, ["retain_threshold=2"], RecipeError, "retain_threshold: got 2"),
    ],
)
def test_grids_that_do_not_fit(
    table: dict[str, Any], asked: list[str], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        points(recipe(**table), parse_grid(asked))


RECIPES = Path(__file__).parents[3] / "bake" / "recipes"


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.toml")), ids=lambda file: file.stem)
def test_the_grids_that_shipped_recipes_name_are_grids(file: Path) -> None:
    asked = re.findall(r"--grid (\S+)", file.read_text(encoding="utf-8"))
    shipped = Recipe.load(file)
    assert bool(asked) == shipped.selects
    if asked:
        assert len(points(shipped, parse_grid(asked))) >= 12
