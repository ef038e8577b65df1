"""What a notebook needs without the command line. `bake`, `export` and `verify` hand these on."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path

from bake.recipe import Recipe
from bakeout.verbs.baking import bake_recipe
from bakeout.verbs.exporting import export_adapter, export_compiled, rounded_card
from bakeout.verbs.selecting import select_anew
from export.carriers.gguf.gguf_file import export_gguf
from export.carriers.onnx.onnx_folder import export_onnx
from verify.options import Options
from verify.report.findings import VerifyReport
from verify.run import verify_folder


def bake(
    recipe: Recipe | str | Path, out: str | Path, *, force: bool = False, unfit: bool = False
) -> Path:
    """Write a clamped checkpoint.

    Args:
        recipe: one that was loaded, or its TOML file.
        out: the folder to write.
        force: replace a folder that bakeout wrote.
        unfit: bake SAEs that do not fit the base too.

    Returns:
        The folder.

    Raises:
        BakeoutError: what the recipe names cannot be used, or the folder cannot be written.
    """
    loaded = Recipe.load(recipe) if isinstance(recipe, str) else recipe
    bake_recipe(loaded, Path(out), force=force, unfit=unfit)
    return Path(out)


def to_onnx(
    folder: str | Path,
    *,
    precision: str = "shared",
    out: str | Path | None = None,
    inline: bool = False,
    force: bool = False,
) -> Path:
    """Write an ONNX graph of a clamped or compiled folder, and check it.

    Args:
        folder: what to export.
        precision: one of `export.PRECISIONS`.
        out: a folder of its own for a rounded graph; else the graph lies in `folder`.
        inline: without ONNX functions.
        force: replace what is there.

    Returns:
        The graph.

    Raises:
        BakeoutError: the folder cannot be exported, or the graph does not say what it says.
    """
    written = export_onnx(
        Path(folder),
        precision=precision,
        out=None if out is None else Path(out),
        inline=inline,
        card="" if out is None else rounded_card(Path(folder)),
        force=force,
    )
    return written.graph


def to_compiled(
    folder: str | Path,
    out: str | Path,
    *,
    pad: int | None = None,
    dtype: str | None = None,
    force: bool = False,
) -> Path:
    """Write the clamp as two stock decoder layers; for the arguments see `bakeout export compiled`.

    Raises:
        BakeoutError: the folder cannot be compiled, or the layers miss their bound.
    """
    export_compiled(Path(folder), Path(out), pad=pad, dtype=dtype, force=force)
    return Path(out)


def to_adapter(folder: str | Path, out: str | Path, *, force: bool = False) -> Path:
    """Write the clamp as a PEFT adapter, without weights of the base.

    Raises:
        BakeoutError: the folder is no clamped checkpoint, or `out` cannot be written.
    """
    export_adapter(Path(folder), Path(out), force=force)
    return Path(out)


def to_gguf(
    folder: str | Path, out: str | Path, *, outtype: str = "f16", force: bool = False
) -> Path:
    """Write a compiled, a trained or a stock folder as a GGUF file, and check it.

    Args:
        folder: what to export.
        out: the file.
        outtype: how matrices are stored, as `bakeout export gguf` takes it.
        force: replace a GGUF file that is there.

    Raises:
        BakeoutError: llama.cpp knows no such model, or the file does not say what the folder says.
    """
    export_gguf(Path(folder), Path(out), outtype=outtype, force=force)
    return Path(out)


def verify(
    folder: str | Path,
    recipe: Recipe | str | Path | None = None,
    *,
    only: str | Iterable[str] = (),
    options: Options | None = None,
) -> VerifyReport:
    """Gather evidence about a folder.

    Args:
        folder: what bakeout wrote.
        recipe: what the hooked reference is rebuilt from; without one, the folder's own where all
            of it can be had from the hub.
        only: a kind of evidence, or several; all when empty.
        options: how it is run.

    Returns:
        The report: `verdict`, `failures`, `engines`, `to_dict()`, and what each kind found.

    Raises:
        BakeoutError: the folder, the recipe or what it names cannot be used.
    """
    loaded = Recipe.load(recipe) if isinstance(recipe, str | Path) else recipe
    kinds = frozenset([only] if isinstance(only, str) else only)
    options = options or Options()
    select = partial(select_anew, device=options.device)
    return verify_folder(Path(folder), loaded, kinds, options=options, select=select)
