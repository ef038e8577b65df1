"""The whole SAE of a recipe's clamp, as sae_lens itself loads it, and where it sits.

Activations are in the units in which sae_lens gives them: nothing is folded here.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bake.errors import SAEError
from bake.reading.arrays import ARRAY_BYTES, read_npz
from bake.reading.capped import read_json
from bake.recipe import Clamp, Recipe
from bake.sources import SAESource, layer_of

_WEIGHTS = ("sae_weights.safetensors", "params.npz", "params.safetensors")
_PLACES = re.compile(
    r"(?<![a-z])(mlp|attn?|transcoders?|clt|crosscoder|embedding)(?![a-z])"
    r"|gemma-scope-[^/]*-res(?![a-z])|resid_post"
)
"""Words of Gemma Scope's folders for a place; in the group, one that is not the residual stream."""


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


def load_sites(recipe: Recipe, recorded: Mapping[str, str] | None = None) -> list[Site]:
    """Every clamp of a recipe with its whole SAE, by layer.

    Args:
        recipe: names the SAEs.
        recorded: the hook points that a folder's manifest states, by the sha256 of the SAE's file.

    Raises:
        SAEError: an SAE cannot be loaded, does not say where it sits, or has no such feature.
    """
    sites = [_load_site(clamp, recipe, recorded or {}) for clamp in recipe.clamp]
    return sorted(sites, key=lambda site: site.layer)


def _load_site(clamp: Clamp, recipe: Recipe, recorded: Mapping[str, str]) -> Site:
    name = clamp.sae.path or f"{clamp.sae.release}/{clamp.sae.id}"
    sae, stated = _load_sae(clamp.sae, recipe, name)
    normalisation = sae.cfg.normalize_activations
    if normalisation != "none":  # sae_lens says so once it has folded a release's factor
        raise SAEError(
            f"SAE {name}: normalize_activations is {normalisation}; expected none, or one "
            "that sae_lens has folded into the weights. Take another SAE"
        )
    assert isinstance(clamp.features, list)
    named = [*clamp.features, *([] if clamp.refusal_feature is None else [clamp.refusal_feature])]
    if outside := [feature for feature in named if feature >= sae.cfg.d_sae]:
        raise SAEError(
            f"SAE {name}: feature {outside[0]} is out of range; expected 0 to {sae.cfg.d_sae - 1}"
        )
    said = {"the recipe": clamp.hook_point, **stated}
    if clamp.sae.path is not None:
        folder = recipe.local(clamp.sae.path)
        _check_folders(folder, name)
        if not any(said.values()):  # where it says one, the folder's layers are compared with it
            said["the folder"] = _recorded(folder, recorded)
    return Site(_layer(said, name), clamp, sae)


def _layer(said: Mapping[str, str | None], name: str) -> int:
    """The layer on which all agree that say one. Nothing is guessed: silence is an error."""
    try:
        layers = {who: layer_of(where) for who, where in said.items() if where is not None}
    except ValueError as error:
        raise SAEError(f"SAE {name}: {error}; take an SAE of the residual stream") from error
    if not layers:
        raise SAEError(
            f"SAE {name}: states no hook point, and no folder records one for it; expected one "
            "of the residual stream. Give `hook_point` in the recipe"
        )
    if len(set(layers.values())) > 1:
        sits = ", ".join(f"{who} says {said[who]}" for who in reversed(layers))
        raise SAEError(f"SAE {name}: {sits}; expected one place. Correct `hook_point`")
    return next(iter(layers.values()))


def _check_folders(folder: Path, name: str) -> None:
    """Raise SAEError where Gemma Scope's folders, which are all that its files have to say, name
    another place than the residual stream.
    """
    if not any((folder / config).is_file() for config in ("cfg.json", "config.json")):
        for path in (folder.absolute(), folder.resolve()):
            tail = "/".join(path.parts[-6:])
            places = _PLACES.findall(tail)
            if places and places[-1]:
                raise SAEError(
                    f"SAE {name}: lies in {tail}, which says {places[-1]}; expected an SAE of "
                    "the residual stream. Take one"
                )


def _recorded(folder: Path, recorded: Mapping[str, str]) -> str | None:
    """The hook point that a folder's manifest states of a local SAE, by the sha256 of its file."""
    for file in _WEIGHTS:
        if not (folder / file).is_file():
            continue
        with (folder / file).open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        if digest in recorded:
            return recorded[digest]
    return None


# --------------------------------------------------------------------------- the layouts


def _load_sae(source: SAESource, recipe: Recipe, name: str) -> tuple[Any, dict[str, str | None]]:
    """(SAE, the hook points that it states)."""
    import torch
    from sae_lens.saes.transcoder import Transcoder

    folder = None if source.path is None else recipe.local(source.path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they concern training, or other model libraries
            sae = _open_sae(source, folder)
    except SAEError:
        raise
    except Exception as error:  # sae_lens lets every kind through: hub, JSON, keys, shapes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        remedy = (
            "check the name and the network, or name a local folder with `path`"
            if folder is None
            else "expected one as sae_lens saves it; save it again, or download it again"
        )
        raise SAEError(f"SAE {name}: sae_lens cannot load it ({reason}); {remedy}") from error
    if isinstance(sae, Transcoder):
        raise SAEError(
            f"SAE {name}: is a transcoder, which writes another place than it reads; expected an "
            "SAE of the residual stream. Take one"
        )
    stated = {
        f"the SAE's {key}": sae.cfg.metadata.get(key)
        for key in ("hook_name", "hf_hook_name", "hook_name_out", "hf_hook_name_out")
    }
    if folder is not None and not (folder / "cfg.json").is_file():
        stated |= _gemma_scope_hooks(folder)
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
    import torch
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
    from safetensors.torch import load_file

    if (folder / "params.npz").is_file():
        arrays = read_npz(folder / "params.npz", ARRAY_BYTES)
        if odd := [name for name, array in arrays.items() if array.dtype.kind != "f"]:
            raise SAEError(
                f"SAE {folder}: {odd[0]} holds {arrays[odd[0]].dtype}; expected floating-point "
                "numbers. Download it again"
            )
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
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
            raise SAEError(
                f"SAE {folder}: has no {key}; it has {', '.join(sorted(tensors))}. "
                "Download it again"
            )
        weights[key] = found.float()
    if more := {key.replace("w_", "W_") for key in tensors} - set(weights):
        raise SAEError(
            f"SAE {folder}: holds {', '.join(sorted(more))} too; expected "
            f"{', '.join(weights)} and nothing else. Take another SAE"
        )
    d_in, d_sae = weights["W_enc"].shape
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=d_in, d_sae=d_sae, apply_b_dec_to_input=False))
    sae.load_state_dict(weights)
    return sae


def _gemma_scope_hooks(folder: Path) -> dict[str, str | None]:
    """The modules that Gemma Scope 2 states in config.json; Gemma Scope's files state none."""
    try:
        config = read_json(folder / "config.json")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise SAEError(
            f"SAE config {folder / 'config.json'}: {error}; expected Gemma Scope 2's config.json. "
            "Download it again"
        ) from error
    if not isinstance(config, dict):
        raise SAEError(
            f"SAE config {folder / 'config.json'}: is no JSON object; expected Gemma Scope 2's "
            "config.json. Download it again"
        )
    stated = {key: config.get(key) for key in ("hf_hook_point_in", "hf_hook_point_out")}
    return {f"the SAE's {k}": None if v is None else str(v) for k, v in stated.items()}
