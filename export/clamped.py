"""A clamped folder as it lies on disk: where its clamps sit, its config, and where its tensors lie.

The only reader of such a folder beside `manifest.py`; no weight of the base is read here.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from bake.base import INDEX, wrong_size
from bake.errors import FolderError, short, shown
from bake.families import FAMILIES, Family, family_of
from bake.new_folder import MANIFEST
from bake.reading.model_config import wrong_clamp, wrong_field
from bake.tensors import DTYPES, StoredTensor, indexed_tensors
from export.carriers.carriers import CARRIERS
from export.clamp_sites import ClampSite, read_site
from export.code_check import check_code
from export.folder_contents import check_contents, check_files
from export.manifest import AGAIN, Manifest, read_json

_HELD = (*DTYPES.values(), "BOOL")
"""Formats of the tensors of a folder."""
_OWN = ("auto_map", "sae_clamp", "transformers.js_config")
"""Fields of a clamped config that its base's has not."""
GUARD = "clamped, load with trust_remote_code=True: "
"""What stands before the activation's name in a checkpoint's config: no stock class knows it."""

_AS_RUN = (
    *("head_dim", "layer_types", "num_key_value_heads", "query_pre_attn_scalar", "rms_norm_eps"),
)
"""Fields, besides the activation's, that transformers fills or reads otherwise than they stand."""


@dataclass(frozen=True)
class Clamped:
    """A clamped checkpoint's folder, or a compiled one, checked for completeness."""

    folder: Path
    manifest: Manifest
    config: Any
    """An object of the clamped config class; of the stock one where the clamp is compiled in."""
    model_class: str
    """In modeling_clamped_gemma.py, or transformers' own."""
    tensors: Mapping[str, StoredTensor]
    """By name, the clamps' among them."""
    layer_prefix: str
    """What stands before the layer's number in tensor names, `model.layers.` mostly."""
    sites: tuple[ClampSite, ...] = ()
    """By layer. None where the clamp is compiled in."""
    exempt_token_ids: tuple[int, ...] = ()
    """Tokens that a site with `exempt_bos` leaves alone."""

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name

    @property
    def model_type(self) -> str:
        """The base's, a key of `FAMILIES`."""
        return str(self.config.model_type).removeprefix("clamped_")

    @property
    def family(self) -> Family:
        """The base's."""
        return family_of(self.model_type)

    @property
    def backbone_prefix(self) -> str:
        """What stands before `embed_tokens.weight` and `norm.weight`."""
        return self.layer_prefix.removesuffix("layers.")

    @property
    def head(self) -> str:
        """Name of the output matrix, [vocab, d_in]: the embedding table where they are tied."""
        own = [name for name in self.tensors if name.endswith("lm_head.weight")]
        return own[0] if own else f"{self.backbone_prefix}embed_tokens.weight"

    @property
    def shards(self) -> list[str]:
        """Names of the weight files."""
        return sorted({tensor.file.name for tensor in self.tensors.values()})

    @cached_property
    def base_config(self) -> dict[str, Any]:
        """The base's config.json: stock names, no clamp, no guard before the activation, and in the
        fields of `_AS_RUN` what transformers makes of it.
        """
        stored = read_json(self.folder / "config.json")
        config = {key: stored[key] for key in stored if key not in _OWN}
        config |= {"model_type": self.model_type, "architectures": [self.family.architecture]}
        text = config.get("text_config") or config
        for name in ("hidden_activation", "hidden_act"):
            if isinstance(text.get(name), str):
                text[name] = text[name].removeprefix(GUARD)
        loaded = self.config.get_text_config()
        names = [self.family.activation_field, *_AS_RUN]
        apart = getattr(loaded, "per_layer_attributes", None) or ()  # of Gemma 4's heads
        runs = {name: getattr(loaded, name, None) for name in names if name not in apart}
        text |= {name: value for name, value in runs.items() if value is not None}
        return config

    @cached_property
    def base_tensors(self) -> dict[str, StoredTensor]:
        """The base's tensors by name."""
        return {name: t for name, t in self.tensors.items() if ".sae_clamp." not in name}

    @property
    def base_files(self) -> list[str]:
        """Names of the base's weight files."""
        return sorted({tensor.file.name for tensor in self.base_tensors.values()})

    @property
    def compiled_layers(self) -> list[int]:
        """Layers that hold a compiled clamp."""
        compiled = self.manifest.compiled
        return [layer for site in compiled.sites for layer in site.layers] if compiled else []

    @property
    def stored_in(self) -> str | None:
        """The dtype that a clamp was compiled in; None where it is not compiled."""
        return self.manifest.compiled.dtype if self.manifest.compiled else None


def weights_sha256(files: Mapping[str, str]) -> str:
    """One hash over the names and sha256 of several files: `name sha256` a line, by name."""
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def open_clamped(folder: Path, *, with_graphs: bool = False) -> Clamped:
    """Open a folder that `bakeout bake` wrote; its code is not run. All its files but the weights
    are hashed; those are `check_weights`'.

    Args:
        folder: what to open.
        with_graphs: accept whatever can have an ONNX graph, not the checkpoint alone.

    Raises:
        FolderError: it is no clamped checkpoint, is incomplete or damaged, or holds what bakeout
            does not write.
    """
    manifest = Manifest.read(folder)
    check_code(folder, manifest)
    carrier = CARRIERS.get(manifest.carrier)
    graphs = carrier is not None and with_graphs and not (carrier.over_base or carrier.trained)
    if carrier is None or not (carrier.own_code or graphs):
        raise FolderError(
            f"{folder}: is an export already (carrier {manifest.carrier}); expected a "
            "clamped checkpoint, as `bakeout bake` writes it"
        )
    check_contents(folder, manifest)
    check_files(folder, manifest, [name for name in manifest.files if not is_heavy(name)])
    return open_listed(folder, manifest)


def is_heavy(name: str) -> bool:
    """Whether a file holds numbers of the base: weights, and copies of them for a graph."""
    return name.endswith((".safetensors", ".onnx_data"))


def check_weights(clamped: Clamped, progress: Callable[[float], None] = lambda _: None) -> None:
    """Raise FolderError unless the weights of a folder are those that its manifest lists.

    Args:
        clamped: the folder.
        progress: called with the share of bytes hashed, 0 to 1.
    """
    check_files(clamped.folder, clamped.manifest, clamped.shards, progress)


def open_listed(folder: Path, manifest: Manifest) -> Clamped:
    """Open a folder by a manifest that is still to be written."""
    own = CARRIERS[manifest.carrier].own_code
    section = read_config(folder, manifest.carrier)["sae_clamp"]
    config, model_class = open_config(folder, stock=not own)
    weight_map = read_json(folder / INDEX).get("weight_map")
    try:
        tensors = indexed_tensors(folder, weight_map)
        if odd := [name for name, tensor in tensors.items() if tensor.dtype not in _HELD]:
            raise ValueError(
                f"{odd[0]} is {tensors[odd[0]].dtype}; expected one of {', '.join(_HELD)}"
            )
        prefix = re.compile(r"((?:.*\.)?layers\.)0\.mlp\.gate_proj\.weight")
        prefixes = [match[1] for name in tensors if (match := prefix.fullmatch(name))]
        if not prefixes:
            raise ValueError("no decoder layers among its tensors")
        gate = re.compile(re.escape(prefixes[0]) + r"[0-9]{1,4}\.mlp\.gate_proj\.weight")
        n_layers = sum(gate.fullmatch(name) is not None for name in tensors)
        stored = read_json(folder / "config.json")
        if (wrong := wrong_size(stored, tensors, prefixes[0], n_layers)) is not None:
            raise ValueError(wrong)
    except (OSError, ValueError) as error:
        raise FolderError(f"{folder}: its weights cannot be read ({error}); {AGAIN}") from error
    clamped = Clamped(folder, manifest, config, model_class, tensors, prefixes[0])
    if not own:
        return clamped
    try:
        sites = tuple(read_site(tensors, prefixes[0], site) for site in section["sites"])
        exempt = tuple(int(token) for token in section["exempt_token_ids"])
    except (KeyError, TypeError, ValueError) as error:
        raise FolderError(
            f"{folder}: its clamp cannot be read ({type(error).__name__}: {error}); {AGAIN}"
        ) from error
    sites = tuple(sorted(sites, key=lambda site: site.layer))
    return replace(clamped, sites=sites, exempt_token_ids=exempt)


def open_config(folder: Path, *, stock: bool) -> tuple[Any, str]:
    """(config object, name of the model class): stock ones where the clamp is compiled in.

    Raises:
        FolderError: config.json is missing, damaged, or of another model_type.
    """
    stored = read_json(folder / "config.json")
    model_type = str(stored.get("model_type"))
    known = {(name if stock else family.model_type): family for name, family in FAMILIES.items()}
    if model_type not in known:
        raise FolderError(
            f"{folder}: model_type is {short(model_type)}; expected one of {', '.join(known)}"
        )
    _check_fields(folder / "config.json", stored)
    family = known[model_type]
    import transformers

    import bake.modeling_clamped_gemma as modeling

    kind = transformers.AutoConfig if stock else getattr(modeling, family.config)
    try:
        config = kind.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # each of its checks raises another kind
        reason = short(" ".join(str(error).split()))
        raise FolderError(f"{folder / 'config.json'}: {reason}; {AGAIN}") from error
    return config, family.architecture if stock else family.clamped


# --------------------------------------------------------------------------- config


def read_config(folder: Path, carrier: str = "layer") -> dict[str, Any]:
    """Where a folder's clamps sit in the base (`sae_clamp.sites`), and the base's sizes.

    Raises:
        FolderError: the file that says so is missing, not readable, or does not say it.
    """
    path = folder / CARRIERS[carrier].sites_in
    config = _stock_config(folder, carrier) if path.name == MANIFEST else read_json(path)
    _check_fields(path, config)
    try:
        sites = config["sae_clamp"]["sites"]
        layers = [site["layer"] for site in sites]
        placed = bool(layers) and all(type(layer) is int and layer >= 0 for layer in layers)
        placed = placed and all(type(site.get("exempt_bos", True)) is bool for site in sites)
        exempt = config["sae_clamp"].get("exempt_token_ids", [])
        placed = placed and all(type(token) is int and 0 <= token < 1 << 24 for token in exempt)
    except (KeyError, TypeError, AttributeError):
        placed = False
    if not placed:
        raise FolderError(
            f"{path}: has no clamp; expected sae_clamp.sites, each with its layer, exempt_bos as "
            "true or false, and exempt_token_ids as a list of tokens"
        )
    if path.name != MANIFEST:
        text = {**config, **(config.get("text_config") or {})}
        n_layers, vocab_size = text.get("num_hidden_layers"), text.get("vocab_size")
        sizes = {"n_layers": n_layers or 1 << 10, "vocab_size": vocab_size or 1 << 24}
        if (wrong := wrong_clamp(config["sae_clamp"], **sizes)) is not None:
            raise FolderError(f"{path}: {wrong}; {AGAIN}")
        if (folder / MANIFEST).exists():
            _check_gates(path, config["sae_clamp"], Manifest.read(folder))
    return config


def _check_gates(path: Path, section: dict[str, Any], manifest: Manifest) -> None:
    """Raise FolderError where the gates over the sequence are not those that the manifest states:
    a witness seldom shows one.
    """
    found = {site["layer"]: site["tau"] for site in section["sites"] if "tau" in site}
    given = {clamp.layer: clamp.parameters.get("tau") for clamp in manifest.clamps}
    stated = {layer: tau for layer, tau in given.items() if tau is not None}
    if found != stated:
        raise FolderError(
            f"{path}: sae_clamp.sites: tau by layer is {shown(found)}; expected {shown(stated)}, "
            f"which manifest.json states; {AGAIN}"
        )


def _check_fields(path: Path, config: dict[str, Any]) -> None:
    """Raise FolderError where a field of a config is of another type than a Gemma's."""
    if (wrong := wrong_field(config)) is not None:
        raise FolderError(f"{path}: {wrong}; {AGAIN}")


def clamped_layers(config: dict[str, Any]) -> list[int]:
    """The layers at which a folder's config places clamps, ascending."""
    return sorted(site["layer"] for site in config["sae_clamp"]["sites"])


def _stock_config(folder: Path, carrier: str) -> dict[str, Any]:
    """What a folder of stock classes says of its base: its own config.json less what was added."""
    manifest, config = Manifest.read(folder), read_json(folder / "config.json")
    _check_fields(folder / "config.json", config)
    sizes = {key: config.get(key) for key in ("hidden_size", "num_hidden_layers", "vocab_size")}
    sizes |= {"dtype": config.get("dtype") or config.get("torch_dtype")}
    if not CARRIERS[carrier].trained:
        added = manifest.compiled
        if added is None or sizes["hidden_size"] != added.hidden_size[1]:
            raise FolderError(
                f"{folder / MANIFEST}: does not say where its clamps sit in a model of hidden_size "
                f"{sizes['hidden_size']}, which config.json states; {AGAIN}"
            )
        depth = (sizes["num_hidden_layers"] or 0) - added.layers_added
        sizes |= {"hidden_size": added.hidden_size[0], "num_hidden_layers": depth}
        sizes |= {"dtype": added.dtype}
    return sizes | {"sae_clamp": {"sites": [{"layer": c.layer} for c in manifest.clamps]}}
