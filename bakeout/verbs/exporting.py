"""`bakeout export compiled` and `bakeout export adapter`: checkpoint → plan → card → folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from bake.new_folder import check_output
from bakeout.terminal import compiled_lines, progress
from bakeout.verbs.arguments import Device, FolderPath
from bakeout.verbs.training import Force, OfFolder, Out, Seed, distill_into, said
from export.carriers.adapter import other_base, write_adapter
from export.carriers.carriers import CARRIERS
from export.carriers.compiled.compiling import describe, plan_compiled, write_compiled
from export.carriers.gguf.gguf_file import export_gguf
from export.carriers.gguf.gguf_types import OUTTYPES
from export.carriers.onnx.onnx_folder import export_onnx as write
from export.carriers.onnx.precisions import PRECISIONS
from export.clamped import open_clamped
from export.folder_contents import recipe_in
from export.manifest import BaseEntry, Manifest
from model_cards.facts import facts_of_manifest
from model_cards.render import render

app = typer.Typer(help="Carry a clamped checkpoint's clamp in another form.", no_args_is_help=True)


def export_compiled(
    folder: Path,
    out: Path,
    *,
    pad: int | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    force: bool = False,
) -> str:
    """Compile a clamped checkpoint; returns what was written, in a few lines."""
    with progress("compile") as advance:
        advance(f"measuring {folder.name}", 0.0)
        plan = plan_compiled(folder, pad=pad, dtype=dtype, device=device)
        size, done = plan.size, 0
        check_output(out, inputs=[folder], size=size, force=force)
        compiled = describe(plan)
        card = _card(folder, plan.source.manifest, "compiled", compiled=compiled)

        def written(n: int) -> None:
            nonlocal done
            done += n
            advance(f"writing {out.name}", done / size)

        write_compiled(plan, out, card=card, force=force, advance=written)
    return "\n".join(f"{name:<12} {text}" for name, text in compiled_lines(compiled))


def rounded_card(folder: Path) -> str:
    """The card of a folder that holds a checkpoint's graph with rounded weights, and no others."""
    clamped = open_clamped(folder, with_graphs=True)
    return _card(folder, clamped.manifest, clamped.manifest.carrier, exact=False)


def export_adapter(
    folder: Path, out: Path, *, rebase: Path | None = None, force: bool = False
) -> str:
    """Write a clamped checkpoint's adapter; returns what was written, in a line."""
    source = open_clamped(folder)
    base = None if rebase is None else other_base(source, rebase)
    manifest = source.manifest
    if base is not None:
        manifest = manifest.changed(base=BaseEntry(model=base.name, revision=None))
    card = _card(folder, manifest, "adapter")
    write_adapter(source, out, card=card, base=base, force=force)
    size = sum(path.stat().st_size for path in out.iterdir())
    return f"adapter      {size / 1e3:,.1f} kB, for {manifest.base.model}"


EXPORTS: dict[str, Callable[..., str]] = {"compiled": export_compiled, "adapter": export_adapter}
"""The carriers that are exported into a folder of their own, by name."""


def _card(folder: Path, manifest: Manifest, carrier: str, **more: Any) -> str:
    """The card of what is about to be exported, whose manifest says `more` than the folder's."""
    recipe = recipe_in(folder, manifest)
    fields = {"carrier": carrier, "exact": CARRIERS[carrier].exact} | more
    return render(facts_of_manifest(manifest.changed(**fields), recipe))


@app.command()
def onnx(
    folder: FolderPath,
    precision: Annotated[
        str,
        typer.Option(help="; ".join(f"{name}: {of.what}" for name, of in PRECISIONS.items()) + "."),
    ] = "shared",
    out: Annotated[
        Path | None, typer.Option(help="A folder of its own for a rounded graph.")
    ] = None,
    inline: Annotated[
        bool, typer.Option("--inline", help="No ONNX function: the clamp's body in its place.")
    ] = False,
    device: Device = "cpu",
    force: Annotated[bool, typer.Option("--force", help="Replace a graph that is there.")] = False,
) -> None:
    """Write a graph for ONNX Runtime that holds the clamp as a custom operator, and check it."""
    with progress("export onnx") as advance:
        done = write(
            folder,
            precision=precision,
            out=out,
            inline=inline,
            device=device,
            force=force,
            card="" if out is None else rounded_card(folder),
            progress=advance,
        )
    typer.echo(
        f"clamps {done.n_clamps}\n"
        f"check  onnx.checker and ONNX Runtime in a fresh process: max |Δlogit| to the checkpoint "
        f"{done.found.error:.1e}; the clamp moves {done.found.effect:.1e}, of which "
        f"{done.found.shown:.0%} shows\n"
        + ("" if done.warning is None else f"warning: {done.warning}\n")
        + f"written to {done.graph}"
    )


@app.command()
def compiled(
    folder: FolderPath,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    pad: Annotated[
        int | None, typer.Option(help="Channels to add to the residual stream; else the least.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16; else the checkpoint's.")
    ] = None,
    device: Device = "cpu",
    force: Annotated[bool, typer.Option("--force", help="Replace what bakeout wrote.")] = False,
) -> None:
    """Compile the clamp into two stock decoder layers: no custom code."""
    done = export_compiled(folder, out, pad=pad, dtype=dtype, device=device, force=force)
    typer.echo(f"{done}\nwritten to {out}")


@app.command()
def adapter(
    folder: FolderPath,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    rebase: Annotated[
        Path | None,
        typer.Option(help="A base that was fine-tuned from the checkpoint's, to bind it to."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what bakeout wrote.")] = False,
) -> None:
    """Write the clamp as a PEFT adapter: no weights of the base."""
    typer.echo(f"{export_adapter(folder, out, rebase=rebase, force=force)}\nwritten to {out}")


@app.command()
def merged(
    folder: FolderPath,
    out: Out,
    recipe: OfFolder = None,
    seed: Seed = 0,
    device: Device = "cpu",
    force: Force = False,
) -> None:
    """Train stock weights to do what the clamp does: an approximation, as `bakeout distill`."""
    entry = distill_into(folder, out, recipe=recipe, seed=seed, device=device, force=force)
    typer.echo(f"{said(entry)}\nwritten to {out}")


@app.command()
def gguf(
    folder: FolderPath,
    out: Annotated[Path, typer.Option(help="File to write.")],
    outtype: Annotated[
        str, typer.Option(help="; ".join(f"{name}: {of.what}" for name, of in OUTTYPES.items()))
    ] = "f16",
    force: Annotated[bool, typer.Option("--force", help="Replace a GGUF file.")] = False,
) -> None:
    """Write a compiled or a trained folder as a GGUF file for llama.cpp, and check it."""
    with progress("export gguf") as advance:
        found = export_gguf(folder, out, outtype=outtype, force=force, progress=advance)
    lines = [f"check  {found.lines[0]}", *(f"       {line}" for line in found.lines[1:])]
    lines += [f"warning: {text}" for text in found.warnings]
    lines += [f"4 bits {found.quantize}"] if found.quantize else []
    typer.echo("\n".join([*lines, f"written to {out} ({out.stat().st_size / 1e6:,.1f} MB)"]))
