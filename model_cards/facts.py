"""What a card says about a folder, whether it is read from the folder or known before it exists."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bake.base import BaseModel
from bake.clamp import ClampWeights, sae_name
from bake.recipe import Clamp, Recipe, Verify
from bake.sae.fit_figures import UNMEASURED, Fit
from bake.sources import layer_of
from export.folder_contents import check_contents, recipe_in
from export.manifest import CompiledEntry, DistilledEntry, Manifest
from export.passing_by import passing_by, said

GEMMA_SCOPE = (
    "Gemma Scope, by Google DeepMind (Lieberum et al., arXiv 2408.05147), licensed CC BY 4.0"
)
ATTRIBUTIONS = (
    (re.compile(r"gemma-scope-(2b|9b|27b)-"), GEMMA_SCOPE),
    (re.compile(r"gemma-2b-(it-)?res-jb/"), "by Joseph Bloom, released through SAELens"),
)
"""Whose an SAE is, by the beginning of its name."""


@dataclass(frozen=True)
class ClampFacts:
    """One clamped layer."""

    layer: int
    hook_point: str
    method: str
    parameters: Mapping[str, Any]
    """By their names in the recipe."""
    features: Sequence[int | str]
    """Their numbers; or that the recipe selects them, where nothing was baked."""
    sae: str
    past: tuple[str, ...] = ()
    """What of the base goes past it by design, a sentence each."""
    fit: str = UNMEASURED
    """How well that fits the base."""

    @property
    def attribution(self) -> str:
        """Whose SAE it is, where that is known from its name."""
        known = (text for pattern, text in ATTRIBUTIONS if pattern.match(self.sae))
        return next(known, "by whoever published it; see there for its terms")


@dataclass(frozen=True)
class CardFacts:
    """Everything but measurements."""

    base: str
    """Hub id, or the base folder's own name."""
    revision: str | None
    """None where the base was a local folder."""
    license: str
    """Hub licence id."""
    carrier: str
    """As the manifest has it: one of `CARRIERS`, mostly."""
    exact: bool
    clamps: tuple[ClampFacts, ...]
    verify: Verify | None
    """The recipe's questions and texts."""
    unmeasured: str
    """What stands in place of a figure that there is not."""
    compiled: CompiledEntry | None = None
    """What a compiled folder's manifest says of its layers."""
    distilled: DistilledEntry | None = None
    """What a trained folder's manifest says of its training."""
    rounded: tuple[str, ...] = ()
    """What the manifest warns of in graphs with rounded weights."""


def facts_at_bake(
    recipe: Recipe, base: BaseModel, clamps: Sequence[ClampWeights], fits: Mapping[int, Fit]
) -> CardFacts:
    """Before a checkpoint is written."""
    fitting = {layer: fit.as_told for layer, fit in fits.items()}
    facts = tuple(
        _clamp_facts(
            clamp.clamp,
            clamp.hook_point,
            fitting.get(clamp.layer, UNMEASURED),
            **passing_by(base.config, clamp.layer),
        )
        for clamp in clamps
    )
    return _of_layer(recipe, base.name, base.revision, facts, "not measured yet")


def facts_of_recipe(recipe: Recipe) -> CardFacts:
    """Of a recipe that names hub ids and hook points, with nothing baked."""
    facts = tuple(
        _clamp_facts(clamp, str(clamp.hook_point), "not measured here") for clamp in recipe.clamp
    )
    base = recipe.base
    return _of_layer(recipe, base.model, base.revision, facts, "not measured here")


def _of_layer(
    recipe: Recipe, base: str, revision: str | None, clamps: tuple[ClampFacts, ...], unmeasured: str
) -> CardFacts:
    return CardFacts(
        base, revision, recipe.base.license, "layer", True, clamps, recipe.verify, unmeasured
    )


def facts_of_folder(folder: Path) -> CardFacts:
    """Of a folder, from its manifest and recipe.

    Raises:
        FolderError: the manifest is missing or damaged, or the folder holds what bakeout does not
            write.
        RecipeError: the recipe cannot be read.
    """
    manifest = Manifest.read(folder)
    check_contents(folder, manifest)
    return facts_of_manifest(manifest, recipe_in(folder, manifest), "not measured")


def facts_of_manifest(
    manifest: Manifest, recipe: Recipe, unmeasured: str = "not measured yet"
) -> CardFacts:
    """Of a folder whose manifest is known, perhaps not written yet."""
    return CardFacts(
        base=manifest.base.model,
        revision=manifest.base.revision,
        license=recipe.base.license,
        carrier=manifest.carrier,
        exact=manifest.exact,
        clamps=tuple(
            ClampFacts(
                clamp.layer,
                clamp.hook_point,
                clamp.method,
                clamp.parameters,
                clamp.features,
                clamp.sae.name,
                tuple(
                    said(
                        clamp.layer,
                        clamp.old_keys,
                        clamp.embedded_again,
                        clamp.parameters.get("tau"),
                    )
                ),
                UNMEASURED if clamp.fit is None else clamp.fit.as_told,
            )
            for clamp in manifest.clamps
        ),
        verify=recipe.verify,
        unmeasured=unmeasured,
        compiled=manifest.compiled,
        distilled=manifest.distilled,
        rounded=tuple(
            f"{name}: {entry.warning}" for name, entry in manifest.rounded.items() if entry.warning
        ),
    )


def _clamp_facts(clamp: Clamp, hook_point: str, fit: str, **past: Any) -> ClampFacts:
    layer = layer_of(hook_point)
    features = ["those that the recipe selects"] if clamp.features == "select" else clamp.features
    return ClampFacts(
        layer,
        hook_point,
        clamp.method,
        clamp.parameters,
        features,
        sae_name(clamp),
        tuple(said(layer, **past, tau=clamp.tau)),
        fit,
    )
