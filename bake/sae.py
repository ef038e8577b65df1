"""Any SAE, cut down to the features that a clamp needs, with everything foldable folded.

The only file in `bake` that imports sae_lens, and only for what sae_lens alone knows: its
directory of releases and the configs of its older versions.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bake.arrays import Array, ArrayFile
from bake.errors import SAEError
from bake.recipe import Recipe, SAESource, layer_of

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
class SAESlice:
    """A few features of an SAE: everything that their activations and directions depend on."""

    W_enc: Array = field(repr=False)
    """[d_in, k]."""
    b_enc: Array = field(repr=False)
    """[k], with b_dec and input normalisation folded in."""
    theta: Array = field(repr=False)
    """[k], JumpReLU threshold; 0 is ReLU."""
    W_dec: Array = field(repr=False)
    """[k, d_in]."""
    features: tuple[int, ...]
    """The k features, in the order of the arrays."""
    architecture: str
    sha256: str
    """Of the SAE's weights file."""


@dataclass(frozen=True)
class SAEEncoder:
    """What the activations of every feature of an SAE depend on."""

    W_enc: Array = field(repr=False)
    """[d_in, d_sae]."""
    b_enc: Array = field(repr=False)
    """[d_sae], folded."""
    theta: Array = field(repr=False)
    """[d_sae], at least 0: a feature fires where pre > theta, and its activation is then pre."""
    sha256: str
    """Of the SAE's weights file."""


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
    if (folder / "cfg.json").is_file():
        return _sae_lens_folder(folder, norm_scaling_factor=None)
    if (folder / "params.npz").is_file():
        return _gemma_scope(folder / "params.npz", _hook_from_path(folder))
    if (folder / "params.safetensors").is_file():
        return _gemma_scope(folder / "params.safetensors", _hook_of_gemma_scope_2(folder))
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


def size_of(files: SAEFiles) -> tuple[int, int]:
    """(d_in, d_sae) of an SAE, from its file's directory."""
    arrays = ArrayFile.open(files.weights)
    shape = arrays.shapes.get(_key(files, "W_enc"), ())
    if len(shape) != 2:
        raise SAEError(
            f"SAE file {files.weights}: W_enc has shape {list(shape)}; expected [d_in, d_sae]"
        )
    return shape[0], shape[1]


def load_slice(files: SAEFiles, features: Sequence[int]) -> SAESlice:
    """Read the given features of an SAE, folded, in its own activation units.

    Raises:
        SAEError: a tensor is missing, of the wrong shape, or not finite anywhere in the file.
    """
    arrays, k = ArrayFile.open(files.weights), list(features)
    d_in, d_sae = size_of(files)
    W_dec = arrays.rows(_checked(files, arrays, "W_dec", d_sae, d_in), k)
    W_enc, b_enc, theta = _encoder(files, arrays, k)
    return SAESlice(
        W_enc,
        b_enc,
        theta,
        W_dec if files.input_scale == 1.0 else W_dec / np.float32(files.input_scale),
        tuple(k),
        files.architecture,
        sha256_of(files),
    )


def load_encoder(files: SAEFiles) -> SAEEncoder:
    """Read the encoder of every feature, folded, in the SAE's own activation units.

    Raises:
        SAEError: as `load_slice`.
    """
    W_enc, b_enc, theta = _encoder(files, ArrayFile.open(files.weights), None)
    return SAEEncoder(W_enc, b_enc, np.maximum(theta, 0), sha256_of(files))


def load_decoder(files: SAEFiles) -> Array:
    """Read the decoder row of every feature, folded: [d_sae, d_in]."""
    arrays = ArrayFile.open(files.weights)
    d_in, d_sae = size_of(files)
    key = _checked(files, arrays, "W_dec", d_sae, d_in)
    W_dec = arrays.matrix(key)
    return W_dec if files.input_scale == 1.0 else W_dec / np.float32(files.input_scale)


def sha256_of(files: SAEFiles) -> str:
    """sha256 of the SAE's weights file."""
    with files.weights.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def _encoder(files: SAEFiles, arrays: ArrayFile, k: list[int] | None) -> tuple[Array, Array, Array]:
    """(W_enc [d_in, k], b_enc [k], theta [k]) of some features, or of all, folded."""
    d_in, d_sae = size_of(files)

    def vector(name: str) -> Array:
        whole = arrays.vector(_checked(files, arrays, name, d_sae))
        return whole if k is None else whole[k]

    key = _checked(files, arrays, "W_enc", d_in, d_sae)
    W_enc = arrays.matrix(key) if k is None else arrays.columns(key, k)
    b_dec = arrays.vector(_checked(files, arrays, "b_dec", d_in))
    if files.architecture == "gated":
        W_enc, b_enc, theta = _gate_as_threshold(
            W_enc, vector("b_gate"), vector("b_mag"), vector("r_mag")
        )
    elif files.architecture == "jumprelu":
        b_enc, theta = vector("b_enc"), vector("threshold")
    else:
        b_enc = vector("b_enc")
        theta = np.zeros_like(b_enc)
    if files.input_scale != 1.0:
        # encode(s·x) as an encoder of x. Source: sae_lens, fold_activation_norm_scaling_factor.
        W_enc = W_enc * np.float32(files.input_scale)
        b_dec = b_dec / np.float32(files.input_scale)
    if files.apply_b_dec_to_input:
        b_enc = _fold_b_dec(b_enc, b_dec, W_enc)
    return W_enc, b_enc, theta


def _checked(files: SAEFiles, arrays: ArrayFile, name: str, *shape: int) -> str:
    """A tensor's key, once its shape is what it has to be."""
    key = _key(files, name)
    if arrays.shapes.get(key) != shape:
        got = list(arrays.shapes[key]) if key in arrays.shapes else "nothing"
        raise SAEError(f"SAE file {files.weights}: {key} has shape {got}; expected {list(shape)}")
    return key


# ------------------------------------------------------------------------------- the folding


def _gate_as_threshold(
    W_enc: Array, b_gate: Array, b_mag: Array, r_mag: Array
) -> tuple[Array, Array, Array]:
    """A gated SAE as JumpReLU.

    It fires where x·W + b_gate > 0, with activation relu(x·W·exp(r) + b_mag). Multiplying the
    gate by exp(r) > 0 gives pre > b_mag - b_gate·exp(r) for pre = x·W·exp(r) + b_mag.
    """
    gain = np.exp(r_mag.astype(np.float64))
    theta = b_mag.astype(np.float64) - b_gate * gain
    return (W_enc * gain).astype(np.float32), b_mag, theta.astype(np.float32)


def _fold_b_dec(b_enc: Array, b_dec: Array, W_enc: Array) -> Array:
    """(x - b_dec) @ W_enc + b_enc  =  x @ W_enc + (b_enc - b_dec @ W_enc)."""
    return (b_enc - b_dec.astype(np.float64) @ W_enc).astype(np.float32)


# ------------------------------------------------------------------------------- the layouts


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
    layout = get_conversion_loader_name(release)
    names = {
        "sae_lens": ("cfg.json", "sae_weights.safetensors"),
        "gemma_2": ("params.npz",),
        "gemma_3": ("params.safetensors",),
    }
    if layout not in names:
        raise SAEError(
            f"SAE release {release}: its layout ({layout}) is not supported; expected a release "
            "in sae_lens's own format, Gemma Scope or Gemma Scope 2. Load it with sae_lens and "
            "save_model it into a folder"
        )
    try:
        paths = [Path(hf_hub_download(repo_id, f"{folder}/{name}")) for name in names[layout]]
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise SAEError(
            f"SAE release {release}, id {sae_id}: cannot be downloaded from {repo_id} "
            f"({type(error).__name__}); check the network, or name a local folder with `path`"
        ) from error
    if layout == "sae_lens":
        return _sae_lens_folder(paths[0].parent, get_norm_scaling_factor(release, sae_id))
    kind = "resid_post" in folder if layout == "gemma_3" else "-res" in repo_id
    hook_point = _hook_from_path(Path(folder)) if kind else f"{repo_id}/{folder}"
    return _gemma_scope(paths[0], hook_point)


def _sae_lens_folder(folder: Path, norm_scaling_factor: float | None) -> SAEFiles:
    """sae_lens's own format: cfg.json and sae_weights.safetensors."""
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
    if normalisation == "expected_average_only_in" and norm_scaling_factor is not None:
        scale = norm_scaling_factor
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


def _gemma_scope(weights: Path, hook_point: str | None) -> SAEFiles:
    """Gemma Scope (npz) and Gemma Scope 2 (lower-case keys): JumpReLU, no b_dec on the input."""
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


def _hook_from_path(folder: Path) -> str | None:
    """Gemma Scope states the layer in the folder's name only: `layer_7/width_16k/…`."""
    layers = re.findall(r"layer_(\d+)", folder.as_posix())
    return f"blocks.{layers[-1]}.hook_resid_post" if layers else None


def _hook_of_gemma_scope_2(folder: Path) -> str | None:
    """Gemma Scope 2 states it in config.json (`model.layers.9.output`), or in its path."""
    try:
        stated = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        hook = str(stated["hf_hook_point_in"])
    except (OSError, ValueError, KeyError, TypeError):
        return _hook_from_path(folder)
    layer = re.fullmatch(r"model\.layers\.(\d+)\.output", hook)
    return f"blocks.{layer[1]}.hook_resid_post" if layer else hook


def _key(files: SAEFiles, name: str) -> str:
    return name.replace("W_", "w_") if files.lower_case else name


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
