"""Recipe → clamp weights: what to forget, and the few tensors that make a Gemma forget it."""

from bake.base import BaseModel, find_base
from bake.clamp import ClampWeights, load_clamps
from bake.errors import BakeoutError
from bake.recipe import Recipe

__all__ = ["BakeoutError", "BaseModel", "ClampWeights", "Recipe", "find_base", "load_clamps"]
