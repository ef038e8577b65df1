"""`bakeout train-sae`: an SAE for a model that has no public one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bake.search.train_sae import train_config
from bakeout.terminal import progress


def train_sae(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="What to train (TOML).")],
    out: Annotated[Path, typer.Option(help="Folder to write the SAE to; it may not exist.")],
) -> None:
    """Train an SAE with sae_lens, for a model that has no public one."""
    with progress("train-sae") as advance:
        found = train_config(config, out, advance)
    typer.echo(
        f"written to {out}\non {found.n_tokens:,} tokens that it was not trained on: L0 "
        f"{found.l0:.1f}, {found.explained:.1%} of the variance explained, {found.dead:,} features "
        "never active"
    )
