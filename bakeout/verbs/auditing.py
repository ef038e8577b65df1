"""`bakeout audit`: attack folders, and say what came back. `compare`: put them side by side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from bake.recipe import Recipe
from bakeout.pages.audit_view import show_audit
from bakeout.pages.compare_view import show_comparison, write_comparison
from bakeout.terminal import progress, write_json
from bakeout.verbs.arguments import Device, JsonFile
from bakeout.verbs.verifying import check_place, user_cache
from verify.audit.compared import compare as compare_folders
from verify.audit.run_audit import AuditOptions, audit_folders


def audit(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="FOLDER…", help="Folders that bakeout wrote, or plain models, of one base."
        ),
    ],
    recipe: Annotated[
        Path, typer.Option(help="Names the base, the questions and the texts (TOML).")
    ],
    quick: Annotated[
        bool, typer.Option("--quick", help="A few settings and steps: minutes become seconds.")
    ] = False,
    minutes: Annotated[
        float | None,
        typer.Option(
            "--budget-minutes",
            help="About how long it may take: steps and settings are left out, and the report says "
            "so.",
            min=0.1,
        ),
    ] = None,
    device: Device = "cpu",
    json_file: JsonFile = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write the report as one page.")
    ] = None,
) -> None:
    """Attack folders: fine-tune, strip, round, look inside, ask otherwise. Says what came back.

    Exit code 0: it ran, whatever came back. 1: a folder is not what its manifest says. Interrupted,
    the same command goes on where it was.
    """
    check_place("--json", json_file)
    check_place("--html", html_file)
    options = AuditOptions(quick=quick, minutes=minutes, device=device, cache=user_cache())
    with progress("audit") as advance:
        report = audit_folders(folders, Recipe.load(recipe), options, advance)
    if json_file is None or str(json_file) != "-":
        show_audit(report)
    if json_file is not None:
        write_json(report.to_dict(), json_file)
    if html_file is not None:
        from verify.page.audit_page import write_audit

        write_audit(report, html_file)
    raise typer.Exit(report.exit_code)


def compare(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="FOLDER…", help="Folders that bakeout wrote of one base."),
    ],
    report: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="What `verify --json` or `audit --json` wrote; several times. Those that lie "
            "beside a folder are found by themselves.",
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="Names the base: measure tokens per second too, which loads every folder."
        ),
    ] = None,
    json_file: JsonFile = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write the table as one page.")
    ] = None,
) -> None:
    """Put folders of one base side by side: what reports measured, what loads and removes each.

    Exit code 1: a folder is not what its manifest says.
    """
    check_place("--json", json_file)
    check_place("--html", html_file)
    speed = None if recipe is None else _speed_of(Recipe.load(recipe))
    found = compare_folders(folders, report or (), speed)
    if json_file is None or str(json_file) != "-":
        show_comparison(found)
    if json_file is not None:
        write_json(found.to_dict(), json_file)
    if html_file is not None:
        write_comparison(found, html_file)
    raise typer.Exit(found.exit_code)


def _speed_of(recipe: Recipe) -> Callable[[Path], dict[str, float]]:
    """Tokens per second of a folder's engines, where it is what its manifest says."""
    from verify.audit.subject import check_subject
    from verify.speeds import speeds

    def measure(folder: Path) -> dict[str, float]:
        return {} if check_subject(folder) else speeds([folder], recipe, reference=False)

    return measure
