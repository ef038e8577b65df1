"""`bakeout sweep`: measure a grid of settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bakeout.pages.sweep_view import sweep_recipe
from bakeout.verbs.arguments import JsonFile, RecipePath


def sweep(
    recipe: RecipePath,
    out: Annotated[Path, typer.Option(help="Folder of the study; an unfinished one goes on.")],
    grid: Annotated[
        list[str] | None,
        typer.Option(metavar="AXIS=A,B", help="Axis and its settings; repeat for more axes."),
    ] = None,
    objective: Annotated[
        str, typer.Option(help="alignment, or forget: its accuracy under a floor on the retained.")
    ] = "alignment",
    floor: Annotated[
        float, typer.Option(help="forget: least retained accuracy, as a share of the base's.")
    ] = 0.99,
    json_file: JsonFile = None,
) -> None:
    """Measure a grid of settings on validation questions, and the best of them on test."""
    sweep_recipe(recipe, grid or [], out, objective, floor, json_file)
