"""`bakeout sweep`: measure a grid of settings on validation questions, report the best on test."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from optuna.trial import Trial

from bake.clamp import find_site
from bake.questions.alignment import alignment
from bake.questions.multiple_choice import load_texts
from bake.recipe import Clamp, PromptForm, Recipe
from bake.sae.folding import sha256_of
from bake.scale.crew import Crew
from bake.scale.measuring import MeasuringCrew
from bake.search.asking_bench import Asked, AskingBench, Outcome, Scored, Split
from bake.search.cache import model_sha256
from bake.search.corpus_statistics import (
    LOOK_AGAIN_SECONDS,
    Material,
    Progress,
    SiteStatistics,
    measure,
)
from bake.search.grid import Point, Setting, points, variant
from bake.search.select import matched_random
from bake.search.selection import selected_recipe, split_questions
from bake.search.study import Finished, Study, check_folder

Objective = Literal["alignment", "forget"]
CONTROLS = ("random features", "random_decoder")
CONTROL_SEED = 0


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


class Sweep(AskingBench):
    """A recipe's model, SAEs, statistics and questions, ready for any point of a grid.

    Args:
        recipe: what is swept.
        layers: of the grid; None keeps the recipe's own.
        material: the recipe's, on the device and in the dtype in which points are measured.
        cache: folder for statistics.
        crew: workers that count and measure; without it, this process does.
        progress: told what is being loaded.
    """

    def __init__(
        self,
        recipe: Recipe,
        layers: Sequence[Setting] | None,
        *,
        material: Material | None = None,
        cache: Path | None = None,
        crew: Crew | None = None,
        progress: Progress = lambda _what, _share: None,
    ) -> None:
        material = material or Material(recipe)
        split = split_questions(recipe)
        assert recipe.verify is not None
        asked = Asked(split, recipe.verify.prompt, load_texts(recipe.verify.text, recipe))
        super().__init__(material, asked, progress)
        self._layers = list(layers or [])
        self._measured = measure(
            self._all_layers(), material=self.material, cache=cache, crew=crew, progress=progress
        )
        self._sites_there = [of_site.site for of_site in self._measured.sites]
        self._crew = None
        if crew is not None:
            base = self.material.base
            self._crew = MeasuringCrew(crew, recipe, asked, base, self._sites_there, material.dtype)

    @property
    def fingerprint(self) -> str:
        """Of everything that decides what a point measures."""
        digest = hashlib.sha256(model_sha256(self.material.base).encode())
        digest.update(json.dumps(self.recipe.to_dict(), sort_keys=True).encode())
        digest.update(str(self.material.dtype).encode())
        for path in self.recipe.local_sources[1:]:
            if path.is_file():
                digest.update(path.read_bytes())
        for site in self._sites_there:
            digest.update(sha256_of(site.files).encode())
        return digest.hexdigest()

    def outcomes(self, settings: Iterator[tuple[Recipe, Split]]) -> Iterator[tuple[int, Outcome]]:
        """What comes of settings, as they end; each is taken when somebody gets to it.

        Args:
            settings: recipes with feature numbers, and on which questions they are measured.

        Yields:
            (number of the setting from 0, what came of it).
        """
        if self._crew is not None:
            yield from self._crew.measured(settings)
            return
        for number, setting in enumerate(settings):
            yield number, self.measure(*setting)

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

    def measured_at(self, found: Finished) -> Recipe:
        """The recipe of a measured point, with the feature numbers that were measured."""
        recipe = variant(self.recipe, found.point)
        each = zip(recipe.clamp, found.about["features"], strict=True)
        return recipe.with_clamps([c.model_copy(update={"features": list(k)}) for c, k in each])

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
        site = find_site(clamp, self.recipe, self.material.base)
        of_site = next(
            found
            for found in self._measured.sites
            if (found.site.name, found.site.layer) == (site.name, site.layer)
        )
        refusing = [] if clamp.refusal_feature is None else [clamp.refusal_feature]
        kept = [*clamp.features, *refusing]
        return matched_random(of_site.forget.share, kept, seed=CONTROL_SEED)[: len(clamp.features)]


def run_sweep(
    recipe: Recipe,
    grid: dict[str, list[Setting]],
    out: Path,
    *,
    objective: Objective = "alignment",
    floor: float = 0.99,
    device: str = "cpu",
    dtype: str | None = None,
    storage: str | None = None,
    cache: Path | None = None,
    crew: Crew | None = None,
    progress: Progress = lambda _what, _share: None,
) -> SweepReport | None:
    """Measure every point of a grid that nobody has measured, and report.

    Several processes may run the same sweep in the same folder, or with the same storage, at once
    or one after another. With a storage each waits for the others, and all report.

    Args:
        recipe: what is swept.
        grid: axis → settings.
        out: folder of the study, or of what a study in a storage is called.
        objective: alignment, or the least forget accuracy under a floor on the retained.
        floor: least retained accuracy for `forget`, as a share of the base's.
        device: as torch names it, where the model runs.
        dtype: in which it runs; what the recipe says by default.
        storage: URL of a PostgreSQL that several machines share, for the study.
        cache: folder for statistics.
        crew: workers that count and measure; without it, this process does.
        progress: told how far it is.

    Returns:
        The report; None where another process, which has the same folder, will report.

    Raises:
        BakeoutError: of the kind of trouble it meets.
    """
    wanted = points(recipe, grid)
    check_folder(out, storage)
    material = Material(recipe, device, dtype)
    sweep = Sweep(
        recipe, grid.get("layer"), material=material, cache=cache, crew=crew, progress=progress
    )
    fingerprint = sweep.fingerprint
    if storage is not None:  # others measure the same at the same time
        fingerprint += hashlib.sha256(json.dumps(grid, sort_keys=True).encode()).hexdigest()
    study = Study(out, fingerprint, storage)
    try:
        study.add(wanted)
        while study.left():
            if _measure_all(sweep, study, len(wanted), progress):
                continue
            if not study.shared:
                return None
            progress("others measure the last points", len(study.finished()) / len(wanted))
            time.sleep(LOOK_AGAIN_SECONDS)
        return _report(sweep, study, objective, floor)
    finally:
        study.close()


def _measure_all(sweep: Sweep, study: Study, n_points: int, progress: Progress) -> int:
    """Measure what waits, until nothing does; returns how many points."""
    begun: list[tuple[Trial, Recipe]] = []

    def claimed() -> Iterator[tuple[Recipe, Split]]:
        while (mine := study.claim()) is not None:
            trial, point = mine
            progress(str(point), len(study.finished()) / n_points)
            recipe = sweep.at(point)
            begun.append((trial, recipe))
            yield recipe, "validation"

    form = sweep.asked.form
    for number, outcome in sweep.outcomes(claimed()):
        trial, recipe = begun[number]
        found, base = outcome.found, outcome.base
        about = {
            "features": [clamp.features for clamp in recipe.clamp],
            "tokens_fired": found.tokens_fired,
            "seconds": outcome.seconds,
            "base": [base.forget[form], base.retain[form]],
        }
        study.tell(trial, found.forget[form], found.retain[form], about)
    return len(begun)


def _report(sweep: Sweep, study: Study, objective: Objective, floor: float) -> SweepReport:
    measured = study.finished()
    best = max(measured, key=lambda found: _rank(found, objective, floor))
    front = study.front()
    with_controls = _beside_controls(sweep, [*front, best])
    recipe, form = sweep.measured_at(best), sweep.asked.form
    forget, retain = best.about["base"]
    tried = {"best": recipe, **sweep.controls(recipe)}
    outcomes = dict(sweep.outcomes((one, "test") for one in tried.values()))
    test = {"base": outcomes[0].base}
    test |= {name: outcomes[number].found for number, name in enumerate(tried)}
    return SweepReport(
        objective=objective,
        floor=floor,
        form=form,
        base=Scored({form: forget}, {form: retain}),
        measured=measured,
        front=with_controls[: len(front)],
        best=with_controls[-1],
        recipe=recipe,
        test=test,
        n_questions={
            split: {side: len(of) for side, of in getattr(sweep.asked.split, split).items()}
            for split in ("validation", "test")
        },
    )


def _beside_controls(sweep: Sweep, shown: Sequence[Finished]) -> list[Reported]:
    """Points with their controls; one that comes twice is measured once."""
    numbers = {found.number: found for found in shown}
    asked = [
        (number, name, control)
        for number, found in numbers.items()
        for name, control in sweep.controls(sweep.measured_at(found)).items()
    ]
    outcomes = dict(sweep.outcomes((control, "validation") for *_, control in asked))
    controls: dict[int, dict[str, Scored]] = {number: {} for number in numbers}
    for place, (number, name, _) in enumerate(asked):
        controls[number][name] = outcomes[place].found
    return [Reported(found, aligned(found), controls[found.number]) for found in shown]


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
