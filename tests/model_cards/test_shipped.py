"""The shipped cards say what the shipped recipes say."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import bake
from bake.recipe import Recipe
from model_cards.shipped import HERE, shipped_cards

RECIPES = sorted((Path(bake.__file__).parent / "recipes").glob("*.toml"))


def test_every_recipe_has_a_card_and_it_is_up_to_date() -> None:
    there = {path.name: path.read_text(encoding="utf-8") for path in HERE.glob("*.md")}
    assert there == shipped_cards(), "run `python -m model_cards.shipped`"
    assert {f"{path.stem}.md" for path in RECIPES} == there.keys()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_names_what_the_recipe_names_and_claims_no_figure(path: Path) -> None:
    recipe, card = Recipe.load(path), (HERE / f"{path.stem}.md").read_text(encoding="utf-8")
    data = ModelCard(card).data.to_dict()
    assert data["base_model"] == recipe.base.model and "model-index" not in data
    for clamp in recipe.clamp:
        selected = clamp.features == "select"
        named = "those that the recipe selects" if selected else ", ".join(map(str, clamp.features))
        assert named in card
    assert card.count("not measured here") >= 10
    evaluation = card[card.index("## Evaluation") : card.index("## How to load")]
    assert not any(digit in evaluation for digit in "0123456789")
