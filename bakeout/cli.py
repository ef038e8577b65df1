"""The command line: `bakeout VERB …`. Errors are one line on stderr; exit codes as documented."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from bake.errors import BakeoutError
from verify.kinds import KINDS, Options

BAD_INPUT, UNEXPECTED, INTERRUPTED = 2, 3, 130
_GOES_ON = "the same command goes on where it was"
_KEPT = {"verify": _GOES_ON, "select": _GOES_ON, "features": _GOES_ON, "sweep": _GOES_ON}
"""By verb, what an interruption leaves, where it leaves something."""

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
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the report; - is stdout.")
]


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
    witnesses: Annotated[
        bool | None,
        typer.Option(
            help="Record a few prompts that fire the clamp, with their logits, by running the "
            "model. Default: where the weights are under 1 GB.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a clamped checkpoint: the base's shards byte for byte, and the clamp beside them."""
    from bakeout.baking import bake_recipe, describe_plan, planned
    from export.new_folder import check_output

    if dry_run:
        plan = planned(recipe)
        check_output(out, inputs=plan.inputs, size=plan.size, force=force)
        typer.echo(f"{describe_plan(plan)}\nnothing written (--dry-run)")
        return
    plan = bake_recipe(recipe, out, force=force, witnesses=witnesses)
    typer.echo(f"{describe_plan(plan)}\nwritten to {out}")


@export_app.command("onnx")
def export_onnx(
    folder: FolderPath,
    precision: Annotated[
        str,
        typer.Option(
            help="shared: the checkpoint's own weights, in place; fp16, int8, int4: rounded copies."
        ),
    ] = "shared",
    out: Annotated[
        Path | None, typer.Option(help="A folder of its own for a rounded graph.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a graph that is there.")] = False,
) -> None:
    """Write a graph for ONNX Runtime that holds the clamp as a custom operator, and check it."""
    from bakeout.exporting import rounded_card
    from bakeout.showing import progress
    from export.onnx_folder import export_onnx as write
    from export.onnx_weights import as_precision

    with progress("export onnx") as advance:
        done = write(
            folder,
            precision=as_precision(precision),
            out=out,
            force=force,
            card="" if out is None else rounded_card(folder),
            progress=advance,
        )
    typer.echo(
        f"clamps {done.n_clamps}\n"
        f"check  onnx.checker and ONNX Runtime in a fresh process: max |Δlogit| to the checkpoint "
        f"{done.difference:.1e}, of which the clamp moves {done.effect:.1e}\n"
        f"written to {done.graph}"
    )


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
    from bakeout.showing import progress, show_report
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
    from bakeout.selection_view import run_select

    run_select(recipe, write, json_file, force=force)


@app.command()
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
    from bakeout.sweep_view import sweep_recipe

    sweep_recipe(recipe, grid or [], out, objective, floor, json_file)


@app.command()
def features(
    recipe: RecipePath,
    html: Annotated[Path, typer.Option(metavar="FILE", help="The page to write.")],
    sweep: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Show this sweep on the page too.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the page.")] = False,
) -> None:
    """Write a page on a recipe's features: where they fire, how strongly, on which texts."""
    from bakeout.pages import features_page

    features_page(recipe, html, sweep, force=force)
    typer.echo(f"written to {html}")


@app.command("train-sae")
def train_sae(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="What to train (TOML).")],
    out: Annotated[Path, typer.Option(help="Folder to write the SAE to; it may not exist.")],
) -> None:
    """Train an SAE with sae_lens, for a model that has no public one."""
    from bakeout.showing import progress
    from bakeout.training import train_config

    with progress("train-sae") as advance:
        found = train_config(config, out, advance)
    typer.echo(
        f"written to {out}\non {found.n_tokens:,} tokens that it was not trained on: L0 "
        f"{found.l0:.1f}, {found.explained:.1%} of the variance explained, {found.dead:,} features "
        "never active"
    )


@app.command()
def show(folder: FolderPath) -> None:
    """What was baked: layers, features, method, provenance, exactness."""
    from bakeout.showing import show_folder

    show_folder(folder)


@app.command()
def chat(
    folder: FolderPath,
    engine: Annotated[
        str,
        typer.Option(help="torch, or onnx: the folder's model.onnx, else its smallest graph."),
    ] = "torch",
    beside: Annotated[
        str | None,
        typer.Option(
            metavar="BASE", help="Let this model answer too: a folder or hub id, run in torch."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Where models run: cpu or cuda.")] = "cpu",
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 256,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="Sample, with the same draws in every run. Default: the likeliest token.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Type a prompt, see the answer as it comes. Each prompt stands alone: nothing is remembered.

    Ctrl-C stops an answer, Ctrl-D or /quit ends. Prompts may be piped in, one a line. The folder is
    run as it is; whether it is what was baked is for `bakeout verify` to say.
    """
    from bakeout.chat import run_chat
    from bakeout.streaming import Manner

    manner = Manner(max_new_tokens, temperature)
    run_chat(folder, engine=engine, beside=beside, device=device, manner=manner)


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


def write_json(report: dict[str, Any], file: Path) -> None:
    """Write a report as JSON to a file, or to stdout where the file is `-`."""
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
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
        if code == INTERRUPTED:  # typer makes an exit code of an interruption in a verb
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return _fail(
            f"interrupted; {_KEPT.get(arguments[0], 'nothing was kept')}", INTERRUPTED, debug
        )
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
