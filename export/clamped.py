"""A clamped checkpoint as something to export from: its config, and where its tensors lie."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from bake.base import FAMILIES, INDEX
from bake.errors import FolderError
from export.copying import BLOCK_BYTES
from export.new_folder import MANIFEST, check_schema

AGAIN = "bake or download the folder again"
CLAMP_TENSORS = ("W_enc", "b_enc", "theta", "W_dec", "trigger", "route", "value", "scale")
"""What a clamp's tensors are called, in the order of the operator's inputs."""
_NUMPY_TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "BOOL": "?"}
_ROW_BYTES = 32 << 20
"""Bytes of float32 that `StoredTensor.blocks` gives at once, about."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file, found by its header."""

    file: Path
    dtype: str
    """As safetensors names it: F32, F16, BF16, BOOL."""
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""
    length: int
    """Bytes."""

    def rows(self, start: int, stop: int) -> NDArray[Any]:
        """Some rows, [stop - start, …]: float32, or bool where flags are stored.

        Reads these rows and nothing else.
        """
        stored = np.dtype(_NUMPY_TYPES[self.dtype])
        n_columns = int(np.prod(self.shape[1:]))
        with self.file.open("rb") as file:
            file.seek(self.offset + start * n_columns * stored.itemsize)
            data = np.fromfile(file, stored, (stop - start) * n_columns)
        block = data.reshape(stop - start, *self.shape[1:])
        if self.dtype == "BF16":  # the upper half of a float32
            return (block.astype(np.uint32) << 16).view(np.float32)
        return block if self.dtype == "BOOL" else block.astype(np.float32, copy=False)

    def array(self) -> NDArray[Any]:
        """All of it, as `rows` gives it."""
        return self.rows(0, self.shape[0])

    def blocks(self) -> list[tuple[int, int]]:
        """Row ranges of about 32 MB of float32 each, in order."""
        row_bytes = 4 * max(1, int(np.prod(self.shape[1:])))
        step = max(1, _ROW_BYTES // row_bytes)
        n = self.shape[0]
        return [(start, min(start + step, n)) for start in range(0, n, step)]


@dataclass(frozen=True)
class Clamped:
    """A clamped checkpoint's folder, opened for reading; no tensor is read yet."""

    folder: Path
    manifest: dict[str, Any]
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
        compiled = self.manifest.get("compiled") or {"sites": []}
        return [layer for site in compiled["sites"] for layer in site["layers"]]

    @property
    def shards(self) -> list[str]:
        """Names of the weight files."""
        return sorted({tensor.file.name for tensor in self.tensors.values()})

    @property
    def weights_sha256(self) -> str:
        """Over the names and hashes of the weight files, as the manifest states them."""
        return weights_sha256({name: self.manifest["files"][name] for name in self.shards})

    @property
    def recipe_sha256(self) -> str:
        """Of the recipe, as the manifest states it."""
        return str(self.manifest["recipe_sha256"])


def weights_sha256(files: Mapping[str, str]) -> str:
    """One hash over the names and sha256 of several files: `name sha256` a line, by name."""
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def open_clamped(folder: Path, carriers: Sequence[str] = ("layer",)) -> Clamped:
    """Open a folder that `bakeout bake` wrote; its code is not run.

    Args:
        folder: what to open.
        carriers: layer, or compiled too.

    Raises:
        FolderError: it is no clamped checkpoint, or damaged.
    """
    if not folder.is_dir():
        raise FolderError(f"{folder}: is no folder; expected one that `bakeout bake` wrote")
    manifest = _read_json(folder / MANIFEST)
    check_schema(folder / MANIFEST, manifest)
    if not isinstance(manifest.get("files"), dict):
        raise FolderError(f'{folder / MANIFEST}: has no "files"; {AGAIN}')
    if manifest.get("carrier") not in carriers:
        raise FolderError(
            f"{folder}: is an export already (carrier {manifest.get('carrier')}); expected a "
            "clamped checkpoint, as `bakeout bake` writes it"
        )
    clamped = open_unlisted(folder, manifest)
    if unlisted := [name for name in clamped.shards if name not in manifest["files"]]:
        raise FolderError(f"{folder / MANIFEST}: does not list {unlisted[0]}; {AGAIN}")
    return clamped


def open_unlisted(folder: Path, manifest: dict[str, Any]) -> Clamped:
    """Open a folder whose manifest is still to be written."""
    config, model_class = _open_config(folder, compiled=manifest.get("carrier") == "compiled")
    weight_map = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FolderError(f'{folder / INDEX}: has no "weight_map"; {AGAIN}')
    tensors = _stored_tensors(folder, weight_map)
    prefix = re.compile(r"((?:.*\.)?layers\.)0\.mlp\.gate_proj\.weight")
    found = [match[1] for name in tensors if (match := prefix.fullmatch(name))]
    if not found:
        raise FolderError(f"{folder}: has no decoder layers among its tensors; {AGAIN}")
    return Clamped(folder, manifest, config, model_class, tensors, found[0])


def _open_config(folder: Path, *, compiled: bool) -> tuple[Any, str]:
    """(config object, name of the model class): stock ones where the clamp is compiled in."""
    data = _read_json(folder / "config.json")
    section = data.get("sae_clamp")
    if not compiled and not (isinstance(section, dict) and section.get("sites")):
        raise FolderError(
            f"{folder}: has no clamp (config.json without sae_clamp.sites); expected a folder "
            "that `bakeout bake` wrote"
        )
    model_type = str(data.get("model_type"))
    known = {(name if compiled else family.model_type): family for name, family in FAMILIES.items()}
    if model_type not in known:
        raise FolderError(
            f"{folder}: model_type is {model_type}; expected one of {', '.join(known)}"
        )
    family = known[model_type]
    import transformers

    import bake.modeling_clamped_gemma as modeling

    kind = transformers.AutoConfig if compiled else getattr(modeling, family.config)
    try:
        config = kind.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise FolderError(f"{folder / 'config.json'}: {error}; {AGAIN}") from error
    return config, family.architecture if compiled else family.clamped


def _stored_tensors(folder: Path, weight_map: Mapping[str, str]) -> dict[str, StoredTensor]:
    found = {}
    for shard in sorted(set(weight_map.values())):
        path = folder / shard
        if Path(shard).name != shard:
            raise FolderError(f"{folder / INDEX}: names {shard}; expected files of the folder")
        try:
            with safe_open(path, framework="np"):
                pass  # checks that offsets neither overlap nor leave the file
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
        except (OSError, SafetensorError, ValueError) as error:
            raise FolderError(f"{path}: cannot be read ({error}); {AGAIN}") from error
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if entry["dtype"] not in _NUMPY_TYPES:
                raise FolderError(
                    f"{path}: {name} is {entry['dtype']}; expected one of {', '.join(_NUMPY_TYPES)}"
                )
            begin, end = entry["data_offsets"]
            found[name] = StoredTensor(
                path, entry["dtype"], tuple(entry["shape"]), 8 + size + begin, end - begin
            )
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
        digest, listed = hashlib.sha256(), clamped.manifest["files"][name]
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
