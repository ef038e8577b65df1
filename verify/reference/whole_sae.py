"""The whole SAE of a recipe's clamp, as sae_lens itself loads it, and where it sits.

Activations are in the units in which sae_lens gives them: nothing is folded here.
"""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bake.errors import SAEError
from bake.recipe import Clamp, Recipe
from bake.sources import SAESource, layer_of

_STATEFUL = ("layer_norm", "constant_norm_rescale")
"""Normalisations whose decoder needs the input: editing a code says nothing about that."""


@dataclass(frozen=True)
class Site:
    """A recipe's table with its SAE in hand."""

    layer: int
    """The decoder layer whose output is edited."""
    clamp: Clamp
    """What happens to which features."""
    sae: Any
    """A sae_lens SAE, loaded in float32 and computing in float64."""

    @property
    def reconstructs(self) -> bool:
        """Whether the SAE has all of its features: a slice of one can edit, and not reconstruct."""
        return "slice_of" not in self.sae.cfg.metadata.to_dict()

    @property
    def features(self) -> tuple[int, ...]:
        """The features that trigger the clamp."""
        assert isinstance(self.clamp.features, list)
        return tuple(self.clamp.features)


def load_sites(recipe: Recipe) -> list[Site]:
    """Every clamp of a recipe with its whole SAE, by layer.

    Raises:
        SAEError: an SAE cannot be loaded, does not say where it sits, or has no such feature.
    """
    sites = [_load_site(clamp, recipe) for clamp in recipe.clamp]
    return sorted(sites, key=lambda site: site.layer)


def _load_site(clamp: Clamp, recipe: Recipe) -> Site:
    name = clamp.sae.path or f"{clamp.sae.release}/{clamp.sae.id}"
    sae, stated = _load_sae(clamp.sae, recipe, name)
    normalisation = sae.cfg.normalize_activations
    if normalisation in _STATEFUL:
        raise SAEError(
            f"SAE {name}: normalize_activations is {normalisation}; expected one that can be "
            "folded into the weights"
        )
    assert isinstance(clamp.features, list)
    named = [*clamp.features, *([] if clamp.refusal_feature is None else [clamp.refusal_feature])]
    if outside := [feature for feature in named if feature >= sae.cfg.d_sae]:
        raise SAEError(
            f"SAE {name}: feature {outside[0]} is out of range; expected 0 to {sae.cfg.d_sae - 1}"
        )
    return Site(_layer(clamp.hook_point, stated, name), clamp, sae)


def _layer(asked: str | None, stated: str | None, name: str) -> int:
    """The layer that recipe and SAE agree on."""
    if asked is None and stated is None:
        raise SAEError(f"SAE {name}: states no hook point; give `hook_point` in the recipe")
    try:
        layers = [layer_of(hook_point) for hook_point in (asked, stated) if hook_point is not None]
    except ValueError as error:
        raise SAEError(f"SAE {name}: {error}") from error
    if len(set(layers)) > 1:
        raise SAEError(
            f"SAE {name}: sits at {stated}, the recipe says {asked}; remove `hook_point`"
        )
    return layers[0]


# --------------------------------------------------------------------------- the layouts


def _load_sae(source: SAESource, recipe: Recipe, name: str) -> tuple[Any, str | None]:
    """(SAE, the hook point that it states)."""
    import torch

    folder = None if source.path is None else recipe.local(source.path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they concern training, or other model libraries
            sae = _open_sae(source, folder)
    except SAEError:
        raise
    except Exception as error:  # sae_lens lets every kind through: hub, JSON, keys, shapes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SAEError(
            f"SAE {name}: sae_lens cannot load it ({reason}); check the name and the network, "
            "or name a local folder with `path`"
        ) from error
    stated = sae.cfg.metadata.hook_name
    if stated is None and folder is not None:
        stated = _gemma_scope_hook(folder)
    return sae.to(torch.float64).eval().requires_grad_(False), stated


def _open_sae(source: SAESource, folder: Path | None) -> Any:
    from sae_lens import SAE

    if folder is None:
        return SAE.from_pretrained(source.release, source.id, device="cpu", dtype="float32")
    if (folder / "cfg.json").is_file():
        return SAE.load_from_disk(folder, device="cpu", dtype="float32")
    return _gemma_scope(folder)


def _gemma_scope(folder: Path) -> Any:
    """A Gemma Scope (`params.npz`) or Gemma Scope 2 (`params.safetensors`) folder.

    JumpReLU with no b_dec on the input. Source: Lieberum et al., arXiv 2408.05147.
    """
    import numpy as np
    import torch
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
    from safetensors.torch import load_file

    if (folder / "params.npz").is_file():
        with np.load(folder / "params.npz", allow_pickle=False) as arrays:
            tensors = {key: torch.from_numpy(arrays[key]) for key in arrays}
    elif (folder / "params.safetensors").is_file():
        tensors = load_file(folder / "params.safetensors")
    else:
        raise SAEError(
            f"SAE {folder}: no SAE there; expected cfg.json with sae_weights.safetensors, "
            "params.npz, or params.safetensors"
        )
    weights = {}
    for key in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"):
        found = tensors.get(key, tensors.get(key.replace("W_", "w_")))
        if found is None:
            raise SAEError(f"SAE {folder}: has no {key}; it has {', '.join(sorted(tensors))}")
        weights[key] = found.float()
    d_in, d_sae = weights["W_enc"].shape
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=d_in, d_sae=d_sae, apply_b_dec_to_input=False))
    sae.load_state_dict(weights)
    return sae


def _gemma_scope_hook(folder: Path) -> str | None:
    """Gemma Scope 2 states its module in config.json; both name the layer in their path."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        module = str(config["hf_hook_point_in"])
    except (OSError, ValueError, KeyError, TypeError):
        layers = [match[1] for part in folder.parts if (match := re.search(r"layer_(\d+)", part))]
        return f"blocks.{layers[-1]}.hook_resid_post" if layers else None
    output = re.fullmatch(r"model\.layers\.(\d+)\.output", module)
    return f"blocks.{output[1]}.hook_resid_post" if output else module
