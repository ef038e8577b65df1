"""Controls: the hooked model with something else in the clamp's place.

What the unlearning is worth shows beside them: the bare reconstruction is what the SAE itself
costs, zero is ablation, a random decoder direction shows whether it matters what is written, and
other features that fire as often whether it matters which are clamped.
Source: Farrell et al., arXiv 2410.19278.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from bake.files.halving import in_halves
from bake.questions.answers import Answers
from bake.questions.loss import LossSum
from bake.questions.prompts import TEXT, Batch, prompts_of
from bake.recipe import Clamp, PromptForm
from verify.engines.forward import run
from verify.engines.runners import HookedRunner, Runner
from verify.evidence.choices import accuracy
from verify.journal import Journal, Progress
from verify.material import Material
from verify.report.findings import VerifyReport
from verify.report.measures import Control

if TYPE_CHECKING:
    from torch import Tensor

    from verify.reference.oracle import Oracle
    from verify.reference.whole_sae import Site
    from verify.work import Work


RANDOM_FEATURES = "random_features"


def control_oracles(
    model: Any, sites: Sequence[Site], alike: Sequence[Sequence[int]] | None = None
) -> Iterator[tuple[str, Oracle]]:
    """Name and oracle of every control that is another thing than the recipe's own method.

    Args:
        model: the stock base.
        sites: the recipe's clamps.
        alike: per site the features that stand in for its own; without them no such control.
    """
    from verify.reference.oracle import Oracle, reconstruct_residual

    if all(site.reconstructs for site in sites):
        yield "reconstruction", Oracle(model, sites, reconstruct_residual)
    methods = {site.clamp.method for site in sites}
    for method in ("zero", "random_decoder"):
        clamps = [site.clamp.with_method(method) for site in sites]
        if methods != {method} and None not in clamps:
            yield method, Oracle(model, [_with(*pair) for pair in zip(sites, clamps, strict=True)])
    if alike is not None:
        clamps = [
            site.clamp.with_method(site.clamp.method, features=list(features))
            for site, features in zip(sites, alike, strict=True)
        ]
        others = [_with(*pair) for pair in zip(sites, clamps, strict=True)]
        yield RANDOM_FEATURES, Oracle(model, others)


def _with(site: Site, clamp: Clamp | None) -> Site:
    assert clamp is not None
    return replace(site, clamp=clamp)


def features_alike(
    model: Any, sites: Sequence[Site], batches: Sequence[Batch]
) -> list[list[int]] | None:
    """Per site, as many features that are not its own, each above the trigger on about as many
    tokens as one that is.

    Args:
        model: the stock base.
        sites: the recipe's clamps.
        batches: prompts and texts, on whose tokens is counted; padding and BOS are not.

    Returns:
        None where an SAE has too few others.
    """
    import torch

    from verify.reference.oracle import CODE_BYTES, Edited, Oracle

    def counted(batch: Batch, rows: slice) -> dict[int, Tensor]:
        ids, mask = batch.input_ids[rows], batch.attention_mask[rows]
        found: dict[int, Tensor] = {}

        def count(h: Tensor, site: Site, exempt: Tensor) -> Edited:
            at_once = max(1, CODE_BYTES // (8 * site.sae.cfg.d_sae))
            found[site.layer] = torch.zeros(site.sae.cfg.d_sae, dtype=torch.long)
            for tokens in torch.split(h[mask.bool().to(h.device) & ~exempt], at_once):
                fired = site.sae.encode(tokens.double()) > site.clamp.trigger
                found[site.layer] += fired.sum(dim=0).cpu()
            return Edited(h, exempt & False, h.new_zeros(*exempt.shape, len(site.features)).bool())

        with Oracle(model, sites, count).applied():
            run(model, ids, mask)
        return found

    counts = {site.layer: torch.zeros(site.sae.cfg.d_sae, dtype=torch.long) for site in sites}
    for batch in batches:
        shape = batch.input_ids.shape
        for part in in_halves(model, "reading prompts", partial(counted, batch), *shape):
            for layer, n in part.items():
                counts[layer] += n
    found = []
    for site in sites:
        fired, left = counts[site.layer].float(), torch.ones(site.sae.cfg.d_sae, dtype=torch.bool)
        left[list(site.features)] = False
        if site.clamp.refusal_feature is not None:
            left[site.clamp.refusal_feature] = False
        if int(left.sum()) < len(site.features):
            return None
        chosen = []
        for feature in site.features:
            # Of those that fire as often, the nearest by number: a choice that knows nothing else.
            apart = (fired.log1p() - fired[feature].log1p()).abs()
            near = (torch.arange(len(left)) - feature).abs() / len(left)
            other = int((apart + 1e-6 * near).masked_fill(~left, torch.inf).argmin())
            left[other] = False
            chosen.append(other)
        found.append(chosen)
    return found


def all_controls(
    model: Any, sites: Sequence[Site], material: Material, form: PromptForm, journal: Journal
) -> dict[str, Oracle]:
    """Every control by name. Arguments as in `measure_controls`."""
    asked = prompts_of(material.questions, material.tokenizer, [form])
    batches = list(material.batches([*material.windows, *asked]))
    name = f"control features {' '.join(batch.digest for batch in batches)}"
    count = partial(features_alike, model, sites, batches)
    return dict(control_oracles(model, sites, journal.once(name, count)))


def control_runners(model: Any, controls: Mapping[str, Oracle]) -> dict[str, HookedRunner]:
    """Every control as an engine, whose name in a journal tells the features that it edits."""
    return {
        name: HookedRunner(f"{name} {[list(site.features) for site in of.sites]}", model, of)
        for name, of in controls.items()
    }


def measure_controls(
    model: Any,
    controls: Mapping[str, Oracle],
    material: Material,
    form: PromptForm,
    journal: Journal,
    progress: Progress,
) -> tuple[Control, ...]:
    """Questions in one prompt form and texts, through every control.

    Args:
        model: the stock base.
        controls: as `all_controls` gives them.
        material: what to show.
        form: of the questions.
        journal: of what was found before, or empty.
        progress: told how far it is.
    """
    texts = [window for window in material.windows if window.form == TEXT]
    prompts = [*texts, *prompts_of(material.questions, material.tokenizer, [form])]
    runners = {"base": HookedRunner("base", model), **control_runners(model, controls)}
    found: list[Control] = []
    base_loss = 0.0
    for number, (name, runner) in enumerate(runners.items()):
        texts_only = name == "base"
        shown = texts if texts_only else prompts
        answers, losses = Answers(material.letters), LossSum()
        batches = list(material.batches(shown))
        pieces = [
            (f"control {runner.name} {batch.digest}", partial(_see, runner, batch, answers))
            for batch in batches
        ]
        journal.ahead(dict(pieces))
        for batch, (piece, see) in zip(batches, pieces, strict=True):
            seen = journal.once(piece, see)
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
        found.append(Control(name, shares["forget"], shares["retain"], added))
    return tuple(found)


def _see(runner: Runner, batch: Batch, answers: Answers) -> dict[str, Any]:
    seen = runner.read(batch.input_ids, batch.attention_mask, batch.ends, batch.scored)
    losses = [] if batch.of_choices else seen.losses.tolist()
    return {"answers": answers.found(batch, seen.logits, seen.losses), "losses": losses}


def gather(work: Work, report: VerifyReport) -> VerifyReport:
    """Add what the controls do."""
    hooked = work.hooked
    found = measure_controls(
        *(hooked.model, work.controls, hooked.material, work.form),
        *(work.journal.shared, work.progress),
    )
    return replace(report, controls=found)
