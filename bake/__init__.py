"""Recipe → clamp weights: what to forget, and the few tensors that make a Gemma forget it.

`bake.Recipe`, `bake.bake(recipe, out)`, `bake.METHODS`, `bake.FAMILIES`, `bake.BakeoutError`.
"""

from bake.public import public

_HOMES = {
    "bake": "bakeout.api",
    "Recipe": "bake.recipe",
    "METHODS": "bake.methods",
    "FAMILIES": "bake.families",
    "BakeoutError": "bake.errors",
}
__all__, __dir__, __getattr__ = public(__name__, _HOMES)
