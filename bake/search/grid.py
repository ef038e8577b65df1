"""A sweep's grid: which settings there are, and the recipe that each of them makes."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from bake.errors import BakeoutError
from bake.methods import METHODS, own_fields
from bake.recipe import Clamp, Recipe

Setting = float | int | str

AXES: dict[str, Callable[[str], Setting]] = {
    "layer": int,
    "method": str,
    "retain_threshold": float,
    "n_features": int,
    "value": float,
    "multiplier": float,
    "trigger": float,
    "tau": float,
}
"""What can be swept, and how a setting is read. Layers vary slowest: each has its own cache."""
_SELECTION = ("retain_threshold", "n_features")


class GridError(BakeoutError):
    """A grid that cannot be read, or does not fit the recipe."""


@dataclass(frozen=True)
class Point:
    """One setting of every axis that matters for its method."""

    settings: tuple[tuple[str, Setting], ...]

    @property
    def key(self) -> str:
        """The same for the same settings."""
        return json.dumps(dict(self.settings), sort_keys=True)

    def __str__(self) -> str:
        """For a person."""
        return ", ".join(
            f"{name} {setting:g}" if isinstance(setting, float) else f"{name} {setting}"
            for name, setting in self.settings
        )


def parse_grid(asked: Sequence[str]) -> dict[str, list[Setting]]:
    """`["value=-20,-40", "n_features=10,20"]` as axes with their settings.

    Raises:
        GridError: an axis is unknown, empty or named twice, or a setting is no number.
    """
    grid: dict[str, list[Setting]] = {}
    for text in asked:
        name, _, settings = text.partition("=")
        if name not in AXES:
            close = difflib.get_close_matches(name, list(AXES), 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise GridError(
                f"--grid {text}: no axis {name!r}; expected one of {', '.join(AXES)}{hint}"
            )
        if name in grid:
            raise GridError(f"--grid {text}: {name} is given twice; join them with commas")
        grid[name] = []
        for setting in settings.split(","):
            try:
                read = AXES[name](setting.strip())
            except ValueError as error:
                kind = "whole numbers" if AXES[name] is int else "numbers"
                raise GridError(
                    f"--grid {text}: {setting!r} is no setting of {name}; expected {kind}"
                ) from error
            if read == "" or (isinstance(read, float) and not math.isfinite(read)):
                raise GridError(
                    f"--grid {text}: {setting!r} is no setting of {name}; expected a value that "
                    "is finite"
                )
            if name == "method" and read not in METHODS:
                raise GridError(
                    f"--grid {text}: no method {read!r}; expected one of {', '.join(METHODS)}"
                )
            if read not in grid[name]:
                grid[name].append(read)
    return {name: grid[name] for name in AXES if name in grid}


def points(recipe: Recipe, grid: dict[str, list[Setting]]) -> list[Point]:
    """Every point of a grid, none twice: an axis that a method does not use is left out.

    Raises:
        GridError: an axis fits nothing in the recipe.
        RecipeError: a point makes no valid recipe.
    """
    _check_axes(recipe, grid)
    found: dict[Point, None] = {}
    for settings in product(*grid.values()):
        point = dict(zip(grid, settings, strict=True))
        methods = [str(point.get("method", clamp.method)) for clamp in recipe.clamp]
        used = {name for method in methods for name in METHODS[method].fields}
        for name in own_fields() - used:
            point.pop(name, None)
        found[Point(tuple(point.items()))] = None
    kept = {name for one in found for name, _ in one.settings}
    if unused := [name for name in grid if name not in kept]:
        raise GridError(
            f"--grid {unused[0]}: no method of the recipe or the grid uses it; expected one that "
            "does. Leave the axis out"
        )
    for one in found:
        variant(recipe, one)
    return list(found)


def variant(recipe: Recipe, point: Point) -> Recipe:
    """The recipe with a point's settings in place of its own.

    Raises:
        RecipeError: they do not fit together.
    """
    settings = dict(point.settings)
    clamps = [_clamp_at(clamp, settings) for clamp in recipe.clamp]
    data = recipe.to_dict() | {"clamp": clamps}
    if chosen := {name: settings[name] for name in _SELECTION if name in settings}:
        data["select"] = data["select"] | chosen
    return Recipe.parse(data, name=f"at {point}", folder=recipe.folder)


def _clamp_at(clamp: Clamp, settings: dict[str, Setting]) -> dict[str, Any]:
    method = str(settings.get("method", clamp.method))
    table, own = clamp.table_for(method), METHODS[method].fields
    table |= {name: settings[name] for name in ("trigger", *own) if name in settings}
    if "layer" in settings:
        layer = settings["layer"]
        table["sae"] = {key: _renumbered(str(name), layer) for key, name in table["sae"].items()}
        if "hook_point" in table:
            table["hook_point"] = _renumbered(table["hook_point"], layer)
    return table


_NUMBERED = re.compile(r"(layer_|blocks\.|layers\.)\d+")


def _renumbered(name: str, layer: Setting) -> str:
    return _NUMBERED.sub(lambda match: f"{match[1]}{layer}", name)


def _check_axes(recipe: Recipe, grid: dict[str, list[Setting]]) -> None:
    if not grid:
        raise GridError("no --grid: expected at least one axis, as in --grid value=-20,-40")
    if set(_SELECTION) & set(grid) and not recipe.selects:
        axis = next(name for name in _SELECTION if name in grid)
        raise GridError(f'--grid {axis}: the recipe names its features; expected "select"')
    if "layer" in grid:
        names = [name for clamp in recipe.clamp for name in _names(clamp)]
        if len(recipe.clamp) > 1 or not any(_NUMBERED.search(name) for name in names):
            raise GridError(
                "--grid layer: expected one [[clamp]] table whose SAE is named by its layer "
                "(layer_7/…, blocks.7.…), so that the others can be found"
            )


def _names(clamp: Clamp) -> Iterator[str]:
    yield from (name for name in (clamp.sae.path, clamp.sae.id) if name is not None)
