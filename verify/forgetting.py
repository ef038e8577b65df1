"""What the forgetting is worth: measured on the base, its controls and the folder's own engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.base import find_base
from bake.recipe import Recipe
from bake.rounding import epsilon_of
from verify.comparison import BASE, REFERENCE
from verify.completions import complete
from verify.engines import Engines
from verify.journal import Journal, Progress
from verify.known import measure_known, model_digest
from verify.material import Material
from verify.measures import Completions, Control, KnownSet, Robustness
from verify.prompts import Prompt
from verify.report import EngineReport
from verify.runners import HookedRunner, Runner

if TYPE_CHECKING:
    from verify.reference import Oracle
    from verify.sensitivity import Sensitivity
    from verify.whole_sae import Site

REFERENCE_32 = "reference-float32"
"""The reference of engines that compute in float32, where the recipe's dtype is another."""


@dataclass(frozen=True)
class Hooked:
    """A stock base in this process, and what hooks make of it."""

    model: Any
    sites: Sequence[Site]
    oracles: Mapping[str, Oracle]
    """`reference`, and where one is needed `reference-float32`, over a model of its own."""
    material: Material

    @property
    def dtype(self) -> str:
        """float32, bfloat16 or float16."""
        return str(self.model.dtype).removeprefix("torch.")

    @cached_property
    def base(self) -> Runner:
        """The base itself."""
        return HookedRunner(BASE, self.model)

    @cached_property
    def references(self) -> list[Runner]:
        """One engine for each oracle."""
        return [HookedRunner(name, of.model, of) for name, of in self.oracles.items()]

    def sensitivities(
        self,
        units: Mapping[str, float],
        engines: Engines,
        prompts: Sequence[Prompt],
        journal: Journal,
    ) -> dict[str, Sensitivity]:
        """How far rounding moves what each engine is compared with, on a sample of some prompts.

        Args:
            units: per engine of the folder, the relative size of its roundings.
            engines: of the folder.
            prompts: that all are shown.
            journal: of a run that was interrupted, or empty.
        """
        from verify.sensitivity import Sensitivity

        own = {name: epsilon_of(oracle.model.dtype) for name, oracle in self.oracles.items()}
        against = {BASE: REFERENCE, **{name: name for name in own}, **self.against(engines)}
        wanted = {
            name: (against.get(name, REFERENCE), units.get(name, own[against.get(name, REFERENCE)]))
            for name in (*against, *units)
        }
        known = {
            of: Sensitivity(of[0], self.oracles[of[0]], of[1], self.material, journal, prompts)
            for of in dict.fromkeys(wanted.values())
        }
        return {name: known[of] for name, of in wanted.items()}

    def against(self, engines: Engines) -> dict[str, str]:
        """The engines that are compared with another reference than `reference`, and with which."""
        if REFERENCE_32 not in self.oracles:
            return {}
        return dict.fromkeys((graph.name for graph in engines.graphs), REFERENCE_32)


@dataclass(frozen=True)
class Forgetting:
    """One folder's engine beside the base, and how to ask them."""

    recipe: Recipe
    hooked: Hooked
    unlearned: Runner
    """The folder's engine: that in torch, else its first graph."""
    journal: Journal
    progress: Progress

    @property
    def form(self) -> str:
        """The prompt form that leads."""
        assert self.recipe.verify is not None
        return self.recipe.verify.prompt

    def known(
        self, cache: Path | None
    ) -> tuple[tuple[KnownSet, ...], Mapping[str, tuple[int, ...]]]:
        """What became of the questions that the base knows, and by source their rows."""
        rows, known = measure_known(
            self.hooked.base,
            self.unlearned,
            self.hooked.material,
            model=f"{model_digest(find_base(self.recipe).folder)} {self.hooked.dtype} "
            f"{self.hooked.model.device.type}",
            cache=None if cache is None else cache / "known",
            journal=self.journal,
            progress=self.progress,
        )
        return known, rows

    def controls(self) -> tuple[Control, ...]:
        """Something else in the clamp's place."""
        from verify.controls import measure_controls

        hooked = self.hooked
        return measure_controls(
            hooked.model, hooked.sites, hooked.material, self.form, self.journal, self.progress
        )

    def completions(self) -> Completions:
        """Texts side by side."""
        from verify.reference import Oracle, reconstruct_residual

        model, material = self.hooked.model, self.hooked.material
        dropped = Oracle(model, self.hooked.sites, reconstruct_residual)
        return complete(
            self.recipe,
            material.questions["forget"],
            {
                "base": self.hooked.base,
                "reconstruction": HookedRunner("reconstruction", model, dropped),
                "unlearned": self.unlearned,
            },
            self.unlearned.name,
            material.tokenizer,
            material.letters,
            self.journal,
            lambda share: self.progress("completions", share),
        )

    def robustness(self, budget: int, engines: Sequence[EngineReport]) -> Robustness:
        """Forget accuracy under attack."""
        from verify.reference import Oracle
        from verify.robustness import attack

        material = self.hooked.material
        return attack(
            self.recipe,
            material.questions["forget"],
            self.hooked.base,
            self.unlearned,
            Oracle(self.hooked.model, self.hooked.sites),
            material.tokenizer,
            material.letters,
            journal=self.journal,
            budget=budget,
            engines=engines,
            progress=lambda share: self.progress("robustness", share),
        )
