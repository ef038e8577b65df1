"""Renders a folder's card from what was baked into it."""

from __future__ import annotations

from html import escape
from importlib.resources import files
from typing import Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, FunctionLoader, StrictUndefined

from bake.base import BaseModel
from bake.clamp import ClampWeights, parameters, sae_name
from bake.recipe import Recipe


def render_card(recipe: Recipe, base: BaseModel, clamps: list[ClampWeights]) -> str:
    """The card of a clamped checkpoint: Markdown behind YAML front matter.

    Names that come from outside are escaped, so that they show as text.
    """
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
    return _render(
        "card",
        "transformers",
        recipe.base.license,
        base=base.name,
        revision=base.revision,
        clamps=rows,
    )


def render_export_card(manifest: dict[str, Any], carrier: str, license_id: str) -> str:
    """The card of what was exported from a clamped checkpoint.

    Args:
        manifest: the checkpoint's, with what the export adds to it.
        carrier: compiled | adapter.
        license_id: as the recipe states it.
    """
    rows = [
        {
            **{key: clamp[key] for key in ("layer", "hook_point", "method")},
            "parameters": ", ".join(f"{k} {v}" for k, v in clamp["parameters"].items()),
            "features": ", ".join(map(str, clamp["features"])),
            "sae": clamp["sae"]["name"],
        }
        for clamp in manifest["clamps"]
    ]
    return _render(
        carrier,
        "peft" if carrier == "adapter" else "transformers",
        license_id,
        base=manifest["base"]["model"],
        revision=manifest["base"]["revision"],
        clamps=rows,
        **{key: manifest[key] for key in ("compiled",) if key in manifest},
    )


def _render(
    template: str, library: str, license_id: str, *, base: str, revision: str | None, **more: Any
) -> str:
    data = ModelCardData(
        license=license_id,
        library_name=library,
        base_model=None if revision is None else base,
        pipeline_tag="text-generation",
        tags=["unlearning", "sparse-autoencoder", "bakeout"],
    )
    environment = Environment(
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(_source),
    )
    environment.filters["text"] = _as_text
    body = environment.get_template(template).render(
        base=base, revision=revision, gemma=license_id == "gemma", **more
    )
    return f"---\n{data.to_yaml()}\n---\n\n{body}\n"


def _source(name: str) -> str:
    return files("model_cards").joinpath(f"{name}.md.j2").read_text(encoding="utf-8")


def _as_text(value: object) -> str:
    """A value inside Markdown: no markup, no HTML, one line."""
    line = " ".join(str(value).split())
    return "".join(
        f"\\{c}" if c in "\\`*_{}[]()#|!" else escape(c) for c in line if c.isprintable()
    )
