"""What an SAE's cfg.json says, as sae_lens 6 writes it and as older versions did.

sae_lens drops what its classes have no field for without a word, so a config can say more than
sae_lens computes. Whatever would change an SAE's activations or its place is refused here; `FIELDS`
sorts every field that sae_lens's loaders know into what is read, checked and of no account.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from bake.errors import SAEError, shown
from bake.reading.capped import read_json
from bake.sources import layer_of

_V6 = Version("6.0.0-rc.0")
_LONGEST_VERSION = 64
_OLD_NAMES = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
"""Before sae_lens 6, and what they became. Source: sae_lens, handle_pre_6_0_config."""
_READ = (
    *("architecture", "d_in", "d_sae", "apply_b_dec_to_input", "normalize_activations"),
    *("metadata", "sae_lens_version", "hook_name", "hf_hook_name", "neuronpedia_id"),
    *("k", "rescale_acts_by_decoder_norm"),
)
_CHECKED: dict[str, tuple[Any, ...]] = {
    "activation_fn": (None, "relu"),
    "activation_fn_kwargs": (None, {}),
    "reshape_activations": (None, "none"),
    "hook_head_index": (None,),
    "hook_head_index_out": (None,),
    "hook_name_out": (None,),
    "hf_hook_name_out": (None,),
}
"""By field, the values with which an SAE is one of the residual stream with ReLU."""
_OF_NO_ACCOUNT = (
    *("dtype", "device", "model_name", "model_class_name", "model_from_pretrained_kwargs"),
    *("prepend_bos", "exclude_special_tokens", "context_size", "seqpos_slice", "dataset_path"),
    *("dataset_trust_remote_code", "sae_lens_training_version", "finetuning_scaling_factor"),
)
"""How it was stored and trained; `finetuning_scaling_factor` is a tensor where it matters."""
FIELDS = frozenset({*_OLD_NAMES, *_READ, *_CHECKED, *_OF_NO_ACCOUNT})
"""Every field that is known here; others say nothing of what an SAE computes."""

_ARCHITECTURES = ("standard", "jumprelu", "gated", "topk")
_TRAINING = (
    "this is a training checkpoint; save it with save_inference_model(), which writes a JumpReLU "
    "SAE"
)
_TRANSCODER = (
    "a transcoder reads one place and writes another, so there is nothing to put back where it "
    "reads"
)
REASONS = {
    "abstopk": "it keeps the k largest by size, negative ones too, which are above no trigger",
    "batchtopk": _TRAINING,
    "matryoshka_batchtopk": _TRAINING,
    "transcoder": _TRANSCODER,
    "skip_transcoder": _TRANSCODER,
    "jumprelu_transcoder": _TRANSCODER,
    "jumprelu_skip_transcoder": _TRANSCODER,
    "temporal": "its features depend on the tokens before, and a clamp sees one token",
    "matching_pursuit": "it picks features one after another, and each pick changes the next",
}
"""Why an architecture of sae_lens cannot be cut down to a few features exactly, nor taken whole."""
_NORMALISATIONS = {
    "expected_average_only_in": "Multiply its factor into the weights with sae_lens's "
    "fold_activation_norm_scaling_factor and save_model it again",
    "covariance_whitening": "Put it into the weights with sae_lens's fold_activation_whitening "
    "and save_model it again",
    "layer_norm": "It divides by each token's own norm, which no weights can; take an SAE that "
    "was trained without",
    "constant_norm_rescale": "It divides by each token's own norm, which no weights can; take an "
    "SAE that was trained without",
}
"""What to do about each of sae_lens's normalisations of the input."""


@dataclass(frozen=True)
class LensConfig:
    """A cfg.json, checked."""

    architecture: str
    """standard | jumprelu | gated | topk."""
    d_in: int
    d_sae: int
    apply_b_dec_to_input: bool
    normalize_activations: str
    """none, or expected_average_only_in where a release states the factor."""
    hook_point: str | None
    """None where it states none."""
    is_slice: bool
    """Whether it says that it is a slice of an SAE."""
    topk: int | None = None
    """topk only: how many features are active on a token."""
    by_decoder_norm: bool = False
    """topk only: activations are multiplied by the length of the feature's decoder row, which is
    divided by it. Source: sae_lens, `rescale_acts_by_decoder_norm`."""


def read_lens_config(path: Path, *, has_factor: bool = False) -> LensConfig:
    """Read a cfg.json, refusing what sae_lens refuses and what it would drop unseen.

    Args:
        path: of the file.
        has_factor: the norm scaling factor of the SAE's input is known.

    Raises:
        SAEError: one line with the field, what came and what was expected.
    """
    cfg, metadata, is_old = _fields(path)

    def refuse(key: str, got: Any, expected: str, remedy: str = "Save the SAE again") -> SAEError:
        return SAEError(f"SAE config {path}: {key} is {shown(got)}; expected {expected}. {remedy}")

    for where in (cfg, metadata):
        for key, neutral in _CHECKED.items():
            if key in where and where[key] not in neutral:
                topk = is_old and key == "activation_fn" and where[key] == "topk"
                if topk or (key == "activation_fn_kwargs" and cfg.get("activation_fn") == "topk"):
                    continue  # an architecture by another name, below
                raise refuse(
                    key,
                    where[key],
                    " or ".join("null" if value is None else str(value) for value in neutral),
                    "sae_lens drops it, or computes something else than a residual SAE with ReLU; "
                    "take another SAE",
                )
    architecture = cfg.get("architecture", "standard" if is_old else None)
    if is_old and cfg.get("activation_fn") == "topk":
        architecture = "topk"
    if not isinstance(architecture, str) or architecture not in (*_ARCHITECTURES, *REASONS):
        raise refuse("architecture", architecture, ", ".join(_ARCHITECTURES), "Take another SAE")
    if architecture in REASONS:
        raise SAEError(
            f"SAE config {path}: architecture {architecture} cannot be cut down to a few "
            f"features: {REASONS[architecture]}. Expected {', '.join(_ARCHITECTURES)}"
        )
    for key in ("d_in", "d_sae"):
        if type(cfg.get(key)) is not int or not 0 < cfg[key] < 1 << 32:
            raise refuse(key, cfg.get(key), "a whole number above 0")
    on_input = cfg.get("apply_b_dec_to_input", True)
    if type(on_input) is not bool:
        raise refuse("apply_b_dec_to_input", on_input, "true or false")
    topk, by_norm = None, False
    if architecture == "topk":
        kwargs = cfg.get("activation_fn_kwargs") or {}
        topk = kwargs.get("k") if is_old and isinstance(kwargs, dict) else cfg.get("k")
        if type(topk) is not int or not 0 < topk <= cfg["d_sae"]:
            raise refuse("k", topk, f"a whole number from 1 to d_sae, {cfg['d_sae']}")
        if "slice_of" in metadata:
            raise refuse(
                "slice_of", metadata["slice_of"], "all features of a TopK SAE", "Take it whole"
            )
        by_norm = cfg.get("rescale_acts_by_decoder_norm", False)
        if type(by_norm) is not bool:
            raise refuse("rescale_acts_by_decoder_norm", by_norm, "true or false")
    return LensConfig(
        architecture,
        cfg["d_in"],
        cfg["d_sae"],
        on_input,
        # A factor could only go beside a TopK SAE's encoder, where sae_lens multiplies it in.
        _normalisation(cfg, path, is_old=is_old, has_factor=has_factor and topk is None),
        _hook_point(cfg, metadata, path, is_old=is_old),
        "slice_of" in metadata,
        topk,
        by_norm,
    )


def neuronpedia_id_of(path: Path) -> str | None:
    """What a cfg.json says of Neuronpedia.

    Raises:
        SAEError: it is no JSON object.
    """
    cfg, metadata, _ = _fields(path)
    stated = metadata.get("neuronpedia_id") or cfg.get("neuronpedia_id")
    return stated if isinstance(stated, str) else None


def _fields(path: Path) -> tuple[dict[str, Any], dict[str, Any], bool]:
    """(Top level with today's names, metadata, whether it is older than sae_lens 6)."""
    try:
        cfg = read_json(path)
    except (OSError, ValueError) as error:
        raise SAEError(
            f"SAE config {path}: is no JSON object ({error}); expected sae_lens's cfg.json. "
            "Download it again"
        ) from error
    metadata = cfg.get("metadata", {}) if isinstance(cfg, dict) else None
    if not isinstance(cfg, dict) or not isinstance(metadata, dict):
        what = "metadata" if isinstance(cfg, dict) else "the file"
        raise SAEError(
            f"SAE config {path}: {what} is {shown(metadata if isinstance(cfg, dict) else cfg)}; "
            "expected a JSON object. Save the SAE again with sae_lens"
        )
    version = cfg.get("sae_lens_version") or metadata.get("sae_lens_version")
    try:
        if isinstance(version, str) and len(version) > _LONGEST_VERSION:
            raise InvalidVersion(version)
        is_old = not version or Version(version) < _V6
    except (InvalidVersion, TypeError) as error:
        raise SAEError(
            f"SAE config {path}: sae_lens_version is {shown(version)}; expected a version as "
            "6.0.0. Save the SAE again with sae_lens"
        ) from error
    for old, new in _OLD_NAMES.items():
        if old in cfg and cfg.get(new, cfg[old]) != cfg[old]:
            raise SAEError(
                f"SAE config {path}: {old} is {shown(cfg[old])}, but {new} is {shown(cfg[new])}; "
                "expected one of them. Remove the wrong one"
            )
    return {_OLD_NAMES.get(str(k), str(k)): v for k, v in cfg.items()}, metadata, is_old


def _normalisation(cfg: dict[str, Any], path: Path, *, is_old: bool, has_factor: bool) -> str:
    """The normalisation of the input."""
    stated = cfg.get("normalize_activations", "none")
    if is_old and (stated is None or isinstance(stated, bool)):
        stated = "expected_average_only_in" if stated else "none"
    if stated == "none" or (stated == "expected_average_only_in" and has_factor):
        return str(stated)
    remedy = _NORMALISATIONS.get(stated) if isinstance(stated, str) else None
    got = stated if remedy else shown(stated)
    raise SAEError(
        f"SAE config {path}: normalize_activations is {got}; expected none. "
        f"{remedy or 'Save the SAE again with sae_lens'}"
    )


def _hook_point(
    cfg: dict[str, Any], metadata: dict[str, Any], path: Path, *, is_old: bool
) -> str | None:
    """Where an SAE says that it sits; a name of another place goes before one of the residual."""
    source = cfg if is_old else metadata
    if not is_old:
        for key in ("hook_name", "hf_hook_name"):
            if key in cfg and cfg[key] != metadata.get(key):
                raise SAEError(
                    f"SAE config {path}: {key} is {shown(cfg[key])} at the top level, where "
                    f"sae_lens 6 does not read it; expected it in `metadata`. Move it there"
                )
    names = []
    for key in ("hook_name", "hf_hook_name"):
        name = source.get(key)
        if name is None and (key not in source or not is_old):
            continue
        if not isinstance(name, str) or not name:
            raise SAEError(
                f"SAE config {path}: {key} is {shown(name)}; expected a hook point as "
                "blocks.7.hook_resid_post. Save the SAE again with sae_lens"
            )
        names.append(name)
    layers = set()
    for name in names:
        try:
            layers.add(layer_of(name))
        except ValueError:
            return name
    if len(layers) > 1:
        raise SAEError(
            f"SAE config {path}: hook_name is {names[0]}, but hf_hook_name is {names[1]}; expected "
            "one place. Remove the wrong one"
        )
    return names[0] if names else None
