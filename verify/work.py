"""What the kinds of evidence have at hand once everything is loaded and was shown the prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from bake.base import find_base
from bake.recipe import PromptForm, Recipe
from verify.compare.comparison import Comparison
from verify.engines.runners import Runner
from verify.evidence.controls import all_controls
from verify.evidence.known import measure_known, model_digest
from verify.hooked import Hooked
from verify.journal import Journal, Progress
from verify.options import Options
from verify.report.findings import Rounding
from verify.report.measures import KnownSet

if TYPE_CHECKING:
    from verify.reference.oracle import Oracle


@dataclass
class Work:
    """One verification under way: a recipe, its base and references, and a folder's engines."""

    recipe: Recipe
    kinds: frozenset[str]
    """Of evidence that were asked for."""
    hooked: Hooked
    comparison: Comparison
    """What every engine showed."""
    in_float32: Rounding | None
    """What the engine in torch showed in float32, where everything else runs in 16 bits."""
    engines: Sequence[Runner]
    """The folder's own."""
    options: Options
    journal: Journal
    progress: Progress
    otherwise: Callable[[str, int | None], AbstractContextManager[Runner]]
    """The folder in torch, loaded otherwise: dtype, and to how many bits its matrices are
    rounded."""

    @property
    def unlearned(self) -> Runner:
        """The folder's engine that is asked alone: that in torch, else its first graph."""
        return self.engines[0]

    @property
    def form(self) -> PromptForm:
        """The prompt form that leads."""
        assert self.recipe.verify is not None
        return self.recipe.verify.prompt

    @cached_property
    def controls(self) -> dict[str, Oracle]:
        """What else could stand in the clamp's place, by name."""
        hooked = self.hooked
        return all_controls(
            hooked.model, hooked.sites, hooked.material, self.form, self.journal.shared
        )

    @cached_property
    def known(self) -> tuple[Mapping[str, tuple[int, ...]], tuple[KnownSet, ...]]:
        """By source, the rows of the questions that the base knows; and what became of them."""
        cache, hooked = self.options.cache, self.hooked
        return measure_known(
            hooked.base,
            self.unlearned,
            hooked.material,
            model=f"{model_digest(find_base(self.recipe).folder)} {hooked.dtype} "
            f"{hooked.model.device.type}",
            cache=None if cache is None else cache / "known",
            journal=self.journal,
            progress=self.progress,
        )
