"""Which class loads a folder: bakeout's own of a family, or transformers'; never its own."""

from __future__ import annotations

from pathlib import Path

import bake.families
from bake.errors import FolderError, shown
from bake.families import FAMILIES
from export.code_check import MODELING_FILE
from export.manifest import read_json

MODELING = Path(bake.families.__file__).with_name(MODELING_FILE)
"""bakeout's own modeling file."""


def loading_class(folder: Path) -> tuple[str, str]:
    """(`bakeout` or `transformers`, the name of the class there), by config.json's model_type.

    Raises:
        FolderError: config.json cannot be read, or names no Gemma that is known here.
    """
    model_type = read_json(folder / "config.json").get("model_type")
    for name, family in FAMILIES.items():
        if model_type == name:
            return "transformers", family.architecture
        if model_type == family.model_type:
            return "bakeout", family.clamped
    raise FolderError(
        f"{folder}: model_type is {shown(model_type)}; expected one of "
        f"{', '.join(FAMILIES)}, or clamped_ before it"
    )
