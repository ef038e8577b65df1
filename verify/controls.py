"""Controls: the hooked model with something else in the clamp's place.

What the unlearning is worth shows beside them: the bare reconstruction is what the SAE itself
costs, zero is ablation, and a random decoder direction shows whether it matters what is written.
Source: Farrell et al., arXiv 2410.19278.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from bake.recipe import Clamp
from verify.choice_metrics import accuracy
from verify.choices import Answers
from verify.journal import Journal, Progress
from verify.loss import LossSum
from verify.material import Material
from verify.measures import Control
from verify.prompts import Batch, question_prompts
from verify.reference import Oracle, reconstruct_residual
from verify.runners import HookedRunner, Runner
from verify.whole_sae import Site


def control_oracles(model: Any, sites: Sequence[Site]) -> Iterator[tuple[str, Oracle]]:
    """Name and oracle of every control that is another thing than the recipe's own method."""
    yield "reconstruction", Oracle(model, sites, reconstruct_residual)
    methods = {site.clamp.method for site in sites}
    if methods != {"zero"}:
        yield "zero", Oracle(model, [_with(site, "zero") for site in sites])
    if methods != {"random_decoder"} and all(site.clamp.value is not None for site in sites):
        yield "random_decoder", Oracle(model, [_with(site, "random_decoder") for site in sites])


def _with(site: Site, method: str) -> Site:
    """The same features and trigger with another method."""
    clamp = site.clamp
    table = {
        "sae": clamp.sae,
        "method": method,
        "features": clamp.features,
        "trigger": clamp.trigger,
        "exempt_bos": clamp.exempt_bos,
    }
    if method == "random_decoder":
        table["value"] = clamp.value
    return replace(site, clamp=Clamp.model_validate(table))


def measure_controls(
    model: Any,
    sites: Sequence[Site],
    material: Material,
    form: str,
    journal: Journal,
    progress: Progress,
) -> tuple[Control, ...]:
    """Questions in one prompt form and texts, through every control.

    Args:
        model: the stock base.
        sites: the recipe's clamps.
        material: what to show.
        form: chat | plain.
        journal: of a run that was interrupted, or empty.
        progress: told how far it is.
    """
    prompts = list(material.windows)
    for source, questions in material.questions.items():
        asked = question_prompts(source, questions, material.tokenizer, compared=False)
        prompts += [prompt for prompt in asked if prompt.form == form]
    runners: list[Runner] = [HookedRunner("base", model)]
    runners += [HookedRunner(name, model, oracle) for name, oracle in control_oracles(model, sites)]
    found = []
    base_loss = 0.0
    for number, runner in enumerate(runners):
        texts_only = runner.name == "base"
        shown = list(material.windows) if texts_only else prompts
        answers, losses = Answers(material.letters), LossSum()
        for index, batch in enumerate(material.batches(shown)):
            see = partial(_see, runner, batch, answers)
            seen = journal.once(f"control {runner.name} {index}", see)
            answers.take(batch, seen["answers"])
            losses.losses += seen["losses"]
        progress("controls", (number + 1) / len(runners))
        if texts_only:
            base_loss = losses.mean
            continue
        shares = {
            source: accuracy(questions, answers.chosen(source, form, len(questions)))
            for source, questions in material.questions.items()
        }
        added = losses.mean - base_loss
        found.append(Control(runner.name, shares["forget"], shares["retain"], added))
    return tuple(found)


def _see(runner: Runner, batch: Batch, answers: Answers) -> dict[str, Any]:
    logits = runner.logits(batch.input_ids, batch.attention_mask, batch.last_only)
    return {"answers": answers.found(batch, logits), "losses": LossSum.found(batch, logits)}
