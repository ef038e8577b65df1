"""The stock base of a recipe in this process, and the references that hooks make of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.questions.prompts import Prompt
from bake.recipe import Recipe
from bake.rounding import epsilon_of
from export.carriers.carriers import CARRIERS
from export.clamped import read_config
from export.manifest import Manifest
from verify.clamped_folder import check_layers, check_shape, recorded_hooks
from verify.compare.comparison import BASE, REFERENCE
from verify.engines.engine_names import engine_of
from verify.engines.engines import Engines
from verify.engines.heap import give_back
from verify.engines.runners import HookedRunner
from verify.journal import Journal, Progress
from verify.material import Material, load_material
from verify.tolerances import unit_of

if TYPE_CHECKING:
    from verify.compare.sensitivity import Sensitivity
    from verify.reference.oracle import Oracle
    from verify.reference.whole_sae import Site

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

    @property
    def weight(self) -> int:
        """Of the model, in bytes."""
        return sum(of.numel() * of.element_size() for of in self.model.parameters())

    @cached_property
    def base(self) -> HookedRunner:
        """The base itself."""
        return HookedRunner(BASE, self.model)

    @cached_property
    def references(self) -> list[HookedRunner]:
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
            units: per engine that is held to rounding, the relative size of its own.
            engines: of the folder.
            prompts: that all are shown.
            journal: of a run that was interrupted, or empty.
        """
        from verify.compare.sensitivity import Sensitivity

        own = {name: epsilon_of(oracle.model.dtype) for name, oracle in self.oracles.items()}
        against = self.against(engines)
        wanted = {name: (name, epsilon) for name, epsilon in own.items()}
        wanted |= {name: (against.get(name, REFERENCE), unit) for name, unit in units.items()}
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


def load_hooked(
    folder: Path,
    recipe: Recipe,
    engines: Engines,
    progress: Progress,
    sites: Sequence[Site] | None = None,
) -> Hooked:
    """Load the stock base and, where they are not at hand, the whole SAEs, and check that the
    folder is of their shape.
    """
    from bake.stock import load_base, load_tokenizer
    from verify.reference.oracle import Oracle
    from verify.reference.whole_sae import load_sites

    config = read_config(folder, engines.carrier)
    progress("load", 0.0)
    if sites is None:
        sites = load_sites(recipe, recorded_hooks(Manifest.read(folder)))
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
    give_back()
    return Hooked(model, sites, oracles, material)


def units_of(folder: Path, engines: Engines, hooked: Hooked) -> dict[str, float]:
    """Per engine of the folder that is held to rounding, the relative size of one."""
    stored = None
    if not CARRIERS[engines.carrier].strips:  # 16-bit weights stay so, whatever they are run in
        stored = read_config(folder, engines.carrier).get("dtype")
    against, found = hooked.against(engines), {}
    names = [*([engines.torch.name] if engines.torch else []), *(g.name for g in engines.graphs)]
    for name in filter(lambda name: engine_of(name).held, names):
        dtype = str(hooked.oracles[against.get(name, REFERENCE)].model.dtype)
        dtype = dtype.removeprefix("torch.")
        found[name] = unit_of(name, stored if dtype == "float32" and stored else dtype)
    return found
