"""The verbs about evidence: gather it, write it into a card, publish it with the folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from bake.errors import BakeoutError
from bakeout.verbs import FolderPath, JsonFile, app
from verify.kinds import KINDS, Options


@app.command()
def verify(
    folder: FolderPath,
    recipe: Annotated[
        Path | None, typer.Option(help="Rebuild the hooked reference from this recipe.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="KIND…", help=f"Only {', '.join(KINDS)}.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where models run: cpu or cuda.")] = "cpu",
    budget: Annotated[
        int, typer.Option(help="Steps of the suffix search; 0 leaves it out.", min=0)
    ] = Options.budget,
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
    json_file: JsonFile = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write the report as one page.")
    ] = None,
) -> None:
    """Compare a folder with the hooked reference. Exit code 1 when it does not hold.

    Interrupted, the same command goes on where it was.
    """
    from bake.recipe import Recipe
    from bakeout.showing import progress, show_report, write_json
    from verify.suite import verify_folder

    _check_place("--json", json_file)
    _check_place("--html", html_file)

    chosen = frozenset(only or ())
    loaded = Recipe.load(recipe) if recipe is not None else None
    named = tuple(task.strip() for task in tasks.split(",") if task.strip())
    options = Options(device, _cache(), budget, named, evals)
    with progress("verify") as advance:
        report = verify_folder(folder, loaded, chosen, advance, options)
    if json_file is None or str(json_file) != "-":
        show_report(report)
    if json_file is not None:
        write_json(report.to_dict(), json_file)
    if html_file is not None:
        from verify.html import write_html

        write_html(report, folder, html_file)
    raise typer.Exit(report.exit_code)


@app.command()
def card(
    folder: FolderPath,
    report: Annotated[
        Path | None,
        typer.Option(help="What `bakeout verify FOLDER --json FILE` wrote.", show_default=False),
    ] = None,
) -> None:
    """Write the folder's README.md anew: what was removed, what was measured, what remains."""
    from bakeout.publishing import card_folder
    from bakeout.showing import progress

    with progress("card") as advance:
        written = card_folder(folder, report, lambda share: advance("hash", share))
    typer.echo(f"written to {written}")


@app.command()
def push(
    folder: FolderPath,
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Hub id: user/name.")],
    report: Annotated[
        Path | None,
        typer.Option(
            help="What `bakeout verify FOLDER --json FILE` wrote: pass, and in full.",
            show_default=False,
        ),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Create it as private.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be uploaded; change nothing.")
    ] = False,
    unverified: Annotated[
        bool, typer.Option("--unverified", help="Without a passing report; the card says so.")
    ] = False,
) -> None:
    """Upload a folder that passed its verification to the hub, with a card that shows it."""
    from bakeout.publishing import push_folder
    from bakeout.showing import printable, progress

    with progress("push") as advance:
        upload = push_folder(
            folder,
            repo,
            report_file=report,
            unverified=unverified,
            private=private,
            dry_run=dry_run,
            advance=lambda share: advance("hash", share),
        )
    for name, size in upload.files:
        typer.echo(printable(f"{size / 1e6:>12,.3f} MB  {name}"))
    kind = "private" if upload.private else "public"
    total = f"{len(upload.files)} files, {upload.size / 1e6:,.1f} MB, {kind}: {upload.repo}"
    typer.echo(f"would upload {total}\nnothing sent (--dry-run)" if dry_run else f"sent {total}")


def _check_place(option: str, file: Path | None) -> None:
    """Raise where a file cannot be written: known before hours of work rather than after."""
    if file is not None and str(file) != "-" and (not file.parent.is_dir() or file.is_dir()):
        raise BakeoutError(
            f"{option} {file}: cannot be written; name a file in a folder that exists"
        )


def _cache() -> Path | None:
    """The user's cache folder; None where it cannot be written and nobody asked for it."""
    from bake.feature_files import cache_folder

    folder = cache_folder()
    if "BAKEOUT_CACHE" not in os.environ:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return None
        if not os.access(folder, os.W_OK):
            return None
    return folder
