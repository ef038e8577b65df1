"""What is gathered about a folder: its engines side by side, and what the forgetting is worth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.recipe import Recipe
from verify.clamped_folder import check_layers, check_shape, read_config
from verify.comparison import BASE, REFERENCE, Comparison, compare
from verify.engines import Engines
from verify.firing import FeatureWatch, FiredExamples, fired_on
from verify.forgetting import REFERENCE_32, Forgetting, Hooked
from verify.harness import check_harness, measure_harness
from verify.journal import Journal, Progress
from verify.kinds import ASKING, READING, Options
from verify.material import check_sources, load_material
from verify.measures import Completions, Control, HarnessScore, KnownSet, Robustness
from verify.prompts import Batch, text_prompts
from verify.questions import load_texts
from verify.report import EngineReport, FiredText, Items, Rounding
from verify.runners import DecodingRunner, HookedRunner, Runner
from verify.tolerances import unit_of
from verify.upcast import compare_in_float32

if TYPE_CHECKING:
    from verify.reference import Oracle
    from verify.sensitivity import Sensitivity

REFERENCES = (BASE, REFERENCE, REFERENCE_32)
"""Engines that are no part of a folder."""


@dataclass(frozen=True)
class Evidence:
    """What was found."""

    engines: tuple[EngineReport, ...]
    """base, where it was asked for; reference; then the others."""
    fired_by_layer: tuple[tuple[int, int], ...]
    """(layer, tokens on which its clamp fired)."""
    never_active: tuple[tuple[int, int], ...]
    """(layer, feature) of every feature that was active nowhere in the forget questions, nor in
    the forget corpus where the recipe names one."""
    dtype: str
    """float32, bfloat16 or float16."""
    items: Items
    examples: tuple[FiredText, ...]
    """Of every source, the sequences on which the clamp fired most."""
    known: tuple[KnownSet, ...]
    controls: tuple[Control, ...]
    completions: Completions | None
    robustness: Robustness | None


def gather(
    folder: Path,
    recipe: Recipe,
    kinds: frozenset[str],
    progress: Progress,
    engines: Engines,
    journal: Journal,
    options: Options,
) -> Evidence:
    """Run base, reference and the folder's engines.

    Args:
        folder: what bakeout wrote.
        recipe: what to rebuild the reference from, with features named.
        kinds: of evidence.
        progress: told how far it is.
        engines: of the folder; the checkpoint's code is executed in a process of its own.
        journal: of a run of the same that was interrupted, or empty.
        options: how it is run.

    Raises:
        BakeoutError: anything that is named cannot be loaded or does not fit.
    """
    assert recipe.verify is not None
    check_sources(recipe, kinds)
    if options.tasks:
        check_harness(options.tasks, options.evals)
    hooked = _hooked(folder, recipe, engines, progress)
    asks, form = bool(kinds & ASKING), recipe.verify.prompt
    here: list[Runner] = [hooked.base] if kinds & {"choices", "loss"} else []
    here += hooked.references
    prompts = hooked.material.prompts(kinds)
    sensitivities: dict[str, Sensitivity] = {}
    if kinds & READING:
        progress("rounding", 0.0)
        units = _units(folder, engines, hooked)
        sensitivities = hooked.sensitivities(units, engines, prompts, journal)
    in_float32 = None
    if "parity" in kinds and hooked.dtype != "float32" and engines.carrier != "compiled":
        in_float32 = compare_in_float32(recipe, hooked, engines, prompts, journal)
    with ExitStack() as stack:
        with _half_the_threads() as threads:
            elsewhere = _opened(recipe, engines, hooked.dtype, threads, stack)
            progress("load", 1.0)
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
            compare(here, elsewhere, hooked.oracles, comparison, journal, progress)
            if asks and recipe.select is not None and any(comparison.watch.never_active()):
                _watch_corpus(recipe, comparison, hooked.oracles[REFERENCE], journal)
            forgetting = Forgetting(recipe, hooked, elsewhere[0], journal, progress)
            known, rows = forgetting.known(options.cache) if "known" in kinds else ((), {})
        reports = tuple(
            _with_float32(report, in_float32) if report.name == elsewhere[0].name else report
            for report in comparison.reports(kinds, form, rows)
        )
        scores: Mapping[str, tuple[HarnessScore, ...]] = {}
        if options.tasks:
            everyone = [hooked.base, *hooked.references, *elsewhere]
            scores = measure_harness(
                everyone, options.tasks, hooked.material, options.evals, journal, progress
            )
        return Evidence(
            engines=tuple(replace(of, harness=scores.get(of.name, ())) for of in reports),
            fired_by_layer=tuple(sorted(comparison.fired_by_layer.items())),
            never_active=tuple(comparison.watch.never_active()) if asks else (),
            dtype=hooked.dtype,
            items=Items(
                forget_questions=len(hooked.material.questions["forget"]) if asks else 0,
                retain_questions=len(hooked.material.questions["retain"]) if asks else 0,
                text_tokens=comparison.losses[REFERENCE].n_tokens,
            ),
            examples=comparison.examples.result(hooked.material.tokenizer),
            known=known,
            controls=forgetting.controls() if "controls" in kinds else (),
            completions=forgetting.completions() if "completions" in kinds else None,
            robustness=forgetting.robustness(options.budget, reports)
            if "robustness" in kinds
            else None,
        )


def _hooked(folder: Path, recipe: Recipe, engines: Engines, progress: Progress) -> Hooked:
    """Load the stock base and the whole SAEs, and check that the folder is of their shape."""
    from verify.reference import Oracle
    from verify.stock import load_base, load_tokenizer
    from verify.whole_sae import load_sites

    config = read_config(folder, engines.carrier)
    progress("load", 0.0)
    sites = load_sites(recipe)
    check_layers([site.layer for site in sites], folder, config)
    material = load_material(recipe, load_tokenizer(recipe))
    progress("load", 0.4)
    model = load_base(recipe, engines.device)
    check_shape(model.config, folder, config)
    progress("load", 0.7)
    oracles = {REFERENCE: Oracle(model, sites)}
    if engines.graphs and str(model.dtype) != "torch.float32":
        model_32 = load_base(recipe, engines.device, dtype="float32")
        oracles[REFERENCE_32] = Oracle(model_32, sites)
    return Hooked(model, sites, oracles, material)


def _units(folder: Path, engines: Engines, hooked: Hooked) -> dict[str, float]:
    """Per engine of the folder, the relative size of one rounding."""
    stored = None
    if engines.carrier == "compiled":  # 16-bit weights stay so, whatever they are run in
        stored = read_config(folder, engines.carrier).get("dtype")
    against, found = hooked.against(engines), {}
    names = [*([engines.torch.name] if engines.torch else []), *(g.name for g in engines.graphs)]
    for name in names:
        dtype = str(hooked.oracles[against.get(name, REFERENCE)].model.dtype)
        dtype = dtype.removeprefix("torch.")
        found[name] = unit_of(name, stored if dtype == "float32" and stored else dtype)
    return found


def _with_float32(report: EngineReport, found: Rounding | None) -> EngineReport:
    """An engine's report with what it showed in float32, too."""
    if report.parity is None or found is None:
        return report
    return replace(report, parity=replace(report.parity, float32=found))


def _opened(
    recipe: Recipe, engines: Engines, dtype: str, threads: int, stack: ExitStack
) -> list[DecodingRunner]:
    """The folder's own engines, loaded."""
    opened: list[DecodingRunner] = []
    if engines.torch is not None:
        engines.load_torch(recipe, dtype, threads)
        opened.append(engines.torch)
    for graph in engines.graphs:
        opened.append(stack.enter_context(engines.open(graph, threads=threads)))
    return opened


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
        reference.logits(batch.input_ids, batch.attention_mask, last_only=True)
        return fired_on(oracle, batch)["active"]

    for number, batch in enumerate(material.batches([replace(p, source="forget") for p in texts])):
        found = journal.once(f"forget corpus {number}", partial(see, batch))
        comparison.watch.add(batch.prompts, found)
