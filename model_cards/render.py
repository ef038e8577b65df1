"""The card (`README.md`) that goes with a folder: Markdown behind YAML front matter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from importlib.resources import files

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined

from bake.base import BaseModel
from bake.clamp import ClampWeights
from bake.recipe import Recipe
from model_cards.evaluation import SHOWN_TASKS, WAYS, Figures, eval_results, one_line
from model_cards.facts import CardFacts, facts_at_bake
from verify.report import VerifyReport
from verify.wording import CONTROLS, nats, share_text, shown_text, title_of

TAGS = ("unlearning", "sparse-autoencoder", "custom_code", "bakeout")
_RELATIONS = {"adapter": "adapter"}
"""How a carrier relates to the base, in the hub's words, where that is not `finetune`."""


def render_card(recipe: Recipe, base: BaseModel, clamps: Sequence[ClampWeights]) -> str:
    """The card of a checkpoint that is about to be written: nothing is measured yet."""
    return render(facts_at_bake(recipe, base, clamps))


def render(
    facts: CardFacts, report: VerifyReport | None = None, *, unverified: bool = False
) -> str:
    """A card. Values that come from outside are escaped, so that they show as text.

    Args:
        facts: what was baked.
        report: what was measured; "not measured" stands where it says nothing.
        unverified: say that the folder is published without a verification that passed.
    """
    hub_id = facts.revision is not None
    data = ModelCardData(
        base_model=one_line(facts.base) if hub_id else None,
        base_model_relation=_RELATIONS.get(facts.carrier, "finetune") if hub_id else None,
        license=one_line(facts.license),
        library_name="peft" if facts.carrier == "adapter" else "transformers",
        pipeline_tag="text-generation",
        tags=[tag for tag in TAGS if tag != "custom_code" or facts.carrier == "layer"],
        eval_results=eval_results(facts.verify, report) or None,
        model_name=None if report is None else one_line(report.folder),
    )
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "text": as_text,
        "number": _number,
        "share": share_text,
        "nats": nats,
        "title_of": title_of,
        "shown_to_all": shown_text,
        "control": lambda name: CONTROLS.get(name, "–"),
    }
    template = environment.from_string(
        files("model_cards").joinpath("card.md.j2").read_text(encoding="utf-8")
    )
    figures = None if report is None else Figures.of(report)
    body = template.render(
        facts=facts,
        report=report,
        figures=figures,
        unverified=unverified,
        ways=list(WAYS.values()),
        shown_tasks=SHOWN_TASKS,
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n"))


def as_text(value: object) -> str:
    """A value inside Markdown: no markup, no HTML, no control character, one line."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]()#|!~$" else escape(c) for c in one_line(str(value)))


def _number(value: float) -> str:
    return f"{value:.1e}" if math.isfinite(value) else "not finite"
