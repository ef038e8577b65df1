"""What is gathered about a folder: its engines side by side, and what the forgetting is worth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.base import find_base
from bake.recipe import Recipe
from verify.clamped_folder import check_layers, check_shape, read_config
from verify.comparison import BASE, REFERENCE, Comparison, compare
from verify.engines import Engines
from verify.firing import FeatureWatch, FiredExamples, fired_on
from verify.journal import Journal, Progress
from verify.kinds import ASKING, SIDE_BY_SIDE
from verify.known import measure_known, model_digest
from verify.material import load_material
from verify.measures import Completions, Control, KnownSet, Robustness
from verify.prompts import Batch, text_prompts
from verify.questions import load_texts
from verify.report import EngineReport, FiredText, Items
from verify.runners import DecodingRunner, HookedRunner, Runner

if TYPE_CHECKING:
    from verify.reference import Oracle

REFERENCE_32 = "reference-float32"
"""The reference of engines that compute in float32, where the recipe's dtype is another."""
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
    *,
    cache: Path | None,
    budget: int,
) -> Evidence:
    """Run base, reference and the folder's engines.

    Args:
        folder: what bakeout wrote.
        recipe: what to rebuild the reference from, with features named.
        kinds: of evidence.
        progress: told how far it is.
        engines: of the folder; the checkpoint's code is executed in a process of its own.
        journal: of a run of the same that was interrupted, or empty.
        cache: folder in which known questions are kept; None keeps nothing.
        budget: steps of the suffix search.

    Raises:
        BakeoutError: anything that is named cannot be loaded or does not fit.
    """
    config = read_config(folder, engines.carrier)
    progress("load", 0.0)
    assert recipe.verify is not None

    from verify.controls import measure_controls
    from verify.reference import Oracle
    from verify.stock import load_base, load_tokenizer, location
    from verify.whole_sae import load_sites

    sites = load_sites(recipe)
    check_layers([site.layer for site in sites], folder, config)
    tokenizer = load_tokenizer(recipe)
    material = load_material(recipe, tokenizer)
    progress("load", 0.4)
    model = load_base(recipe, engines.device)
    check_shape(model.config, folder, config)
    progress("load", 0.7)
    dtype, form = str(model.dtype).removeprefix("torch."), recipe.verify.prompt
    base = HookedRunner(BASE, model)
    oracles = {REFERENCE: Oracle(model, sites)}
    here: list[Runner] = [base] if kinds & {"choices", "loss"} else []
    here.append(HookedRunner(REFERENCE, model, oracles[REFERENCE]))
    against: dict[str, str] = {}
    if engines.graphs and dtype != "float32":
        model_32 = load_base(recipe, engines.device, dtype="float32")
        oracles[REFERENCE_32] = Oracle(model_32, sites)
        here.append(HookedRunner(REFERENCE_32, model_32, oracles[REFERENCE_32]))
        against = dict.fromkeys((graph.name for graph in engines.graphs), REFERENCE_32)
    with _half_the_threads() as threads, ExitStack() as stack:
        elsewhere: list[DecodingRunner] = []
        if engines.torch is not None:
            where = location(recipe) if engines.carrier == "adapter" else None
            engines.torch.load(dtype, device=engines.device, threads=threads, base=where)
            elsewhere.append(engines.torch)
        for graph in engines.graphs:
            elsewhere.append(stack.enter_context(engines.open(graph, threads=threads)))
        progress("load", 1.0)
        comparison = Comparison(
            material,
            material.prompts(kinds),
            tuple(runner.name for runner in (*here, *elsewhere)),
            "parity" in kinds,
            against,
            FiredExamples(form),
            FeatureWatch({site.layer: site.features for site in sites}),
        )
        compare(here, elsewhere, oracles, comparison, journal, progress)
        asks = bool(kinds & ASKING)
        if asks and recipe.select is not None and any(comparison.watch.never_active()):
            _watch_corpus(recipe, comparison, oracles[REFERENCE], journal)
        rows: dict[str, tuple[int, ...]] = {}
        known: tuple[KnownSet, ...] = ()
        if "known" in kinds:
            rows, known = measure_known(
                base,
                elsewhere[0],
                material,
                model=f"{model_digest(find_base(recipe).folder)} {dtype}",
                cache=None if cache is None else cache / "known",
                journal=journal,
                progress=progress,
            )
        reports = tuple(comparison.reports(kinds, form, rows))
        controls: tuple[Control, ...] = ()
        if "controls" in kinds:
            controls = measure_controls(model, sites, material, form, journal, progress)
    return Evidence(
        engines=reports if kinds & SIDE_BY_SIDE else (),
        fired_by_layer=tuple(sorted(comparison.fired_by_layer.items())),
        never_active=tuple(comparison.watch.never_active()) if asks else (),
        dtype=dtype,
        items=Items(
            forget_questions=len(material.questions["forget"]) if asks else 0,
            retain_questions=len(material.questions["retain"]) if asks else 0,
            text_tokens=comparison.losses[REFERENCE].n_tokens,
        ),
        examples=comparison.examples.result(tokenizer),
        known=known,
        controls=controls,
        completions=None,
        robustness=None,
    )


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
