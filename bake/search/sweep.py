"""`bakeout sweep`: measure a grid of settings on validation questions, report the best on test.

The model is loaded once; what lies below the hook layer is run once per question.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from bake.clamp import ClampWeights, find_site
from bake.questions.alignment import alignment
from bake.questions.forms import forms_beside
from bake.questions.multiple_choice import Question, load_texts
from bake.questions.prompts import Prompt, prompts_of, text_prompts
from bake.recipe import Clamp, PromptForm, Recipe
from bake.search.bench import Bench, Clamper, Results, bench_of
from bake.search.cache import model_sha256
from bake.search.corpus_statistics import Material, Progress, SiteStatistics, measure
from bake.search.grid import Point, Setting, points, variant
from bake.search.select import matched_random
from bake.search.selection import selected_recipe, split_questions
from bake.search.study import Finished, Study, check_folder

Objective = Literal["alignment", "forget"]
SIDES = ("forget", "retain")
CONTROLS = ("random features", "random_decoder")
CONTROL_SEED = 0


@dataclass(frozen=True)
class Scored:
    """What a setting does on one set of questions."""

    forget: dict[str, float]
    """Accuracy by prompt form."""
    retain: dict[str, float]
    loss: float | None = None
    """Nats per token of text, where text was measured."""
    tokens_fired: int = 0


@dataclass(frozen=True)
class Reported:
    """A measured point beside its controls."""

    measured: Finished
    alignment: float
    controls: dict[str, Scored]
    """On the validation questions, by name."""


@dataclass(frozen=True)
class SweepReport:
    """What a sweep found."""

    objective: Objective
    floor: float
    form: PromptForm
    """Prompt form that points are compared in."""
    base: Scored
    """On the validation questions."""
    measured: list[Finished]
    front: list[Reported]
    best: Reported
    recipe: Recipe
    """The best point's, with feature numbers."""
    test: dict[str, Scored]
    """Base, best and its controls on the test questions, in every form, and text."""
    n_questions: dict[str, dict[str, int]]
    """Split → side → how many."""


class Sweep:
    """A recipe's model, SAEs and validation questions, ready for any point of a grid.

    Args:
        recipe: what is swept.
        layers: of the grid; None keeps the recipe's own.
        material: the recipe's, on the device and in the dtype in which points are measured.
        cache: folder for statistics.
        progress: told what is being loaded.
    """

    def __init__(
        self,
        recipe: Recipe,
        layers: Sequence[Setting] | None,
        *,
        material: Material | None = None,
        cache: Path | None = None,
        progress: Progress = lambda _what, _share: None,
    ) -> None:
        self.recipe, self._progress = recipe, progress
        self.material = material or Material(recipe)
        self.split = split_questions(recipe)
        assert recipe.verify is not None
        self.form = recipe.verify.prompt
        self._layers = list(layers or [])
        self._measured = measure(
            self._all_layers(), material=self.material, cache=cache, progress=progress
        )
        self._clampers: dict[str, Clamper] = {}
        self._bench: tuple[int, Bench] | None = None

    def _all_layers(self) -> Recipe:
        """The recipe with one table per layer of the grid, so that one pass serves them all."""
        if not self._layers:
            return self.recipe
        tables = [
            variant(self.recipe, Point((("layer", layer),))).clamp[0] for layer in self._layers
        ]
        return self.recipe.with_clamps(tables)

    def at(self, point: Point) -> Recipe:
        """The recipe of a point, with feature numbers."""
        recipe = variant(self.recipe, point)
        if not recipe.selects:
            return recipe
        measured = replace(self._measured, sites=self._sites(point))
        return selected_recipe(recipe, measured=measured, progress=self._progress)[0]

    def _sites(self, point: Point) -> list[SiteStatistics]:
        """The statistics of a point's tables."""
        settings = dict(point.settings)
        tables = variant(self.recipe, point).clamp
        found = self._measured.sites
        if "layer" in settings:
            found = [found[self._layers.index(settings["layer"])]]
        return [
            replace(of_site, site=replace(of_site.site, clamp=clamp))
            for of_site, clamp in zip(found, tables, strict=True)
        ]

    def weights(self, recipe: Recipe) -> list[ClampWeights]:
        """The clamps of a recipe with feature numbers."""
        return [self._clamper(clamp).weights(clamp) for clamp in recipe.clamp]

    def _clamper(self, clamp: Clamp) -> Clamper:
        key = f"{clamp.sae} {clamp.hook_point}"
        if key not in self._clampers:
            if len(self._clampers) >= len(self.recipe.clamp):
                self._clampers.clear()  # of another layer
            self._clampers[key] = Clamper(find_site(clamp, self.recipe, self.material.base))
        return self._clampers[key]

    def validation(self, clamps: Sequence[ClampWeights]) -> Bench:
        """The validation questions, cached at the lowest of the clamps' layers."""
        layer = min(clamp.layer for clamp in clamps)
        if self._bench is None or self._bench[0] != layer:
            self._bench = None
            words = self.material.tokenizer
            prompts = prompts_of(self.split.validation, words, [self.form])
            self._bench = (layer, self.bench(prompts, layer, "validation questions"))
        return self._bench[1]

    def bench(self, prompts: Sequence[Prompt], layer: int, what: str) -> Bench:
        """Prompts, cached at a layer."""
        return bench_of(self.material, prompts, layer, what, self._progress)

    def run(self, point: Point) -> tuple[Scored, Scored, dict[str, Any]]:
        """(what a point does on the validation questions, what the base does, details)."""
        started = time.monotonic()
        recipe = self.at(point)
        clamps = self.weights(recipe)
        bench = self.validation(clamps)
        results = bench.measure(clamps)
        about = {
            "features": [clamp.features for clamp in recipe.clamp],
            "tokens_fired": results.tokens_fired,
            "seconds": time.monotonic() - started,
        }
        asked = self.split.validation
        return scored(results, asked, [self.form]), scored(bench.base, asked, [self.form]), about

    def controls(self, recipe: Recipe) -> dict[str, Recipe]:
        """The same clamp on random features that fire as often; and where every table writes a
        `value`, on the next feature instead: a strength is never made up.

        Source: Farrell et al., arXiv 2410.19278 (random_decoder).
        """
        random = [c.model_copy(update={"features": self._random(c)}) for c in recipe.clamp]
        found = {CONTROLS[0]: recipe.with_clamps(random)}
        other = [clamp.with_method("random_decoder") for clamp in recipe.clamp]
        if (written := [clamp for clamp in other if clamp is not None]) == other:
            found[CONTROLS[1]] = recipe.with_clamps(written)
        return found

    def _random(self, clamp: Clamp) -> list[int]:
        """Other features of the same SAE that fire as often on the forget corpus."""
        assert isinstance(clamp.features, list)
        site = self._clamper(clamp).site
        of_site = next(
            found
            for found in self._measured.sites
            if (found.site.name, found.site.layer) == (site.name, site.layer)
        )
        refusing = [] if clamp.refusal_feature is None else [clamp.refusal_feature]
        kept = [*clamp.features, *refusing]
        return matched_random(of_site.forget.share, kept, seed=CONTROL_SEED)[: len(clamp.features)]


def scored(
    results: Results, asked: dict[str, list[Question]], forms: Sequence[str], *, text: bool = False
) -> Scored:
    """Accuracies, and the loss where text was among the prompts."""
    forget, retain = (
        {form: results.accuracy(side, form, asked[side]) for form in forms} for side in SIDES
    )
    return Scored(forget, retain, results.loss if text else None, results.tokens_fired)


def run_sweep(
    recipe: Recipe,
    grid: dict[str, list[Setting]],
    out: Path,
    *,
    objective: Objective = "alignment",
    floor: float = 0.99,
    device: str = "cpu",
    dtype: str | None = None,
    cache: Path | None = None,
    progress: Progress = lambda _what, _share: None,
) -> SweepReport | None:
    """Measure every point of a grid that nobody has measured, and report.

    Several processes may run the same sweep in the same folder, at once or one after another.

    Args:
        recipe: what is swept.
        grid: axis → settings.
        out: folder of the study.
        objective: alignment, or the least forget accuracy under a floor on the retained.
        floor: least retained accuracy for `forget`, as a share of the base's.
        device: as torch names it, where the model runs.
        dtype: in which it runs; what the recipe says by default.
        cache: folder for statistics.
        progress: told how far it is.

    Returns:
        The report; None where another process is still measuring and will report.

    Raises:
        BakeoutError: of the kind of trouble it meets.
    """
    wanted = points(recipe, grid)
    check_folder(out)
    material = Material(recipe, device, dtype)
    sweep = Sweep(recipe, grid.get("layer"), material=material, cache=cache, progress=progress)
    study = Study(out, _fingerprint(recipe, model_sha256(material.base) + (dtype or "")))
    try:
        study.add(wanted)
        while (claimed := study.claim()) is not None:
            trial, point = claimed
            progress(str(point), len(study.finished()) / len(wanted))
            found, base, about = sweep.run(point)
            about["base"] = [base.forget[sweep.form], base.retain[sweep.form]]
            study.tell(trial, found.forget[sweep.form], found.retain[sweep.form], about)
        if study.running():
            return None
        return _report(sweep, study, objective, floor)
    finally:
        study.close()


def _report(sweep: Sweep, study: Study, objective: Objective, floor: float) -> SweepReport:
    measured = study.finished()
    best = max(measured, key=lambda found: _rank(found, objective, floor))
    front = study.front()
    recipe = sweep.at(best.point)
    clamps = sweep.weights(recipe)
    asked = sweep.split.test
    assert sweep.recipe.verify is not None
    forms, texts = forms_beside(sweep.form), load_texts(sweep.recipe.verify.text, sweep.recipe)
    words = sweep.material.tokenizer
    prompts = [*prompts_of(asked, words, forms), *text_prompts(texts, words)]
    with_controls = [_beside_controls(sweep, found) for found in front]
    reported = next((r for r in with_controls if r.measured == best), None)
    base = sweep.validation(clamps).base
    bench = sweep.bench(prompts, min(clamp.layer for clamp in clamps), "test questions")
    test = {"base": scored(bench.base, asked, forms, text=True)}
    for name, one in {"best": recipe, **sweep.controls(recipe)}.items():
        results = bench.measure(sweep.weights(one))
        test[name] = scored(results, asked, forms, text=True)
    return SweepReport(
        objective=objective,
        floor=floor,
        form=sweep.form,
        base=scored(base, sweep.split.validation, [sweep.form]),
        measured=measured,
        front=with_controls,
        best=reported or _beside_controls(sweep, best),
        recipe=recipe,
        test=test,
        n_questions={
            split: {side: len(asked) for side, asked in getattr(sweep.split, split).items()}
            for split in ("validation", "test")
        },
    )


def _beside_controls(sweep: Sweep, point: Finished) -> Reported:
    recipe = sweep.at(point.point)
    bench = sweep.validation(sweep.weights(recipe))
    asked = sweep.split.validation
    return Reported(
        point,
        aligned(point),
        {
            name: scored(bench.measure(sweep.weights(one)), asked, [sweep.form])
            for name, one in sweep.controls(recipe).items()
        },
    )


def aligned(point: Finished) -> float:
    """Alignment of a point on the validation questions."""
    base_forget, base_retain = point.about["base"]
    return alignment(point.forget, base_forget, point.retain, base_retain)


def _rank(point: Finished, objective: Objective, floor: float) -> tuple[float, ...]:
    """The greater the better; ties go to what fires on fewer tokens, then to the earlier point."""
    rest = (-float(point.about["tokens_fired"]), -float(point.number))
    if objective == "alignment":
        return (aligned(point), *rest)
    keeps = point.retain >= floor * point.about["base"][1]
    return (float(keeps), -point.forget if keeps else point.retain, *rest)


def _fingerprint(recipe: Recipe, model: str) -> str:
    """Of everything that decides what a point measures."""
    digest = hashlib.sha256(model.encode())
    digest.update(json.dumps(recipe.to_dict(), sort_keys=True).encode())
    for path in recipe.local_sources[1:]:
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()
