"""A clamped checkpoint as something to export from: its config, and where its tensors lie."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from bake.base import INDEX
from bake.errors import FolderError
from bake.families import FAMILIES
from bake.new_folder import MANIFEST
from bake.tensors import DTYPES, StoredTensor, stored_tensors
from export.carriers.carriers import CARRIERS
from export.copying import BLOCK_BYTES
from export.manifest import Manifest

_HELD = (*DTYPES.values(), "BOOL")
"""Formats of the tensors of a folder."""
AGAIN = "bake or download the folder again"
CLAMP_TENSORS = ("W_enc", "b_enc", "theta", "W_dec", "trigger", "route", "value", "scale")
"""What a clamp's tensors are called, in the order of the operator's inputs."""


@dataclass(frozen=True)
class Clamped:
    """A clamped checkpoint's folder, opened for reading; no tensor is read yet."""

    folder: Path
    manifest: Manifest
    config: Any
    """An object of the clamped config class."""
    model_class: str
    """In modeling_clamped_gemma.py."""
    tensors: Mapping[str, StoredTensor]
    layer_prefix: str
    """What stands before the layer's number in tensor names, `model.layers.` mostly."""

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
    def sites(self) -> list[dict[str, Any]]:
        """The config's: layer, k, exempt_bos. None where the clamp is compiled in."""
        return list((getattr(self.config, "sae_clamp", None) or {"sites": []})["sites"])

    @property
    def compiled_layers(self) -> list[int]:
        """Layers that hold a compiled clamp."""
        compiled = self.manifest.compiled
        return [layer for site in compiled.sites for layer in site.layers] if compiled else []

    @property
    def stored_in(self) -> str | None:
        """The dtype that a clamp was compiled in; None where it is not compiled."""
        return self.manifest.compiled.dtype if self.manifest.compiled else None

    @property
    def shards(self) -> list[str]:
        """Names of the weight files."""
        return sorted({tensor.file.name for tensor in self.tensors.values()})

    @property
    def weights_sha256(self) -> str:
        """Over the names and hashes of the weight files, as the manifest states them."""
        return weights_sha256({name: self.manifest.files[name] for name in self.shards})

    @property
    def recipe_sha256(self) -> str:
        """Of the recipe, as the manifest states it."""
        return self.manifest.recipe_sha256


def weights_sha256(files: Mapping[str, str]) -> str:
    """One hash over the names and sha256 of several files: `name sha256` a line, by name."""
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def open_clamped(folder: Path, *, with_graphs: bool = False) -> Clamped:
    """Open a folder that `bakeout bake` wrote; its code is not run.

    Args:
        folder: what to open.
        with_graphs: accept whatever can have an ONNX graph, not the checkpoint alone.

    Raises:
        FolderError: it is no clamped checkpoint, or damaged.
    """
    if not folder.is_dir():
        raise FolderError(f"{folder}: is no folder; expected one that `bakeout bake` wrote")
    manifest = Manifest.read(folder)
    carrier = CARRIERS.get(manifest.carrier)
    if carrier is None or not (carrier.own_code or (with_graphs and not carrier.over_base)):
        raise FolderError(
            f"{folder}: is an export already (carrier {manifest.carrier}); expected a "
            "clamped checkpoint, as `bakeout bake` writes it"
        )
    clamped = open_listed(folder, manifest)
    if unlisted := [name for name in clamped.shards if name not in manifest.files]:
        raise FolderError(f"{folder / MANIFEST}: does not list {unlisted[0]}; {AGAIN}")
    return clamped


def open_listed(folder: Path, manifest: Manifest) -> Clamped:
    """Open a folder by a manifest that is still to be written."""
    config, model_class = _open_config(folder, stock=not CARRIERS[manifest.carrier].own_code)
    weight_map = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FolderError(f'{folder / INDEX}: has no "weight_map"; {AGAIN}')
    tensors = _stored_tensors(folder, weight_map)
    prefix = re.compile(r"((?:.*\.)?layers\.)0\.mlp\.gate_proj\.weight")
    found = [match[1] for name in tensors if (match := prefix.fullmatch(name))]
    if not found:
        raise FolderError(f"{folder}: has no decoder layers among its tensors; {AGAIN}")
    return Clamped(folder, manifest, config, model_class, tensors, found[0])


def _open_config(folder: Path, *, stock: bool) -> tuple[Any, str]:
    """(config object, name of the model class): stock ones where the clamp is compiled in."""
    data = _read_json(folder / "config.json")
    section = data.get("sae_clamp")
    if not stock and not (isinstance(section, dict) and section.get("sites")):
        raise FolderError(
            f"{folder}: has no clamp (config.json without sae_clamp.sites); expected a folder "
            "that `bakeout bake` wrote"
        )
    model_type = str(data.get("model_type"))
    known = {(name if stock else family.model_type): family for name, family in FAMILIES.items()}
    if model_type not in known:
        raise FolderError(
            f"{folder}: model_type is {model_type}; expected one of {', '.join(known)}"
        )
    family = known[model_type]
    import transformers

    import bake.modeling_clamped_gemma as modeling

    kind = transformers.AutoConfig if stock else getattr(modeling, family.config)
    try:
        config = kind.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise FolderError(f"{folder / 'config.json'}: {error}; {AGAIN}") from error
    return config, family.architecture if stock else family.clamped


def _stored_tensors(folder: Path, weight_map: Mapping[str, str]) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    for shard in sorted(set(weight_map.values())):
        path = folder / shard
        if Path(shard).name != shard:
            raise FolderError(f"{folder / INDEX}: names {shard}; expected files of the folder")
        try:
            inside = stored_tensors(path)
        except (OSError, SafetensorError, ValueError) as error:
            raise FolderError(f"{path}: cannot be read ({error}); {AGAIN}") from error
        for name, tensor in inside.items():
            if tensor.dtype not in _HELD:
                raise FolderError(
                    f"{path}: {name} is {tensor.dtype}; expected one of {', '.join(_HELD)}"
                )
        found |= inside
    for name, shard in weight_map.items():
        if name not in found or found[name].file.name != shard:
            raise FolderError(f"{folder / shard}: has no tensor {name}, where {INDEX} places it")
    return {name: found[name] for name in weight_map}


def check_files(
    clamped: Clamped, names: Sequence[str], progress: Callable[[float], None] = lambda _: None
) -> None:
    """Raise FolderError unless files are what the manifest says.

    Args:
        clamped: the folder.
        names: of the files.
        progress: called with the share of bytes hashed, 0 to 1.
    """
    if missing := [name for name in names if not (clamped.folder / name).is_file()]:
        raise FolderError(f"{clamped.folder}: {missing[0]} is missing; {AGAIN}")
    total = sum((clamped.folder / name).stat().st_size for name in names)
    done = 0
    for name in names:
        digest, listed = hashlib.sha256(), clamped.manifest.files[name]
        with (clamped.folder / name).open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
                done += len(block)
                progress(done / total)
        if digest.hexdigest() != listed:
            raise FolderError(
                f"{clamped.folder / name}: is not the file that the manifest lists (sha256 "
                f"{digest.hexdigest()[:16]}…, expected {listed[:16]}…); {AGAIN}"
            )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FolderError(
            f"{path.parent}: has no {path.name}; expected a folder that `bakeout bake` wrote"
        ) from error
    except (OSError, ValueError) as error:
        raise FolderError(f"{path}: cannot be read ({error}); {AGAIN}") from error
    if not isinstance(data, dict):
        raise FolderError(f"{path}: is no JSON object; {AGAIN}")
    return data
