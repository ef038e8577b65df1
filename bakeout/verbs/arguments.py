"""Arguments that several verbs take."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from bake.errors import BakeoutError, printable, short

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file (TOML).")]
FolderPath = Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder that bakeout wrote.")]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the report; - is stdout.")
]


def _device(name: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", name):
        raise BakeoutError(
            f"--device {short(printable(name))}: expected cpu, or cuda (cuda:1 is the second), as "
            "torch names them"
        )
    return name


Device = Annotated[
    str,
    typer.Option(help="Where models run, as torch names it: cpu, cuda.", callback=_device),
]


def _known(dtype: str | None) -> str | None:
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise BakeoutError(f"--dtype {dtype}: expected float32, bfloat16 or float16")
    return dtype


DType = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="What models run in: float32, bfloat16 or float16; else as recipe or folder say.",
        callback=_known,
        show_default=False,
    ),
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="[ADDRESS]",
        help="Work on a Ray cluster (HOST:PORT), or on one of this machine's cores.",
    ),
]
