"""A clamped checkpoint on disk, as the other exports read it: headers and the clamp's tensors."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from bake.base import FAMILIES, INDEX
from bake.errors import FolderError
from export.checkpoint import GUARD
from export.new_folder import MANIFEST

CLAMP_TENSORS = ("W_enc", "b_enc", "theta", "W_dec", "trigger", "route", "value", "scale")


@dataclass(frozen=True)
class ClampSite:
    """One clamp of a checkpoint: the rows of `SAEClamp`'s equation."""

    layer: int
    """Decoder layer of the base whose output is edited."""
    exempt_bos: bool
    W_enc: NDArray[np.float32]
    """[d, k]."""
    b_enc: NDArray[np.float32]
    """[k], like theta, trigger, value and scale."""
    theta: NDArray[np.float32]
    W_dec: NDArray[np.float32]
    """[k, d]."""
    trigger: NDArray[np.float32]
    route: NDArray[np.bool_]
    """[k, k]: row, the feature that is set; column, the feature that triggers it."""
    value: NDArray[np.float32]
    scale: NDArray[np.float32]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, by its place."""

    file: str
    dtype: str
    """As safetensors writes it: F32, BF16, F16 or another."""
    shape: tuple[int, ...]
    offset: int
    """Of its first byte in the file."""


@dataclass(frozen=True)
class ClampedSource:
    """A clamped checkpoint, checked for completeness; no weight of the base was read."""

    folder: Path
    model_type: str
    """The base's: gemma, gemma2, gemma3_text or gemma3."""
    config: dict[str, Any] = field(repr=False)
    """The base's config.json: no clamp, no guard before the activation."""
    manifest: dict[str, Any] = field(repr=False)
    tensors: dict[str, StoredTensor] = field(repr=False)
    """The base's tensors by name."""
    sites: tuple[ClampSite, ...]
    """By layer."""
    exempt_token_ids: tuple[int, ...]
    """Tokens that a site with `exempt_bos` leaves alone."""

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name

    @property
    def base_files(self) -> list[str]:
        """The base's weight files."""
        return sorted({tensor.file for tensor in self.tensors.values()})

    @property
    def size(self) -> int:
        """Bytes of the base's weight files."""
        return sum((self.folder / name).stat().st_size for name in self.base_files)


def open_clamped(folder: Path) -> ClampedSource:
    """Open a clamped checkpoint.

    Raises:
        FolderError: it is none, is incomplete or damaged, or carries the clamp otherwise.
    """
    manifest = _read_json(folder, MANIFEST)
    carrier = manifest.get("carrier", "layer")
    if carrier != "layer":
        raise FolderError(
            f"{folder}: is an export already (carrier {carrier}); expected a clamped checkpoint, "
            "as `bakeout bake` writes it"
        )
    config = _read_json(folder, "config.json")
    stock = {family.model_type: name for name, family in FAMILIES.items()}
    model_type = stock.get(str(config.get("model_type")))
    section = config.pop("sae_clamp", None)
    if model_type is None or not isinstance(section, dict):
        raise FolderError(
            f"{folder}: is no clamped checkpoint (model_type {config.get('model_type')!r}); "
            "expected a folder that `bakeout bake` wrote"
        )
    weight_map = _read_json(folder, INDEX).get("weight_map") or {}
    tensors = {
        name: tensor
        for file in sorted(set(weight_map.values()))
        for name, tensor in stored_tensors(folder / file).items()
    }
    if missing := sorted(set(weight_map) - set(tensors)):
        raise FolderError(f"{folder}: {missing[0]} is in no weight file; bake the folder again")
    try:
        sites = [_read_site(folder, tensors, site) for site in section["sites"]]
        exempt = tuple(int(token) for token in section["exempt_token_ids"])
    except (KeyError, TypeError, ValueError) as error:
        raise FolderError(
            f"{folder}: its clamp cannot be read ({type(error).__name__}: {error}); "
            "bake the folder again"
        ) from error
    return ClampedSource(
        folder=folder,
        model_type=model_type,
        config=_stock_config(config, model_type),
        manifest=manifest,
        tensors={name: t for name, t in tensors.items() if ".sae_clamp." not in name},
        sites=tuple(sorted(sites, key=lambda site: site.layer)),
        exempt_token_ids=exempt,
    )


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """What a safetensors file holds, from its header.

    Raises:
        FolderError: it is missing or damaged.
    """
    try:
        with safe_open(path, framework="np"):
            pass  # checks that offsets neither overlap nor leave the file
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
    except (OSError, ValueError, SafetensorError) as error:
        raise FolderError(f"{path}: is missing or damaged ({error}); bake it again") from error
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(
            path.name, entry["dtype"], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0]
        )
        for name, entry in header.items()
    }


def _read_site(folder: Path, tensors: dict[str, StoredTensor], site: dict[str, Any]) -> ClampSite:
    layer = int(site["layer"])
    mark = f"layers.{layer}.sae_clamp."
    found = {name.rpartition(".")[2]: name for name in tensors if mark in name}
    arrays = {}
    for key in CLAMP_TENSORS:
        name = found[key]
        with safe_open(folder / tensors[name].file, framework="np") as file:
            arrays[key] = file.get_tensor(name)
        if not np.isfinite(arrays[key]).all():
            raise ValueError(f"{name} is not finite")
    k = int(site["k"])
    if arrays["W_enc"].shape[1:] != (k,) or arrays["route"].shape != (k, k):
        raise ValueError(f"{mark}* have other shapes than config.json says")
    return ClampSite(layer, bool(site["exempt_bos"]), **arrays)


def _stock_config(config: dict[str, Any], model_type: str) -> dict[str, Any]:
    """The base's config: stock names, and the guard taken off the activation."""
    config = {key: value for key, value in config.items() if key != "auto_map"}
    config |= {"model_type": model_type, "architectures": [FAMILIES[model_type].architecture]}
    text = config.get("text_config", config)
    for name in ("hidden_activation", "hidden_act"):
        if isinstance(text.get(name), str):
            text[name] = text[name].removeprefix(GUARD)
    return config


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        data = json.loads((folder / name).read_text(encoding="utf-8"))
    except OSError as error:
        raise FolderError(
            f"{folder}: {name} cannot be read ({error.strerror}); expected a clamped checkpoint, "
            "as `bakeout bake` writes it"
        ) from error
    except ValueError as error:
        raise FolderError(
            f"{folder / name}: is no JSON ({error}); bake the folder again"
        ) from error
    if not isinstance(data, dict):
        raise FolderError(f"{folder / name}: holds no JSON object; bake the folder again")
    return data
