"""`bakeout select`: find the features of a recipe that leaves them open."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bakeout.pages.selection_view import run_select
from bakeout.verbs.arguments import JsonFile, RecipePath


def select(
    recipe: RecipePath,
    write: Annotated[
        Path | None,
        typer.Option(metavar="OUT.toml", help="Write the recipe with the numbers in it."),
    ] = None,
    json_file: JsonFile = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT.toml.")] = False,
) -> None:
    """Find the features of a recipe that says features = "select", and say why."""
    run_select(recipe, write, json_file, force=force)
