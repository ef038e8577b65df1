"""`manifest.json`: where a folder came from, how exact it is, and the sha256 of its files."""

from __future__ import annotations

import hashlib
import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bake.base import BaseModel
from bake.clamp import ClampWeights, parameters, sae_name
from bake.recipe import Recipe
from export.new_folder import MANIFEST, SCHEMA

_TOOLS = ("bakeout", "sae-lens", "safetensors", "torch", "transformers")


def manifest(
    recipe: Recipe,
    base: BaseModel,
    clamps: list[ClampWeights],
    files: dict[str, str],
    *,
    carrier: str,
) -> dict[str, Any]:
    """The manifest of a folder.

    Args:
        recipe: what was asked for.
        base: what it was made from.
        clamps: what was added.
        files: sha256 of every other file, by its path in the folder.
        carrier: layer | adapter (both exact) | compiled | merged.
    """
    return {
        "schema": SCHEMA,
        "bakeout": version("bakeout"),
        "carrier": carrier,
        "exact": carrier in ("layer", "adapter"),
        "base": {"model": base.name, "revision": base.revision},
        "recipe_sha256": files["recipe.toml"],
        "clamps": [_clamp_entry(clamp) for clamp in clamps],
        "sources": _local_files(recipe),
        "tools": {tool: version(tool) for tool in _TOOLS},
        "files": dict(sorted(files.items())),
    }


def derived_manifest(
    source: dict[str, Any], files: dict[str, str], *, carrier: str, **more: Any
) -> dict[str, Any]:
    """The manifest of a folder that was made from a clamped checkpoint.

    Args:
        source: the checkpoint's manifest; base, clamps, recipe and sources stay.
        files: sha256 of every other file, by its path in the folder.
        carrier: adapter (exact) | compiled | merged.
        more: what this carrier has to say about itself.
    """
    return source | {
        "bakeout": version("bakeout"),
        "carrier": carrier,
        "exact": carrier == "adapter",
        "tools": {tool: version(tool) for tool in _TOOLS},
        "files": dict(sorted(files.items())),
        **more,
    }


def _clamp_entry(clamp: ClampWeights) -> dict[str, Any]:
    return {
        "layer": clamp.layer,
        "hook_point": clamp.hook_point,
        "method": clamp.clamp.method,
        "parameters": parameters(clamp.clamp),
        "features": clamp.clamp.features,
        "k": clamp.k,
        "sae": {
            "name": sae_name(clamp.clamp),
            "architecture": clamp.sae.architecture,
            "sha256": clamp.sae.sha256,
        },
    }


def _local_files(recipe: Recipe) -> dict[str, str]:
    """sha256 of every local file (questions, texts) that the recipe names, by file name."""
    files = [path for path in recipe.local_sources[1:] if path.is_file()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def json_text(data: dict[str, Any]) -> str:
    """JSON as bakeout writes it into a folder."""
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def write_manifest(folder: Path, contents: dict[str, Any]) -> None:
    """Write the manifest into a folder, as its last file, and bring it to disk."""
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(json_text(contents))
        file.flush()
        os.fsync(file.fileno())
