"""`bakeout import-gguf`: a GGUF file → a base model's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bake.importing.import_gguf import import_gguf
from bakeout.terminal import progress


def convert(
    file: Annotated[Path, typer.Argument(help="A Gemma 2 or Gemma 3, quantised or not.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    sha256: Annotated[
        str | None, typer.Option(help="Refuse the file unless it has this sha256.")
    ] = None,
) -> None:
    """Write a GGUF file's Gemma as a base model's folder: bfloat16 weights, config, tokenizer."""
    with progress("import") as advance:
        gguf = import_gguf(file, out, sha256=sha256, progress=advance)
    config = gguf.config
    typer.echo(
        f"base   {gguf.family} ({config.num_hidden_layers} layers, d_in {config.hidden_size}, "
        f"{config.vocab_size:,} tokens)\nsize   {gguf.size / 1e6:,.1f} MB in bfloat16\n"
        f"written to {out}"
    )
