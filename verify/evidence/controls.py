"""Controls: the hooked model with something else in the clamp's place.

What the unlearning is worth shows beside them: the bare reconstruction is what the SAE itself
costs, zero is ablation, and a random decoder direction shows whether it matters what is written.
Source: Farrell et al., arXiv 2410.19278.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from bake.questions.answers import Answers
from bake.questions.loss import LossSum
from bake.questions.prompts import TEXT, Batch, question_prompts
from bake.recipe import Clamp, PromptForm
from verify.engines.runners import HookedRunner, Runner
from verify.evidence.choices import accuracy
from verify.journal import Journal, Progress
from verify.material import Material
from verify.report.findings import VerifyReport
from verify.report.measures import Control
from verify.work import Work

if TYPE_CHECKING:
    from verify.reference.oracle import Oracle
    from verify.reference.whole_sae import Site


def control_oracles(model: Any, sites: Sequence[Site]) -> Iterator[tuple[str, Oracle]]:
    """Name and oracle of every control that is another thing than the recipe's own method."""
    from verify.reference.oracle import Oracle, reconstruct_residual

    if all(site.reconstructs for site in sites):
        yield "reconstruction", Oracle(model, sites, reconstruct_residual)
    methods = {site.clamp.method for site in sites}
    for method in ("zero", "random_decoder"):
        clamps = [site.clamp.with_method(method) for site in sites]
        if methods != {method} and None not in clamps:
            yield method, Oracle(model, [_with(*pair) for pair in zip(sites, clamps, strict=True)])


def _with(site: Site, clamp: Clamp | None) -> Site:
    assert clamp is not None
    return replace(site, clamp=clamp)


def measure_controls(
    model: Any,
    sites: Sequence[Site],
    material: Material,
    form: PromptForm,
    journal: Journal,
    progress: Progress,
) -> tuple[Control, ...]:
    """Questions in one prompt form and texts, through every control.

    Args:
        model: the stock base.
        sites: the recipe's clamps.
        material: what to show.
        form: of the questions.
        journal: of a run that was interrupted, or empty.
        progress: told how far it is.
    """
    texts = [window for window in material.windows if window.form == TEXT]
    prompts = list(texts)
    for source, questions in material.questions.items():
        prompts += question_prompts(
            source, questions, material.tokenizer, compared=False, forms=[form]
        )
    runners: list[Runner] = [HookedRunner("base", model)]
    runners += [HookedRunner(name, model, oracle) for name, oracle in control_oracles(model, sites)]
    found = []
    base_loss = 0.0
    for number, runner in enumerate(runners):
        texts_only = runner.name == "base"
        shown = texts if texts_only else prompts
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
    seen = runner.read(batch.input_ids, batch.attention_mask, batch.ends, batch.scored)
    losses = [] if batch.of_choices else seen.losses.tolist()
    return {"answers": answers.found(batch, seen.logits, seen.losses), "losses": losses}


def gather(work: Work, report: VerifyReport) -> VerifyReport:
    """Add what the controls do."""
    hooked = work.hooked
    found = measure_controls(
        hooked.model, hooked.sites, hooked.material, work.form, work.journal, work.progress
    )
    return replace(report, controls=found)
