"""Cards of the shipped recipes: `python -m model_cards.shipped` writes them anew."""

from __future__ import annotations

from pathlib import Path

import bake
from bake.recipe import Recipe
from model_cards.facts import facts_of_recipe
from model_cards.render import render

HERE = Path(__file__).parent / "cards"


def shipped_cards() -> dict[str, str]:
    """Text of every card by its file name: one for each recipe in `bake/recipes`."""
    recipes = sorted((Path(bake.__file__).parent / "recipes").glob("*.toml"))
    return {f"{path.stem}.md": render(facts_of_recipe(Recipe.load(path))) for path in recipes}


if __name__ == "__main__":
    for name, text in shipped_cards().items():
        (HERE / name).write_text(text, encoding="utf-8")
