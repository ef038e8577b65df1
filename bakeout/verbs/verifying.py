"""`bakeout verify`: gather evidence about a folder."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from bake.errors import BakeoutError, OutputError, RecipeError, printable
from bake.recipe import Recipe
from bake.scale.cluster import cluster
from bake.sources import offline
from bakeout.terminal import progress, show_report, write_json
from bakeout.verbs.arguments import Device, FolderPath, JsonFile, RayAddress
from bakeout.verbs.selecting import select_anew
from export.signing import Trust
from verify.clamped_folder import downloads_of, own_recipe
from verify.evidence.kinds import KINDS, of_files
from verify.helping import helped_by
from verify.options import Options
from verify.run import verify_folder


def verify(
    folder: FolderPath,
    recipe: Annotated[
        Path | None, typer.Option(help="Rebuild the hooked reference from this recipe.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="KIND…", help=f"Only {', '.join(KINDS)}.")
    ] = None,
    device: Device = "cpu",
    budget: Annotated[
        int, typer.Option(help="Steps of the suffix search; 0 leaves it out.", min=0)
    ] = Options.budget,
    minutes: Annotated[
        float | None,
        typer.Option(
            "--budget-minutes",
            help="About how long it may take: questions, texts and prompts are thinned evenly, and "
            "the report says to how many.",
            min=0.1,
        ),
    ] = None,
    tasks: Annotated[
        str,
        typer.Option(
            metavar="TASK,…",
            help="Run lm-evaluation-harness too, on every engine: its own tasks (wmdp_bio, mmlu), "
            "or local, the recipe's own questions.",
        ),
    ] = "",
    evals: Annotated[
        Path, typer.Option(metavar="DIR", help="Where --tasks writes the harness's own results.")
    ] = Options.evals,
    yes: Annotated[
        bool,
        typer.Option("--yes", help="Without --recipe: download what the folder's own names."),
    ] = False,
    as_claimed: Annotated[
        bool,
        typer.Option(
            "--features-as-claimed",
            help='Where the recipe says features = "select": take those that the folder names '
            "instead of selecting anew. The report says so.",
        ),
    ] = False,
    signature: Annotated[
        str | None,
        typer.Option(
            metavar="PEM",
            help="Whose signature the folder must have: a public key, root certificates, or "
            "IDENTITY,ISSUER for Sigstore.",
            show_default=False,
        ),
    ] = None,
    ray: RayAddress = None,
    json_file: JsonFile = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write the report as one page.")
    ] = None,
) -> None:
    """Compare a folder with the hooked reference. Exit code 1 when it does not hold.

    Interrupted, the same command goes on where it was.
    """
    check_place("--json", json_file)
    check_place("--html", html_file)

    chosen = frozenset(only or ())
    loaded = Recipe.load(recipe) if recipe is not None else None
    named = tuple(task.strip() for task in tasks.split(",") if task.strip())
    own = loaded is None and _may_follow(folder, chosen, named, yes=yes)
    trust = None if signature is None else Trust.parse(signature)
    options = Options(device, user_cache(), budget, named, evals, minutes, own, trust)
    with progress("verify") as advance, cluster(ray) as crew:
        select = None if as_claimed else partial(select_anew, device=device)
        helped = None if crew is None else partial(helped_by, crew)
        report = verify_folder(folder, loaded, chosen, advance, options, select, helped)
    if json_file is None or str(json_file) != "-":
        show_report(report)
    if json_file is not None:
        write_json(report.to_dict(), json_file)
    if html_file is not None:
        from verify.page.html import write_html

        write_html(report, folder, html_file)
    raise typer.Exit(report.exit_code)


def _may_follow(folder: Path, kinds: frozenset[str], tasks: tuple[str, ...], *, yes: bool) -> bool:
    """Whether the folder's own recipe may be followed: the user says so, having seen what it would
    download. Nothing is asked where nothing would be.

    Raises:
        RecipeError: nobody is there to ask.
    """
    if yes or (kinds and kinds <= of_files() and not tasks):
        return True
    recipe = own_recipe(folder)
    if recipe is None or offline():
        return True
    named = ", ".join(printable(name) for name in downloads_of(recipe))
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise RecipeError(
            f"{folder.name}: its own recipe would download {named}; expected --yes, --recipe with "
            f"a recipe of yours, or --only {','.join(sorted(of_files()))}"
        )
    typer.echo(f"{folder.name}'s own recipe downloads, where they are not here: {named}", err=True)
    return typer.confirm("Follow it? Else files and witnesses alone are checked", err=True)


def check_place(option: str, file: Path | None) -> None:
    """Raise where a file cannot be written: known before hours of work rather than after."""
    if file is not None and str(file) != "-" and (not file.parent.is_dir() or file.is_dir()):
        raise BakeoutError(
            f"{option} {file}: cannot be written; name a file in a folder that exists"
        )


def user_cache() -> Path | None:
    """The user's cache folder; None where it cannot be written and nobody asked for it."""
    from bake.search.cache import cache_folder

    if os.environ.get("BAKEOUT_CACHE"):
        return cache_folder()
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, OutputError):
        return None
    return folder if os.access(folder, os.W_OK) else None
