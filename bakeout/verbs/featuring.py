"""`bakeout features`: a page on a recipe's features."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bakeout.pages.search_pages import features_page
from bakeout.verbs.arguments import Device, DType, RayAddress, RecipePath


def features(
    recipe: RecipePath,
    html: Annotated[Path, typer.Option(metavar="FILE", help="The page to write.")],
    sweep: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Show this sweep on the page too.")
    ] = None,
    ray: RayAddress = None,
    device: Device = "cpu",
    dtype: DType = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the page.")] = False,
) -> None:
    """Write a page on a recipe's features: where they fire, how strongly, on which texts."""
    features_page(recipe, html, sweep, ray, device, dtype, force=force)
    typer.echo(f"written to {html}")
