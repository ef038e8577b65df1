"""Clamp weights → files that anyone can load.

`export.to_onnx(folder)`, `export.to_compiled(folder, out)`, `export.to_adapter(folder, out)`,
`export.Manifest`, `export.CARRIERS`, `export.PRECISIONS`.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "to_onnx": "bakeout.api",
    "to_compiled": "bakeout.api",
    "to_adapter": "bakeout.api",
    "Manifest": "export.manifest",
    "CARRIERS": "export.carriers.carriers",
    "PRECISIONS": "export.carriers.onnx.precisions",
}
__all__ = list(_HOMES)


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: importing the package costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
