"""What a verification measures: everything is loaded, shown the prompts, and each kind of evidence
adds what it finds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.base import INDEX
from bake.questions.multiple_choice import load_texts
from bake.questions.prompts import TEXT_TOKENS, Batch, text_prompts
from bake.recipe import Recipe
from export.carriers.carriers import CARRIERS
from verify.compare.comparing import compare
from verify.compare.comparison import REFERENCE, Comparison
from verify.compare.feature_trial import trial_failures
from verify.compare.firing import FeatureWatch, FiredExamples, fired_on
from verify.compare.upcast import compare_in_float32
from verify.engines.engines import Engines, Room
from verify.engines.heap import give_back
from verify.engines.runners import HookedRunner, Runner
from verify.evidence.completions import open_prompts
from verify.evidence.kinds import KINDS, shown_for
from verify.evidence.tasks.harness import check_harness, measure_harness
from verify.expected.own_files import as_damaged
from verify.hooked import Hooked, load_hooked, units_of
from verify.journal import Journal, Progress
from verify.material import evenly
from verify.options import Options
from verify.pace import (
    LOOKED_AT,
    OPEN_TOKENS,
    QUESTION_TOKENS,
    Amounts,
    Pace,
    parts_within,
    tokens_per_second,
)
from verify.report.findings import EngineReport, VerifyReport
from verify.report.measures import Items
from verify.work import Work

if TYPE_CHECKING:
    from verify.compare.sensitivity import Sensitivity
    from verify.reference.oracle import Oracle
    from verify.reference.whole_sae import Site


def gather(
    folder: Path,
    recipe: Recipe,
    report: VerifyReport,
    kinds: frozenset[str],
    progress: Progress,
    engines: Engines,
    journal: Journal,
    options: Options,
    sites: Sequence[Site] | None = None,
) -> VerifyReport:
    """Run base, reference and the folder's engines, and add to a report what they show.

    Args:
        folder: what bakeout wrote.
        recipe: what to rebuild the reference from, with features named.
        report: what was found in the folder's files.
        kinds: of evidence.
        progress: told how far it is.
        engines: of the folder; the checkpoint's code is executed in a process of its own.
        journal: of a run of the same that was interrupted, or empty.
        options: how it is run.
        sites: of the recipe, where they are loaded already.

    Raises:
        BakeoutError: anything that is named cannot be loaded or does not fit.
    """
    assert recipe.verify is not None
    for name, kind in KINDS.items():
        if name in kinds:
            kind.check(recipe)
    if options.tasks:
        check_harness(options.tasks, options.evals)
    hooked = load_hooked(folder, recipe, engines, progress, sites)
    hooked, progress = _paced(hooked, recipe, kinds, engines, journal, progress, options)
    shown, form = shown_for(kinds), recipe.verify.prompt
    asks = "questions" in shown
    here: list[HookedRunner] = [hooked.base] if any(KINDS[name].with_base for name in kinds) else []
    here += hooked.references
    prompts = hooked.material.prompts(shown, compared="parity" in kinds)
    sensitivities: dict[str, Sensitivity] = {}
    if "texts" in shown:
        progress("rounding", 0.0)
        units = units_of(folder, engines, hooked)
        sensitivities = hooked.sensitivities(units, engines, prompts, journal)
    in_float32 = None
    if "parity" in kinds and hooked.dtype != "float32" and CARRIERS[engines.carrier].strips:
        in_float32 = compare_in_float32(recipe, hooked, engines, prompts, journal)
    with ExitStack() as stack:
        with _half_the_threads() as threads:
            room, elsewhere = engines.in_turn(recipe, hooked.dtype, threads, hooked.weight)
            stack.callback(room.empty)
            comparison = Comparison(
                hooked.material,
                prompts,
                tuple(runner.name for runner in (*here, *elsewhere)),
                "parity" in kinds,
                hooked.against(engines),
                FiredExamples(form),
                FeatureWatch({site.layer: site.features for site in hooked.sites}),
                sensitivities,
            )
            compare(here, elsewhere, hooked.oracles, comparison, journal, progress, options.cache)
            give_back()  # what its threads' heaps keep
            if asks and recipe.select is not None and any(comparison.watch.never_active()):
                _watch_corpus(recipe, comparison, hooked.oracles[REFERENCE], journal)
            work = Work(
                *(recipe, kinds, hooked, comparison, in_float32, elsewhere),
                *(options, journal, progress),
                partial(_otherwise, engines, room, recipe, threads),
            )
            if "known" in kinds:
                work.known  # noqa: B018  beside the engine, which has the other threads
        report = _with_firings(report, work, asks=asks)
        carrier = CARRIERS[engines.carrier]
        compiled = not (carrier.strips or carrier.trained) and (folder / INDEX).is_file()
        if "parity" in kinds and compiled:
            with as_damaged(folder):
                tried = tuple(trial_failures(folder, recipe, hooked))
            report = replace(report, failures=(*report.failures, *tried))
        for name, kind in KINDS.items():
            if name in kinds and kind.gather is not None:
                report = kind.gather(work, report)
        if options.tasks:
            everyone = [hooked.base, *hooked.references, *elsewhere]
            scores = measure_harness(
                everyone, options.tasks, hooked.material, options.evals, journal, progress
            )
            report = replace(
                report,
                engines=tuple(
                    replace(of, harness=scores.get(of.name, ())) for of in report.engines
                ),
            )
    return report


def _paced(
    hooked: Hooked,
    recipe: Recipe,
    kinds: frozenset[str],
    engines: Engines,
    journal: Journal,
    progress: Progress,
    options: Options,
) -> tuple[Hooked, Pace]:
    """As much of the material as the budget has time for, and progress over all that is to do."""
    passes, minutes = passes_of(hooked, recipe, kinds, engines), options.minutes
    if minutes is not None:
        batches = list(hooked.material.batches(hooked.material.windows))

        def choose() -> int:
            rate = tokens_per_second(hooked.base, batches)
            return parts_within(minutes, sum(passes.values()), rate)

        hooked = replace(hooked, material=hooked.material.part(int(journal.once("parts", choose))))
        passes = passes_of(hooked, recipe, kinds, engines)
    return hooked, Pace(progress, passes)


def passes_of(
    hooked: Hooked, recipe: Recipe, kinds: frozenset[str], engines: Engines
) -> dict[str, float]:
    """Per stage, about how many token passes it takes."""
    material, shown = hooked.material, shown_for(kinds)
    prompts = material.prompts(shown, compared="parity" in kinds)
    n_shown = sum(len(prompt.ids) for prompt in prompts)
    n_questions = sum(map(len, material.questions.values()))
    rows = open_prompts(recipe).values() if "completions" in kinds else ()
    n_open = sum(len(evenly(of, material.one_in)) for of in rows)
    n_engines = len(hooked.oracles) + 1 + len(engines.graphs) + (engines.torch is not None)
    amounts = Amounts(n_shown, QUESTION_TOKENS * n_questions, OPEN_TOKENS * n_open, n_engines)
    passes = {"rounding": LOOKED_AT * n_shown if "parity" in kinds else 0.0}
    passes["compare"] = float(n_shown * n_engines)
    for name, kind in KINDS.items():
        if name in kinds and kind.passes is not None:
            passes[name] = kind.passes(amounts)
    return passes


def _with_firings(report: VerifyReport, work: Work, *, asks: bool) -> VerifyReport:
    """What was shown to whom, and where the clamps fired."""
    comparison, material = work.comparison, work.hooked.material
    witnessed = {engine.name: engine.witnessed for engine in report.engines}
    silent = comparison.watch.never_active() if asks else ()
    return replace(
        report,
        engines=tuple(
            EngineReport(name, witnessed=witnessed.get(name)) for name in comparison.names
        ),
        dtype=work.hooked.dtype,
        prompt=work.form,
        items=Items(
            forget_questions=len(material.questions["forget"]) if asks else 0,
            retain_questions=len(material.questions["retain"]) if asks else 0,
            text_tokens=comparison.losses[REFERENCE].n_tokens,
            one_in=material.one_in,
        ),
        fired_by_layer=tuple(sorted(comparison.fired_by_layer.items())),
        warnings=(
            *_sampled(material.one_in, work.options.minutes),
            *_silent_features(silent, corpus=work.recipe.select is not None),
        ),
        examples=comparison.examples.result(material.tokenizer),
    )


def _sampled(one_in: int, minutes: float | None) -> list[str]:
    """That not everything was asked."""
    if one_in == 1:
        return []
    return [
        f"a budget of {minutes:g} minutes: of the recipe's questions, texts and prompts, one in "
        f"{one_in} was asked"
    ]


def _silent_features(never_active: Iterable[tuple[int, int]], *, corpus: bool) -> tuple[str, ...]:
    """One line for each layer; `corpus`: the forget corpus was looked at too."""
    by_layer: dict[int, list[str]] = {}
    for layer, feature in never_active:
        by_layer.setdefault(layer, []).append(str(feature))
    also = f", nor in the first {TEXT_TOKENS:,} tokens of the forget corpus" if corpus else ""
    return tuple(
        f"layer {layer}: never active on the forget questions{also}: feature {', '.join(features)}"
        for layer, features in by_layer.items()
    )


@contextmanager
def _otherwise(
    engines: Engines, room: Room, recipe: Recipe, threads: int, dtype: str, bits: int | None
) -> Iterator[Runner]:
    """The folder in torch, loaded in another way than that in which it is compared."""
    room.empty()
    with engines.loaded(recipe, dtype, threads, bits) as runner:
        yield runner


@contextmanager
def _half_the_threads() -> Iterator[int]:
    """Two processes compute at the same time: torch here gets half of its threads."""
    import torch

    before = torch.get_num_threads()
    half = max(1, before // 2)
    torch.set_num_threads(half)
    try:
        yield half
    finally:
        torch.set_num_threads(before)


def _watch_corpus(recipe: Recipe, comparison: Comparison, oracle: Oracle, journal: Journal) -> None:
    """Look for features that are active in the forget corpus only. Changes `comparison`."""
    assert recipe.select is not None
    material = comparison.material
    texts = text_prompts(load_texts(recipe.select.forget, recipe), material.tokenizer)
    reference = HookedRunner(REFERENCE, oracle.model, oracle)

    def see(batch: Batch) -> Any:
        reference.logits(batch.input_ids, batch.attention_mask)
        return fired_on(oracle, batch)["active"]

    batches = list(material.batches([replace(p, source="forget") for p in texts]))
    pieces = [(f"forget corpus {batch.digest}", partial(see, batch)) for batch in batches]
    journal.shared.ahead(dict(pieces))
    for batch, piece in zip(batches, pieces, strict=True):
        comparison.watch.add(batch.prompts, journal.shared.once(*piece))
