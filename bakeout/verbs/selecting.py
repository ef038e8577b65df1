"""`bakeout select` and `sweep`: find a recipe's features, and the settings that serve best."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bake.errors import DataError
from bake.recipe import Recipe
from bakeout.pages.selection_view import run_select
from bakeout.pages.sweep_view import sweep_recipe
from bakeout.verbs.arguments import Device, DType, JsonFile, RayAddress, RecipePath


def select(
    recipe: RecipePath,
    write: Annotated[
        Path | None,
        typer.Option(metavar="OUT.toml", help="Write the recipe with the numbers in it."),
    ] = None,
    json_file: JsonFile = None,
    ray: RayAddress = None,
    device: Device = "cpu",
    dtype: DType = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT.toml.")] = False,
) -> None:
    """Find the features of a recipe that says features = "select", and say why."""
    run_select(recipe, write, json_file, ray, device, dtype, force=force)


def sweep(
    recipe: RecipePath,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder of the study; an unfinished one goes on.")
    ],
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
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="PostgreSQL for the study, called as DIR; machines share it."
        ),
    ] = None,
    json_file: JsonFile = None,
    device: Device = "cpu",
    dtype: DType = None,
    ray: RayAddress = None,
) -> None:
    """Measure a grid of settings on validation questions, and the best of them on test."""
    sweep_recipe(recipe, grid or [], out, objective, floor, storage, json_file, device, dtype, ray)


def select_anew(recipe: Recipe, claimed: Recipe, device: str = "cpu") -> Recipe | None:
    """What a folder's features are held against where the recipe leaves them to be selected.

    Args:
        recipe: that leaves them open.
        claimed: the same with the numbers that a folder names.
        device: as torch names it, where the model runs.

    Returns:
        `claimed` where the selection gives the same, but for its order and for what rounding and
        another machine change; else the recipe with the numbers that are selected here. None where
        its texts cannot be had.

    Raises:
        BakeoutError: of any other kind of trouble.
    """
    from bake.search.corpus_statistics import Material, measure
    from bake.search.selection import selected_recipe, still_selected
    from bakeout.terminal import progress

    with progress("select") as advance:
        try:
            measured = measure(recipe, material=Material(recipe, device), progress=advance)
        except DataError:
            return None
        found, selections = selected_recipe(recipe, measured=measured, progress=advance)
    chosen = iter(selections)
    for index, clamp in enumerate(recipe.clamp):
        if clamp.features != "select":
            continue
        named = claimed.clamp[index].features
        assert isinstance(named, list)
        if not still_selected(recipe, measured, index, next(chosen), named):
            return found
    return claimed
