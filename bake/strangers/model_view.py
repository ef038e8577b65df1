"""A model's folder as transformers is shown it: config and safetensors, nothing beside them.

Whatever else lies there (code, pickles, adapters, settings of generation) is not found by a library
that looks for it, in this version or a later one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bake.files.scratch import Scratch

_MODEL = ("config.json", "*.safetensors", "*.safetensors.index.json")
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


def show_model(folder: Path, into: Path) -> Path:
    """Link what transformers may see of a folder into another, which is made and given back."""
    return _show(folder, into, _MODEL)


def show_adapter(folder: Path, into: Path) -> Path:
    """Link what peft may see of a folder into another, which is made and given back."""
    return _show(folder, into, _ADAPTER)


def _show(folder: Path, into: Path, patterns: tuple[str, ...]) -> Path:
    into.mkdir()
    for pattern in patterns:
        for path in folder.glob(pattern):
            if path.is_file():
                (into / path.name).symlink_to(path.resolve())
    return into


@contextmanager
def shown_model(folder: Path) -> Iterator[Path]:
    """`show_model` into a folder that is gone afterwards; what was mapped into memory stays."""
    with Scratch("model") as scratch:
        yield show_model(folder, scratch / "model")
