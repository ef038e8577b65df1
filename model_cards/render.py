"""The card (`README.md`) that goes with a folder: Markdown behind YAML front matter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from huggingface_hub import ModelCard, ModelCardData

from bake.base import BaseModel
from bake.clamp import ClampWeights
from bake.recipe import Recipe
from bake.rounding import BAR
from bake.sae.fit_figures import Fit
from export.carriers.carriers import CARRIERS
from model_cards.evaluation import SHOWN_TASKS, WAYS, Figures, eval_results, one_line
from model_cards.facts import CardFacts, facts_at_bake
from verify.audit.audit_words import lines_of_audit, relearned, sentences
from verify.audit.levels import tried
from verify.audit.outcome import FolderAudit
from verify.evidence.kinds import other_lines
from verify.page.html import environment
from verify.report.findings import VerifyReport
from verify.report.wording import CONTROLS, nats, share_text, shown_text, title_of

UNKNOWN = "How these files carry the clamp ({{ facts.carrier|text }}) is not known here.\n"
TAGS = ("unlearning", "sparse-autoencoder", "custom_code", "bakeout")


def render_card(
    recipe: Recipe,
    base: BaseModel,
    clamps: Sequence[ClampWeights],
    fits: Mapping[int, Fit] | None = None,
) -> str:
    """The card of a checkpoint that is about to be written: nothing is measured yet but how its
    SAEs fit, by layer.
    """
    return render(facts_at_bake(recipe, base, clamps, fits or {}))


def render(
    facts: CardFacts,
    report: VerifyReport | None = None,
    *,
    audited: tuple[FolderAudit, str] | None = None,
    unverified: bool = False,
) -> str:
    """A card. Values that come from outside are escaped, so that they show as text.

    Args:
        facts: what was baked.
        report: what was measured; "not measured" stands where it says nothing.
        audited: what came back of it, and how much was tried.
        unverified: say that the folder is published without a verification that passed.
    """
    hub_id = facts.revision is not None
    carrier = CARRIERS.get(facts.carrier)
    over_base = carrier is not None and carrier.over_base
    own_code = carrier is not None and carrier.own_code
    data = ModelCardData(
        base_model=one_line(facts.base) if hub_id else None,
        base_model_relation=("adapter" if over_base else "finetune") if hub_id else None,
        license=one_line(facts.license),
        library_name="peft" if over_base else "transformers",
        pipeline_tag="text-generation",
        tags=[tag for tag in TAGS if tag != "custom_code" or (own_code and facts.exact)],
        eval_results=eval_results(facts.verify, report) or None,
        model_name=None if report is None else one_line(report.folder),
    )
    made = environment("model_cards", autoescape=False)
    made.filters |= {
        "text": as_text,
        "number": _number,
        "share": share_text,
        "nats": nats,
        "title_of": title_of,
        "shown_to_all": shown_text,
        "control": lambda name: CONTROLS.get(name, "–"),
        "sentences": lambda audit: (*relearned(audit), *sentences(audit)),
        "lines": lines_of_audit,
    }
    template = made.get_template("card.md.j2")
    figures = None if report is None else Figures.from_report(report)
    body = template.render(
        facts=facts,
        carrier=carrier,
        what=made.from_string(carrier.card if carrier else UNKNOWN).render(facts=facts),
        loading=made.from_string(carrier.loading if carrier else "").render(facts=facts),
        report=report,
        figures=figures,
        audit=None if audited is None else audited[0],
        tried="" if audited is None else tried(audited[1]),
        unverified=unverified,
        others=() if report is None else other_lines(report),
        ways=list(WAYS.values()),
        shown_tasks=SHOWN_TASKS,
        bar=BAR,
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}"))


def as_text(value: object) -> str:
    """A value inside Markdown: no markup, no HTML, no control character, one line."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]()#|!~$" else escape(c) for c in one_line(str(value)))


def _number(value: float) -> str:
    return f"{value:.1e}" if math.isfinite(value) else "not finite"
