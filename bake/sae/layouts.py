"""The file formats of SAEs: what is where, and what their configs say. No weight is read here.

To add one: an entry in `LAYOUTS`, and what the oracle makes of the same files in
`verify/reference/whole_sae.py`. The only file of `bake` besides the trainer that imports sae_lens,
and only for what sae_lens alone knows: its directory of releases.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bake.errors import SAEError, short, shown
from bake.reading.capped import read_json
from bake.recipe import Recipe
from bake.sae.array_file import ArrayFile
from bake.sae.lens_config import neuronpedia_id_of, read_lens_config
from bake.sources import SAESource, layer_of

_PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt")
_RESIDUAL = re.compile(r"gemma-scope-.*-res\b|resid_post")
"""A folder's name that says residual stream, as Gemma Scope's repositories and Gemma Scope 2's
folders have it."""
_ELSEWHERE = frozenset(
    {"mlp", "att", "attn", "transcoder", "transcoders", "clt", "crosscoder", "embedding"}
)
"""Words of a folder's name that say another place."""
_DEPTH = 6
"""Folders of a path that are looked at: an SAE's in the hub's cache, from the repository's on."""


@dataclass(frozen=True)
class SAEFiles:
    """Where an SAE lies and how its file is to be read, before any value is."""

    weights: Path
    """safetensors or npz."""
    architecture: str
    """standard | jumprelu | gated | topk."""
    apply_b_dec_to_input: bool
    hook_point: str | None
    """As the SAE states it, None where it does not."""
    layer: int | None = None
    """The layer that its folders name, where nothing says which place in it."""
    stated_size: tuple[int, int] | None = None
    """(d_in, d_sae) as its config states them."""
    lower_case: bool = False
    """Gemma Scope 2 writes `w_enc` for `W_enc`."""
    input_scale: float = 1.0
    """Norm scaling factor that the SAE's input was multiplied by in training."""
    is_slice: bool = False
    """Some features of an SAE, of which its config says so: they reconstruct nothing."""
    topk: int | None = None
    """topk only: how many features are active on a token."""
    by_decoder_norm: bool = False
    """topk only: activations are multiplied by the length of the feature's decoder row."""


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
    """The layer whose output is clamped, and the hook point as TransformerLens names it.

    Args:
        files: the SAE.
        hook_point: what the recipe says, None where it does not.
        name: of the SAE, for errors.

    Raises:
        SAEError: neither says it, the two disagree, or it is no residual stream.
    """
    stated = hook_point or files.hook_point
    if stated is None:
        only = "" if files.layer is None else f" (its folders name layer {files.layer} only)"
        raise SAEError(
            f"SAE {name}: states no hook point{only}; expected one of the residual stream. If it "
            "is, give `hook_point` in the recipe"
        )
    try:
        layers = {layer_of(point) for point in (hook_point, files.hook_point) if point}
    except ValueError as error:
        raise SAEError(f"SAE {name}: {error}; take an SAE of the residual stream") from error
    if len(layers | ({files.layer} - {None})) > 1:
        sits = files.hook_point or f"layer {files.layer}, as its folders say"
        raise SAEError(
            f"SAE {name}: sits at {sits}, the recipe says {hook_point}; "
            "remove `hook_point`, or take another SAE"
        )
    layer = layers.pop()
    return layer, stated if ".hook_resid_" in stated else f"blocks.{layer}.hook_resid_post"


def neuronpedia_id(source: SAESource, recipe: Recipe) -> str | None:
    """Where Neuronpedia shows an SAE's features (`model/layer-sae`), if it does."""
    if source.path is None:
        from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

        assert source.release is not None and source.id is not None
        release = get_pretrained_saes_directory().get(source.release)
        return release.neuronpedia_id.get(source.id) if release is not None else None
    path = recipe.local(source.path) / "cfg.json"
    return neuronpedia_id_of(path) if path.is_file() else None


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
    if release not in known and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", release, re.ASCII):
        raise SAEError(
            f"SAE release {short(release)}: unknown; expected a release of sae_lens, or "
            "owner/repository"
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
        raise SAEError(
            f"SAE {folder}: sae_weights.safetensors is missing beside cfg.json; expected both. "
            "Download it again"
        )
    factor = None if release is None else release.norm_scaling_factor
    cfg = read_lens_config(folder / "cfg.json", has_factor=factor is not None)
    return SAEFiles(
        weights=weights,
        architecture=cfg.architecture,
        apply_b_dec_to_input=cfg.apply_b_dec_to_input,
        hook_point=cfg.hook_point,
        stated_size=(cfg.d_in, cfg.d_sae),
        input_scale=1.0 if cfg.normalize_activations == "none" or factor is None else factor,
        is_slice=cfg.is_slice,
        topk=cfg.topk,
        by_decoder_norm=cfg.by_decoder_norm,
    )


def _gemma_scope(folder: Path, release: Release | None) -> SAEFiles:
    """Its place in the model stands in the names of its folders only."""
    return _jumprelu(folder / "params.npz", *_place(folder, release))


def _gemma_scope_2(folder: Path, release: Release | None) -> SAEFiles:
    """Its place stands in config.json (`model.layers.9.output`), or in its folders' names."""
    config = folder / "config.json"
    stated = None
    if release is None and config.is_file():
        try:
            said = read_json(config)
            kind, stated = said.get("architecture"), said.get("hf_hook_point_in")
            out = said.get("hf_hook_point_out") or stated
        except (OSError, ValueError, AttributeError) as error:
            raise SAEError(
                f"SAE config {config}: is no JSON object ({error}); expected Gemma Scope 2's "
                "config.json. Download it again"
            ) from error
        if kind not in (None, "jump_relu") or out != stated:
            raise SAEError(
                f"SAE config {config}: architecture is {shown(kind)}, hf_hook_point_in is "
                f"{shown(stated)}, hf_hook_point_out is {shown(out)}; expected jump_relu that "
                "writes where it reads. Take an SAE of the residual stream"
            )
    place = _place(folder, release) if stated is None else (str(stated), None)
    return _jumprelu(folder / "params.safetensors", *place)


def _place(folder: Path, release: Release | None) -> tuple[str | None, int | None]:
    """(Hook point, layer) as the names of an SAE's folders say them, the innermost first.

    The hook point is None where no name says which of a layer's places is meant, and the name
    itself where it says another place than the residual stream.
    """
    if release is not None:
        paths = [Path(release.repo_id) / release.folder]
    else:  # as it is written, and where links lead
        paths = [folder.absolute(), folder.resolve()]
    layer, says_residual = None, False
    for path in paths:
        names = path.parts[-_DEPTH:]
        for name in reversed(names):
            if _ELSEWHERE & set(re.split(r"[-_.]", name)):
                return name, None
            if _RESIDUAL.search(name):
                says_residual = True
                break
        numbers = re.findall(r"layer_([0-9]{1,4})(?![0-9])", "/".join(names))
        if layer is None and numbers:
            layer = int(numbers[-1])
    if says_residual and layer is not None:
        return f"blocks.{layer}.hook_resid_post", None
    return None, layer


def _jumprelu(weights: Path, hook_point: str | None, layer: int | None) -> SAEFiles:
    """Gemma Scope's arrays: no b_dec on the input. Source: Lieberum et al., arXiv 2408.05147."""
    arrays = ArrayFile.open(weights)
    if "affine_skip_connection" in arrays.shapes:
        raise SAEError(
            f"SAE {weights}: is a transcoder (affine_skip_connection); expected an SAE of the "
            "residual stream. Take one"
        )
    return SAEFiles(
        weights=weights,
        architecture="jumprelu",
        apply_b_dec_to_input=False,
        hook_point=hook_point,
        layer=layer,
        lower_case="w_enc" in arrays.shapes,
    )


LAYOUTS: dict[str, Layout] = {
    "sae_lens": Layout(("cfg.json", "sae_weights.safetensors"), _sae_lens),
    "gemma_2": Layout(("params.npz",), _gemma_scope),
    "gemma_3": Layout(("params.safetensors",), _gemma_scope_2),
}
"""By the names that sae_lens gives the formats of its releases: its own, Gemma Scope, and Gemma
Scope 2. In a local folder the first that fits is meant."""
