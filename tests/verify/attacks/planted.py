"""Folders with a forgetting that is known to be weak, and one that never knew: of the miniature."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from bake.recipe import Recipe
from bake.stock import decoder_layers
from bakeout.verbs.demo import MINIATURE
from verify.audit.subject import open_subject
from verify.audit.target import Target

N_PARTS = 3


def miniature() -> Any:
    """The shipped base."""
    folder = MINIATURE / "model"
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def overwritten() -> Any:
    """The last layer writes noise over what stood there, which all earlier ones still hold."""
    model = miniature()
    last = decoder_layers(model)[-1]
    draw = torch.Generator().manual_seed(0)
    last.mlp.down_proj.weight.data = torch.randn(last.mlp.down_proj.weight.shape, generator=draw)
    last.post_feedforward_layernorm.weight.data += 30
    return model


def never_taught() -> Any:
    """The same shape, untrained."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(miniature().config).eval()


def aimed_at(model: Any, folder: Path) -> Target:
    """A model as somebody's folder, under the miniature's recipe."""
    model.save_pretrained(folder)
    return Target(open_subject(folder, Recipe.load(MINIATURE / "recipe.toml")), N_PARTS)
