"""Which tensors lie in which weight file: each once, where the index places it, none besides."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bake.base import INDEX, WEIGHTS, BaseModel
from bake.errors import FolderError
from bake.families import unread_tensors
from bake.files.folder_files import open_in
from bake.reading.capped import HEADER_BYTES, parse_json
from export.manifest import AGAIN, read_json
from verify.expected.compiled_places import Places
from verify.expected.expected_config import differences
from verify.report.findings import Failure

CLAMP_SHARD, ADDED_SHARD = "model-sae-clamp.safetensors", "model-compiled-layers.safetensors"
RENAMED = "model-00001-of-00001.safetensors"
"""What a base's `model.safetensors` is called in a folder."""


def header_of(path: Path) -> dict[str, dict[str, Any]]:
    """A safetensors file's header by tensor name: dtype, shape, data_offsets.

    Raises:
        FolderError: it cannot be read, or names a tensor twice.
    """
    try:
        with open_in(path.parent, path.name) as file:
            size = int.from_bytes(file.read(8), "little")
            if size > HEADER_BYTES:
                raise ValueError(f"a header of {size} bytes")
            found = {name: dict(entry) for name, entry in parse_json(file.read(size)).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise FolderError(f"{path}: its header cannot be read ({error}); {AGAIN}") from error
    found.pop("__metadata__", None)
    return found


def index_failures(folder: Path, files: Mapping[str, str], engine: str) -> Iterator[Failure]:
    """What of a folder's weight files and index does not agree.

    Args:
        folder: with an index, or without one.
        files: that its manifest lists.
        engine: that loads it.
    """
    weight_map: Mapping[str, Any] = {}
    if INDEX in files:
        index = read_json(folder / INDEX)
        weight_map = index.get("weight_map") or {}
        if set(index) - {"metadata", "weight_map"} or not isinstance(weight_map, dict):
            what = f"{INDEX}: holds {', '.join(sorted(index))}; expected metadata and weight_map"
            yield Failure("integrity", engine, what, ", ".join(sorted(index)), None)
            return
    for name in sorted(name for name in files if name.endswith(".safetensors")):
        placed = {tensor for tensor, file in weight_map.items() if file == name}
        held = set(header_of(folder / name))
        if not placed:
            what = f"{name}: holds weights that {INDEX} does not name"
            yield Failure("integrity", engine, what, name, None)
        elif odd := sorted(held ^ placed):
            where = "is not placed there by" if odd[0] in held else "is not there, in spite of"
            what = f"{name}: {odd[0]} {where} {INDEX}"
            yield Failure("integrity", engine, what, odd[0], None)
    for file in sorted({str(file) for file in weight_map.values()} - set(files)):
        what = f"{INDEX}: places tensors in {file}, which the manifest does not list"
        yield Failure("integrity", engine, what, file, None)


def placed_failures(
    folder: Path, engine: str, expected: Mapping[str, str], total_size: int
) -> Iterator[Failure]:
    """What of an index is not what it must be.

    Args:
        folder: with an index.
        engine: that loads it.
        expected: the file of every tensor.
        total_size: bytes, as its metadata states it.
    """
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(expected)}
    yield from differences(engine, INDEX, read_json(folder / INDEX), index)


def checkpoint_map(base: BaseModel, clamps: Mapping[str, Any]) -> dict[str, str]:
    """The file of every tensor of a clamped checkpoint, by the base's and the clamps' names."""
    found = {
        name: RENAMED if shard == WEIGHTS else shard for name, shard in base.weight_map.items()
    }
    return found | dict.fromkeys(clamps, CLAMP_SHARD)


def compiled_map(base: BaseModel, places: Places) -> dict[str, tuple[str, str]]:
    """(file, name in the base) of every tensor of a compiled folder, by its name there; those of
    the new layers have the names of the base's layer that they are shaped like.

    Args:
        base: what was compiled.
        places: where its layers stand.
    """
    found: dict[str, tuple[str, str]] = {}
    added = {new: str(places.like(new)) for new in (*places.clamping, *places.idle)}
    for name, shard in base.weight_map.items():
        file = RENAMED if shard == WEIGHTS else shard
        before, mark, rest = name.partition("layers.")
        number, _, part = rest.partition(".")
        if not mark:
            found[name] = (file, name)
            continue
        found[f"{before}layers.{places.base[int(number)]}.{part}"] = (file, name)
        for new in (new for new, like in added.items() if like == number):
            found[f"{before}layers.{new}.{part}"] = (ADDED_SHARD, name)
    return found


def first_rows_digest(base: BaseModel) -> str:
    """The fingerprint that an adapter has of its base: sha256 over the sorted sha256 of the first
    row of every tensor that is loaded (a vector whole), in bfloat16.
    """
    import torch
    from safetensors import safe_open

    digests, unread = set(), unread_tensors(base.config)
    for shard in base.shards:
        with safe_open(base.folder / shard, framework="pt") as tensors:
            for name in (n for n, file in base.weight_map.items() if file == shard):
                if unread.fullmatch(name):
                    continue
                part = tensors.get_slice(name)
                whole = len(part.get_shape()) < 2
                row = tensors.get_tensor(name) if whole else part[:1][0]
                bits = row.float().to(torch.bfloat16).contiguous().view(torch.int16)
                digests.add(hashlib.sha256(bits.numpy().tobytes()).digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()
