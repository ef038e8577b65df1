"""Settings on a crew: its workers measure them on a recipe's questions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from bake.base import BaseModel, find_base
from bake.clamp import SAESite, find_site
from bake.recipe import Recipe
from bake.sae.folding import sha256_of
from bake.scale.counting import check_same, memory_with_model
from bake.scale.crew import Crew, about_here
from bake.search.asking_bench import Asked, AskingBench, Outcome, Split
from bake.search.cache import model_sha256
from bake.search.corpus_statistics import Material
from bake.search.statistics import memory_of


class SettingWorker:
    """Measures settings in a process of its own, on the device that Ray gives it.

    Args:
        recipe: whose base and SAEs must lie at the same paths on all machines.
        asked: on what is measured.
        model: sha256 of the base.
        dtype: in which it runs; what the recipe says by default.
    """

    def __init__(self, recipe: Recipe, asked: Asked, model: str, dtype: str | None = None) -> None:
        self._recipe, self._asked, self._model, self._dtype = recipe, asked, model, dtype
        self._bench: AskingBench | None = None
        self._known: set[str] = set()

    def about(self) -> dict[str, str]:
        """The versions that it has."""
        return about_here()

    def measure(self, recipe: Recipe, which: Split, saes: Sequence[str]) -> Outcome:
        """What `AskingBench.measure` gives.

        Args:
            recipe: at a setting, with feature numbers.
            which: of the questions.
            saes: sha256 of each table's SAE.

        Raises:
            ScaleError: base or SAEs are others here.
            BakeoutError: they cannot be loaded.
        """
        base = find_base(self._recipe)
        for clamp, expected in zip(recipe.clamp, saes, strict=True):
            if expected not in self._known:
                site = find_site(clamp, self._recipe, base)
                check_same(site.name, sha256_of(site.files), expected)
                self._known.add(expected)
        if self._bench is None:
            check_same(base.name, model_sha256(base), self._model)
            device = "cuda" if torch.cuda.is_available() else "cpu"
            self._bench = AskingBench(Material(self._recipe, device, self._dtype), self._asked)
        return self._bench.measure(recipe, which)


class MeasuringCrew:
    """A crew that measures settings of one recipe.

    Args:
        crew: whose workers so far are let go.
        recipe: what is swept.
        asked: on what is measured.
        base: the recipe's.
        sites: every SAE that a setting may clamp.
        dtype: in which the base runs; what the recipe says by default.

    Raises:
        ScaleError: there is no room for any worker.
    """

    def __init__(
        self,
        crew: Crew,
        recipe: Recipe,
        asked: Asked,
        base: BaseModel,
        sites: Sequence[SAESite],
        dtype: str | None = None,
    ) -> None:
        self._crew, self._recipe, self._base = crew, recipe, base
        self._sha256 = {(site.name, site.layer): sha256_of(site.files) for site in sites}
        sizes = sorted(memory_of(site.d_in, site.d_sae, decoder=True) for site in sites)
        memory = memory_with_model(recipe, base, dtype) + sum(sizes[-len(recipe.clamp) :])
        crew.start(SettingWorker, recipe, asked, model_sha256(base), dtype, memory=memory)

    def measured(self, settings: Iterator[tuple[Recipe, Split]]) -> Iterator[tuple[int, Outcome]]:
        """What comes of settings, as they end; each is taken when a worker gets to it.

        Yields:
            (number of the setting from 0, what came of it).

        Raises:
            BakeoutError: of the kind of trouble that crew or workers meet.
        """
        items = ((recipe, which, self._saes(recipe)) for recipe, which in settings)
        return self._crew.map("measure", items)

    def _saes(self, recipe: Recipe) -> list[str]:
        at = [find_site(clamp, self._recipe, self._base) for clamp in recipe.clamp]
        return [self._sha256[site.name, site.layer] for site in at]
