"""Arguments that several verbs take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file (TOML).")]
FolderPath = Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder that bakeout wrote.")]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the report; - is stdout.")
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="[ADDRESS]",
        help="Work on a Ray cluster (HOST:PORT), or on one of this machine's cores.",
    ),
]
