"""Renders a folder's card from what was baked into it."""

from __future__ import annotations

from html import escape
from importlib.resources import files

from huggingface_hub import ModelCardData
from jinja2 import Environment, StrictUndefined

from bake.base import BaseModel
from bake.clamp import ClampWeights, parameters, sae_name
from bake.recipe import Recipe


def render_card(recipe: Recipe, base: BaseModel, clamps: list[ClampWeights]) -> str:
    """The card of a clamped checkpoint: Markdown behind YAML front matter.

    Names that come from outside are escaped, so that they show as text.
    """
    hub_id = base.revision is not None
    data = ModelCardData(
        license=recipe.base.license,
        library_name="transformers",
        base_model=base.name if hub_id else None,
        pipeline_tag="text-generation",
        tags=["unlearning", "sparse-autoencoder", "bakeout"],
    )
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["text"] = _as_text
    template = environment.from_string(
        files("model_cards").joinpath("card.md.j2").read_text(encoding="utf-8")
    )
    rows = [
        {
            "layer": clamp.layer,
            "hook_point": clamp.hook_point,
            "method": clamp.clamp.method,
            "parameters": ", ".join(f"{k} {v}" for k, v in parameters(clamp.clamp).items()),
            "features": ", ".join(map(str, clamp.rows.features)),
            "sae": sae_name(clamp.clamp),
        }
        for clamp in clamps
    ]
    body = template.render(
        base=base.name, revision=base.revision, clamps=rows, gemma=recipe.base.license == "gemma"
    )
    return f"---\n{data.to_yaml()}\n---\n\n{body}\n"


def _as_text(value: object) -> str:
    """A value inside Markdown: no markup, no HTML, one line."""
    line = " ".join(str(value).split())
    return "".join(
        f"\\{c}" if c in "\\`*_{}[]()#|!" else escape(c) for c in line if c.isprintable()
    )
