"""The command line: `bakeout VERB …`. Errors are one line on stderr; exit codes as documented."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from bake.errors import BakeoutError

if TYPE_CHECKING:
    from verify.report import VerifyReport

BAD_INPUT, UNEXPECTED, INTERRUPTED = 2, 3, 130
KINDS = ("integrity", "parity", "choices", "loss")

app = typer.Typer(
    help="Bake SAE-based unlearning into a Gemma checkpoint's files, and prove that it holds.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

export_app = typer.Typer(
    help="Carry a clamped checkpoint's clamp in another form.", no_args_is_help=True
)
app.add_typer(export_app, name="export")

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file (TOML).")]
FolderPath = Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder that bakeout wrote.")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything that the demo writes.")] = Path(
        "runs/demo"
    ),
) -> None:
    """Bake the shipped miniature, load the result as a stranger would, and compare."""
    from bakeout.demo import run_demo

    raise typer.Exit(run_demo(out))


@app.command()
def bake(
    recipe: RecipePath,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    force: Annotated[bool, typer.Option("--force", help="Replace what bakeout wrote.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, write nothing.")
    ] = False,
) -> None:
    """Write a clamped checkpoint: the base's shards byte for byte, and the clamp beside them."""
    from bakeout.baking import bake_recipe, describe_plan
    from export.checkpoint import plan_checkpoint
    from export.new_folder import check_output

    if dry_run:
        from bake.recipe import Recipe

        plan = plan_checkpoint(Recipe.load(recipe))
        check_output(out, inputs=plan.inputs, size=plan.size, force=force)
        typer.echo(f"{describe_plan(plan)}\nnothing written (--dry-run)")
        return
    plan = bake_recipe(recipe, out, force=force)
    typer.echo(f"{describe_plan(plan)}\nwritten to {out}")


@export_app.command()
def compiled(
    folder: FolderPath,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    pad: Annotated[
        int | None, typer.Option(help="Channels to add to the residual stream; else the least.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16; else the checkpoint's.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what bakeout wrote.")] = False,
) -> None:
    """Compile the clamp into two stock decoder layers: no custom code."""
    from bakeout.exporting import export_compiled

    typer.echo(
        f"{export_compiled(folder, out, pad=pad, dtype=dtype, force=force)}\nwritten to {out}"
    )


@export_app.command()
def adapter(
    folder: FolderPath,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    force: Annotated[bool, typer.Option("--force", help="Replace what bakeout wrote.")] = False,
) -> None:
    """Write the clamp as a PEFT adapter: no weights of the base."""
    from bakeout.exporting import export_adapter

    typer.echo(f"{export_adapter(folder, out, force=force)}\nwritten to {out}")


@app.command()
def verify(
    folder: FolderPath,
    recipe: Annotated[
        Path | None, typer.Option(help="Rebuild the hooked reference from this recipe.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="KIND…", help=f"Only {', '.join(KINDS)}.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the report; - is stdout.")
    ] = None,
) -> None:
    """Compare a folder with the hooked reference. Exit code 1 when it does not hold."""
    from bake.recipe import Recipe
    from bakeout.showing import progress, show_report
    from verify.suite import verify_folder

    chosen = frozenset(only or ())
    loaded = Recipe.load(recipe) if recipe is not None else None
    with progress("verify") as advance:
        report = verify_folder(folder, loaded, only=chosen, progress=advance)
    if json_file is None or str(json_file) != "-":
        show_report(report)
    if json_file is not None:
        write_json(report, json_file)
    raise typer.Exit(report.exit_code)


@app.command()
def show(folder: FolderPath) -> None:
    """What was baked: layers, features, method, provenance, exactness."""
    from bakeout.showing import show_folder

    show_folder(folder)


def write_json(report: VerifyReport, file: Path) -> None:
    """Write a report as JSON to a file, or to stdout where the file is `-`."""
    text = json.dumps(report.to_dict(), indent=2, ensure_ascii=False) + "\n"
    if str(file) == "-":
        sys.stdout.write(text)
        return
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BakeoutError(
            f"--json {file}: cannot be written ({error.strerror}); name a file in a folder "
            "that exists"
        ) from error


def main() -> None:
    """Entry point of the `bakeout` command."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code."""
    debug = "--debug" in arguments
    arguments = _spread_kinds([argument for argument in arguments if argument != "--debug"])
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = app(arguments, prog_name="bakeout", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted; nothing was kept", INTERRUPTED, debug)
    except BakeoutError as error:
        return _fail(str(error), BAD_INPUT, debug)
    except Exception as error:
        if hasattr(error, "format_message"):  # the command line's own usage errors
            return _fail(f"{error.format_message()}; see bakeout --help", BAD_INPUT, debug)
        if isinstance(error, OSError) and error.filename is not None:
            return _fail(f"{error.filename}: {error.strerror}", BAD_INPUT, debug)
        return _fail(
            f"unexpected {type(error).__name__}: {error}; run again with --debug to see where",
            UNEXPECTED,
            debug,
        )


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    line = " ".join(message.split())
    printable = "".join(c if c.isprintable() else "?" for c in line)
    print(f"error: {printable}", file=sys.stderr)
    return code


def _spread_kinds(arguments: list[str]) -> list[str]:
    """`--only a b` and `--only a,b` as `--only a --only b`."""
    spread: list[str] = []
    after_only = False
    for argument in arguments:
        words = argument.split(",")
        if after_only and all(word in KINDS for word in words):
            if spread[-1] == "--only":
                spread.pop()
            spread += [part for word in words for part in ("--only", word)]
            continue
        after_only = argument == "--only"
        spread.append(argument)
    return spread


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
