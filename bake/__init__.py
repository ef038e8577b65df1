"""Recipe → clamp weights: what to forget, and the few tensors that make a Gemma forget it.

`bake.Recipe`, `bake.bake(recipe, out)`, `bake.METHODS`, `bake.FAMILIES`, `bake.BakeoutError`.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "bake": "bakeout.api",
    "Recipe": "bake.recipe",
    "METHODS": "bake.methods",
    "FAMILIES": "bake.families",
    "BakeoutError": "bake.errors",
}
__all__ = list(_HOMES)


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: importing the package costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
