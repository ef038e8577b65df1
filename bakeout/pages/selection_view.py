"""What a person, a script and the next run see of a selection: table, JSON, recipe file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from bake.errors import OutputError, RecipeError
from bake.new_folder import write_whole
from bake.recipe import Recipe
from bake.sae.fit_figures import UNMEASURED, Fit
from bake.scale.cluster import cluster
from bake.search.corpus_statistics import Material, measure
from bake.search.fit import checked_fits
from bake.search.select import Chosen
from bake.search.selection import Selection, selected_recipe
from bake.sources import layer_of
from bakeout.terminal import console, progress, table_of, write_json

SCHEMA = 1
SCORES = {"sparsity": "forget share", "ratio": "mean square", "attribution": "loss added"}
"""What a procedure orders its features by."""


def run_select(
    file: Path,
    write: Path | None,
    json_file: Path | None,
    ray: str | None,
    device: str,
    dtype: str | None,
    *,
    force: bool,
) -> None:
    """`bakeout select`: select, print or write, and say where the numbers went.

    Args:
        file: the recipe.
        write: where the recipe with numbers goes.
        json_file: where the report goes.
        ray: of the cluster that counts, as `cluster` takes it.
        device: as torch names it, where the model runs.
        dtype: in which it runs; what the recipe says by default.
        force: replace `write`.

    Raises:
        RecipeError: the recipe leaves no feature to be selected.
    """
    recipe = Recipe.load(file)
    if not recipe.selects:
        raise RecipeError(
            f'recipe {file}: names its features; expected features = "select" in a [[clamp]] table'
        )
    if write is not None:
        check_new_file(recipe, write, force=force)
    with progress("select") as advance:
        fits = checked_fits(recipe, unfit=True)
        with cluster(ray) as crew:
            material = Material(recipe, device, dtype)
            measured = measure(recipe, material=material, crew=crew, progress=advance)
        selected, selections = selected_recipe(recipe, measured=measured, progress=advance)
    if json_file is None or str(json_file) != "-":
        show_selections(selections, fits)
    if write is not None:
        write_recipe(selected, write, force=force)
    if json_file is not None:
        write_json(selections_dict(selections, fits), json_file)


def show_selections(selections: Sequence[Selection], fits: Mapping[int, Fit]) -> None:
    """Print one table for each selection, and how its SAE fits, by layer."""
    out = console()
    for selection in selections:
        out.print(selection_table(selection))
        out.print(
            f"{len(selection.chosen)} of {selection.d_sae:,} features of {selection.sae} at "
            f"{selection.hook_point}, by {selection.by}; shares of {selection.forget_tokens:,} "
            f"forget and {selection.retain_tokens:,} retain tokens",
            markup=False,
        )
        out.print(f"fit: {fit_text(fits.get(layer_of(selection.hook_point)))}\n", markup=False)


def fit_text(fit: Fit | None) -> str:
    """How an SAE fits, and whether a bake of it is refused."""
    if fit is None:
        return UNMEASURED
    return f"{fit.said}; it does not fit, and bake refuses it" if fit.unfit else fit.said


def selection_table(selection: Selection) -> Table:
    """One row for each selected feature."""
    names = ("rank", "feature", "forget share", "retain share", *_extra(selection.by))
    table = table_of(*names, left=0)
    for chosen in selection.chosen:
        table.add_row(
            str(chosen.rank),
            str(chosen.feature),
            f"{chosen.forget_share:.5f}",
            f"{chosen.retain_share:.5f}",
            *_extra_cells(selection.by, chosen),
        )
    return table


def _extra(by: str) -> tuple[str, ...]:
    return {
        "sparsity": (),
        "ratio": ("mean square", "ratio"),
        "attribution": ("attribution", "loss added"),
    }[by]


def _extra_cells(by: str, chosen: Chosen) -> tuple[str, ...]:
    if by == "ratio":
        return (f"{chosen.score:.4g}", f"{chosen.ratio:.3g}")
    if by == "attribution":
        return (f"{chosen.attribution:+.4f}", f"{chosen.score:+.5f}")
    return ()


def selections_dict(selections: Sequence[Selection], fits: Mapping[int, Fit]) -> dict[str, Any]:
    """The JSON of `bakeout select --json`."""

    def fit_dict(hook_point: str) -> dict[str, Any] | None:
        fit = fits.get(layer_of(hook_point))
        return None if fit is None else {**vars(fit), "unfit": fit.unfit}

    return {
        "schema": SCHEMA,
        "selections": [
            {
                "sae": selection.sae,
                "hook_point": selection.hook_point,
                "by": selection.by,
                "ordered_by": SCORES[selection.by],
                "d_sae": selection.d_sae,
                "forget_tokens": selection.forget_tokens,
                "retain_tokens": selection.retain_tokens,
                "fit": fit_dict(selection.hook_point),
                "features": [
                    {key: value for key, value in vars(chosen).items() if value is not None}
                    for chosen in selection.chosen
                ],
            }
            for selection in selections
        ],
    }


def check_new_file(recipe: Recipe, file: Path, *, force: bool, option: str = "--write") -> None:
    """Refuse a file before anything is computed; `option` named it.

    Raises:
        OutputError: it is one of the recipe's inputs, or exists and `force` is not given.
    """
    if any(file.resolve() == source.resolve() for source in recipe.local_sources):
        raise OutputError(f"{option} {file}: is an input; choose another name")
    if file.exists() and not (force and file.is_file()):
        raise OutputError(f"{option} {file}: exists; choose another name, or pass --force")
    if not file.resolve().parent.is_dir():
        raise OutputError(f"{option} {file}: its folder does not exist; make it first")


def write_recipe(recipe: Recipe, file: Path, *, force: bool) -> None:
    """Write a recipe file, its local paths starting from where the file lies.

    Raises:
        OutputError: as `check_new_file`, or it cannot be written.
    """
    check_new_file(recipe, file, force=force)
    there = file.resolve()
    text = recipe.at(there.parent).to_toml()
    write_whole(there, text, option=f"--write {file}")
