"""The [distill] table: what it takes, and what it says of what it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from bake.distill.distill_table import Distill
from bake.errors import RecipeError
from bake.recipe import Recipe
from tests.worlds import RecipeWriter

CLAMP = {"sae": {"path": "sae"}, "method": "clamp", "features": [1], "value": -6.0}
CORPORA = {"forget": {"path": "a.jsonl"}, "retain": {"path": "b.jsonl"}}


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"layers": [2, 1]}, r"distill.layers: got \[2, 1\], expected \[first, last\]"),
        ({"layers": [1]}, r"expected \[first, last\]"),
        ({"forget": {"path": "a.jsonl"}}, "expected `forget` and `retain`, or neither"),
        ({"noise": 1.0}, "distill.noise: got 1.0, expected less than 1"),
        ({"student": "small"}, "distill.student: got 'small', expected 'full'"),
        ({"learning_rat": 1.0}, "unknown key; did you mean `learning_rate`?"),
    ],
)
def test_bad_tables(write_recipe: RecipeWriter, table: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        Recipe.load(write_recipe(CLAMP, distill=table))


def test_it_is_optional_and_its_files_are_inputs(
    tmp_path: Path, write_recipe: RecipeWriter
) -> None:
    assert Recipe.load(write_recipe(CLAMP)).distill_table == Distill()
    recipe = Recipe.load(write_recipe(CLAMP, distill=CORPORA))
    (tmp_path / "a.jsonl").touch()
    assert tmp_path / "a.jsonl" in recipe.local_sources
    shared = recipe.shareable().to_dict()["distill"]
    assert shared["forget"]["path"] == "a.jsonl"


def test_options_stand_before_the_table_and_are_checked() -> None:
    table = Distill(steps=7, rank=3)
    assert table.with_options(steps=None, rank=5) == Distill(steps=7, rank=5)
    with pytest.raises(ValidationError):
        table.with_options(steps=-1)
