"""The verbs that make, find and show things; each calls into a module of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
