"""The file formats of SAEs: what is where, and what their configs say. No weight is read here.

To add one: an entry in `LAYOUTS`, and what the oracle makes of the same files in
`verify/reference/whole_sae.py`. The only file of `bake` besides the trainer that imports sae_lens,
and only for what sae_lens alone knows: its directory of releases and the configs of its older
versions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bake.errors import SAEError
from bake.recipe import Recipe
from bake.sae.array_file import ArrayFile
from bake.sources import SAESource, layer_of

_PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt")
_NOT_PRUNABLE = {
    "topk": "TopK keeps the k largest of all features, so every feature decides on every other",
    "abstopk": "TopK keeps the k largest of all features, so every feature decides on every other",
    "batchtopk": "this is a training checkpoint; save it with save_inference_model(), which "
    "writes a JumpReLU SAE",
    "matryoshka_batchtopk": "this is a training checkpoint; save it with save_inference_model(), "
    "which writes a JumpReLU SAE",
}


@dataclass(frozen=True)
class SAEFiles:
    """Where an SAE lies and how its file is to be read, before any value is."""

    weights: Path
    """safetensors or npz."""
    architecture: str
    """standard | jumprelu | gated."""
    apply_b_dec_to_input: bool
    hook_point: str | None
    """As the SAE states it, None where it does not."""
    lower_case: bool = False
    """Gemma Scope 2 writes `w_enc` for `W_enc`."""
    input_scale: float = 1.0
    """Norm scaling factor that the SAE's input was multiplied by in training."""


@dataclass(frozen=True)
class Layout:
    """One file format."""

    files: tuple[str, ...]
    """What a folder holds; the first tells the format."""
    read: Callable[[Path, Release | None], SAEFiles]
    """A folder of that format, and the release that it was downloaded from."""


@dataclass(frozen=True)
class Release:
    """Where a downloaded SAE came from."""

    repo_id: str
    """On the hub."""
    folder: str
    """Within the repository."""
    norm_scaling_factor: float | None
    """As sae_lens's directory states it."""


def find_sae(source: SAESource, recipe: Recipe) -> SAEFiles:
    """Locate an SAE and read its config; nothing of its weights.

    Raises:
        SAEError: it is missing, a pickle, or of a kind that cannot be pruned exactly.
    """
    if source.path is None:
        assert source.release is not None and source.id is not None
        return _find_release(source.release, source.id)
    return open_sae_folder(recipe.local(source.path))


def open_sae_folder(folder: Path) -> SAEFiles:
    """Read the config of an SAE in a local folder.

    Raises:
        SAEError: as `find_sae`.
    """
    for layout in LAYOUTS.values():
        if (folder / layout.files[0]).is_file():
            return layout.read(folder, None)
    candidates = [folder] if folder.is_file() else sorted(folder.glob("*"))
    if pickles := [path.name for path in candidates if path.suffix in _PICKLES]:
        raise SAEError(
            f"SAE {folder}: {pickles[0]} is a pickle, which can run code when it is read; "
            "expected cfg.json with sae_weights.safetensors, params.npz or params.safetensors. "
            "Convert it with sae_lens's save_model"
        )
    raise SAEError(
        f"SAE {folder}: no SAE there; expected a folder with cfg.json and "
        "sae_weights.safetensors (sae_lens), params.npz or params.safetensors (Gemma Scope)"
    )


def resolve_layer(files: SAEFiles, hook_point: str | None, name: str) -> tuple[int, str]:
    """The layer whose output is clamped, and the hook point's name.

    Args:
        files: the SAE.
        hook_point: what the recipe says, None where it does not.
        name: of the SAE, for errors.

    Raises:
        SAEError: neither says it, the two disagree, or it is no residual stream.
    """
    stated = hook_point or files.hook_point
    if stated is None:
        raise SAEError(f"SAE {name}: states no hook point; give `hook_point` in the recipe")
    try:
        layers = {layer_of(point) for point in (hook_point, files.hook_point) if point}
    except ValueError as error:
        raise SAEError(f"SAE {name}: {error}") from error
    if len(layers) > 1:
        raise SAEError(
            f"SAE {name}: sits at {files.hook_point}, the recipe says {hook_point}; "
            "remove `hook_point`, or take another SAE"
        )
    return layers.pop(), stated


def neuronpedia_id(source: SAESource, recipe: Recipe) -> str | None:
    """Where Neuronpedia shows an SAE's features (`model/layer-sae`), if it does."""
    if source.path is None:
        from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

        assert source.release is not None and source.id is not None
        release = get_pretrained_saes_directory().get(source.release)
        return release.neuronpedia_id.get(source.id) if release is not None else None
    path = recipe.local(source.path) / "cfg.json"
    cfg = _sae_lens_config(path) if path.is_file() else {}
    stated = (cfg.get("metadata") or {}).get("neuronpedia_id") or cfg.get("neuronpedia_id")
    return stated if isinstance(stated, str) else None


def _find_release(release: str, sae_id: str) -> SAEFiles:
    """A sae_lens release, downloaded through the hub's cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    from sae_lens.loading.pretrained_sae_loaders import get_conversion_loader_name
    from sae_lens.loading.pretrained_saes_directory import (
        get_norm_scaling_factor,
        get_pretrained_saes_directory,
        get_repo_id_and_folder_name,
    )

    known = get_pretrained_saes_directory()
    if release in known and sae_id not in known[release].saes_map:
        some = ", ".join(list(known[release].saes_map)[:3])
        raise SAEError(f'SAE release {release}: no id "{sae_id}"; expected one of {some}, …')
    if release not in known and "/" not in release:
        raise SAEError(
            f"SAE release {release}: unknown; expected a release of sae_lens, or owner/repository"
        )
    repo_id, folder = get_repo_id_and_folder_name(release, sae_id)
    name = get_conversion_loader_name(release)
    if (layout := LAYOUTS.get(name)) is None:
        raise SAEError(
            f"SAE release {release}: its layout ({name}) is not supported; expected a release "
            "in sae_lens's own format, Gemma Scope or Gemma Scope 2. Load it with sae_lens and "
            "save_model it into a folder"
        )
    try:
        paths = [Path(hf_hub_download(repo_id, f"{folder}/{file}")) for file in layout.files]
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise SAEError(
            f"SAE release {release}, id {sae_id}: cannot be downloaded from {repo_id} "
            f"({type(error).__name__}); check the network, or name a local folder with `path`"
        ) from error
    scale = get_norm_scaling_factor(release, sae_id)
    return layout.read(paths[0].parent, Release(repo_id, folder, scale))


def _sae_lens(folder: Path, release: Release | None) -> SAEFiles:
    weights = folder / "sae_weights.safetensors"
    if not weights.is_file():
        raise SAEError(f"SAE {folder}: sae_weights.safetensors is missing beside cfg.json")
    cfg = _sae_lens_config(folder / "cfg.json")
    architecture = cfg.get("architecture", "standard")
    if architecture not in ("standard", "jumprelu", "gated"):
        reason = _NOT_PRUNABLE.get(architecture, "its features do not act one by one")
        raise SAEError(
            f"SAE {folder}: architecture {architecture} cannot be cut down to a few features: "
            f"{reason}. Expected standard, jumprelu or gated"
        )
    metadata = cfg.get("metadata") or {}
    normalisation = cfg.get("normalize_activations") or "none"
    scale = 1.0
    stated = None if release is None else release.norm_scaling_factor
    if normalisation == "expected_average_only_in" and stated is not None:
        scale = stated
    elif normalisation != "none":
        raise SAEError(
            f"SAE {folder}: normalize_activations is {normalisation}; expected none. "
            "Fold it into the weights with sae_lens and save the SAE again"
        )
    return SAEFiles(
        weights=weights,
        architecture=architecture,
        apply_b_dec_to_input=cfg.get("apply_b_dec_to_input", True),
        hook_point=metadata.get("hook_name") or cfg.get("hook_name"),
        input_scale=scale,
    )


def _sae_lens_config(path: Path) -> dict[str, Any]:
    """cfg.json as sae_lens 6 writes it; older ones are brought up to date by sae_lens itself."""
    try:
        cfg: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        metadata = cfg.get("metadata") or {}
    except (OSError, ValueError, AttributeError) as error:
        raise SAEError(f"SAE config {path}: is no JSON object ({error})") from error
    version = str(metadata.get("sae_lens_version") or cfg.get("sae_lens_version") or "")
    if version[:1].isdigit() and int(version.split(".")[0]) >= 6:
        return cfg
    from sae_lens.loading.pretrained_sae_loaders import handle_config_defaulting

    return dict(handle_config_defaulting(cfg))


def _gemma_scope(folder: Path, release: Release | None) -> SAEFiles:
    """Its place in the model stands in the names of its folders only: `layer_7/width_16k/…`."""
    if release is None:
        hook_point = _hook_from_path(folder)
    elif "-res" in release.repo_id:
        hook_point = _hook_from_path(Path(release.folder))
    else:
        hook_point = f"{release.repo_id}/{release.folder}"
    return _jumprelu(folder / "params.npz", hook_point)


def _gemma_scope_2(folder: Path, release: Release | None) -> SAEFiles:
    """Its place stands in config.json (`model.layers.9.output`), or in its path."""
    if release is None:
        try:
            stated = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            module = str(stated["hf_hook_point_in"])
        except (OSError, ValueError, KeyError, TypeError):
            hook_point = _hook_from_path(folder)
        else:
            layer = re.fullmatch(r"model\.layers\.(\d+)\.output", module)
            hook_point = f"blocks.{layer[1]}.hook_resid_post" if layer else module
    elif "resid_post" in release.folder:
        hook_point = _hook_from_path(Path(release.folder))
    else:
        hook_point = f"{release.repo_id}/{release.folder}"
    return _jumprelu(folder / "params.safetensors", hook_point)


def _hook_from_path(folder: Path) -> str | None:
    layers = re.findall(r"layer_(\d+)", folder.as_posix())
    return f"blocks.{layers[-1]}.hook_resid_post" if layers else None


def _jumprelu(weights: Path, hook_point: str | None) -> SAEFiles:
    """Gemma Scope's arrays: no b_dec on the input. Source: Lieberum et al., arXiv 2408.05147."""
    arrays = ArrayFile.open(weights)
    if "affine_skip_connection" in arrays.shapes:
        raise SAEError(f"SAE {weights}: is a transcoder; expected an SAE of the residual stream")
    return SAEFiles(
        weights=weights,
        architecture="jumprelu",
        apply_b_dec_to_input=False,
        hook_point=hook_point,
        lower_case="w_enc" in arrays.shapes,
    )


LAYOUTS: dict[str, Layout] = {
    "sae_lens": Layout(("cfg.json", "sae_weights.safetensors"), _sae_lens),
    "gemma_2": Layout(("params.npz",), _gemma_scope),
    "gemma_3": Layout(("params.safetensors",), _gemma_scope_2),
}
"""By the names that sae_lens gives the formats of its releases: its own, Gemma Scope, and Gemma
Scope 2. In a local folder the first that fits is meant."""
