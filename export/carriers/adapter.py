"""The clamp as a PEFT folder: a few hundred kilobytes beside a base that stays where it is.

Exact: the same module as in the checkpoint (`peft_clamp.py`), hooked onto the base's layers.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bake.base import open_base
from bake.errors import ExportError
from bake.families import unread_tensors
from bake.files.folder_files import sha256_in
from bake.new_folder import check_output, new_folder
from bake.recipe import Recipe
from bake.tensors import StoredTensor, Tensors, indexed_tensors, n_bytes
from export.carriers.carriers import LICENCES
from export.carriers.clamp_file import save_clamps
from export.clamp_sites import CLAMP_TENSORS, TOPK_TENSORS
from export.clamped import Clamped, check_weights
from export.code_check import PEFT_TYPE
from export.copying import hash_new
from export.folder_contents import RECIPE, copy_listed, recipe_in
from export.manifest import BaseEntry, json_text

if TYPE_CHECKING:
    import torch

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class OtherBase:
    """A base of the same shape that an adapter is bound to in place of the checkpoint's."""

    name: str
    sha256: list[str]
    """Of its weight files."""
    fingerprint: str


def other_base(source: Clamped, folder: Path) -> OtherBase:
    """Read a fine-tuned base that a checkpoint's clamp is to act on.

    Args:
        source: the clamped checkpoint.
        folder: of the other base.

    Raises:
        ModelError: it is no base model's folder.
        ExportError: its tensors are others than the checkpoint's base's.
    """
    base = open_base(folder, name=folder.resolve().name, revision=None)
    tensors = indexed_tensors(folder, base.weight_map)
    own = {name: tensor.shape for name, tensor in source.base_tensors.items()}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    odd = sorted(name for name in own.keys() | shapes.keys() if own.get(name) != shapes.get(name))
    if odd or base.family is not source.family:
        first = odd[0] if odd else "its family"
        raise ExportError(
            f"--rebase {folder}: {first} is {shapes.get(first, 'not there')}; expected "
            f"{own.get(first, 'none')}, as the base of {source.name} has it. Take a model that was "
            "fine-tuned from that base"
        )
    hashes = sorted(sha256_in(folder, shard) for shard in base.shards)
    return OtherBase(base.name, hashes, _fingerprint(tensors, base.config))


def write_adapter(
    source: Clamped,
    out: Path,
    *,
    card: str,
    base: OtherBase | None = None,
    force: bool = False,
) -> Path:
    """Write an adapter folder, whole or not at all.

    Args:
        source: the clamped checkpoint.
        out: the folder; it may exist only with `force`.
        card: text of the folder's README.md.
        base: what it is bound to; None means the checkpoint's own.
        force: replace a folder that bakeout wrote.

    Raises:
        OutputError: `out` exists, overlaps the input, or does not fit on the disk.
        ExportError: the checkpoint's manifest does not name the base's weight files.
    """
    check_weights(source)
    tensors: dict[str, NDArray[np.generic]] = {}
    wholes: Tensors = {}
    for site in source.sites:
        before = f"{_module(source)}{site.layer}.sae_clamp_site."
        if (of := site.topk) is None:
            tensors |= {f"{before}{name}": getattr(site, name) for name in CLAMP_TENSORS}
            continue
        wholes[f"{before}W_enc"] = (of.W_enc.dtype, of.W_enc.shape, of.W_enc.stored_blocks)
        tensors |= {f"{before}{name}": getattr(site, name) for name in TOPK_TENSORS[3:]}
        tensors |= {f"{before}b_enc": site.b_enc, f"{before}gain": of.gain}
    size = sum(tensor.nbytes for tensor in tensors.values())
    size += sum(n_bytes(shape, dtype) for dtype, shape, _ in wholes.values())
    check_output(out, inputs=[source.folder], size=size, force=force)
    with new_folder(out, force=force) as folder:
        save_clamps(folder / WEIGHTS, tensors, wholes)
        texts = {CONFIG: json_text(adapter_config(source, base)), "README.md": card}
        if base is not None:
            texts[RECIPE] = rebased_recipe(source, base).to_toml()
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        files = {name: hash_new(folder / name) for name in (WEIGHTS, *texts)}
        kept = rf"{LICENCES}|{re.escape(RECIPE)}"
        own = (name for name in source.manifest.files if re.fullmatch(kept, name))
        for name in (name for name in own if name not in files):
            files[name] = copy_listed(source.folder, source.manifest, name, folder / name)
        source.manifest.derived(files, carrier="adapter", **changed_base(files, base)).write(folder)
    return out


def rebased_recipe(source: Clamped, base: OtherBase) -> Recipe:
    """The checkpoint's recipe with another base in it."""
    data = recipe_in(source.folder, source.manifest).to_dict()
    data["base"] = {**data["base"], "model": base.name}
    data["base"].pop("revision", None)
    return Recipe.parse(data, name=RECIPE, folder=Path())


def changed_base(files: Mapping[str, str], base: OtherBase | None) -> dict[str, Any]:
    """What the manifest says otherwise where an adapter is bound to another base."""
    if base is None:
        return {}
    entry = BaseEntry(model=base.name, revision=None)
    return {"base": entry, "recipe_sha256": files[RECIPE]}


def adapter_config(source: Clamped, base: OtherBase | None = None) -> dict[str, Any]:
    """`adapter_config.json`."""
    text = {**source.base_config, **(source.base_config.get("text_config") or {})}
    files = source.manifest.files
    if missing := [name for name in source.base_files if name not in files]:
        raise ExportError(
            f"{source.name}: its manifest has no hash of {missing[0]}; an adapter is bound to its "
            "base by hash. Bake the folder again"
        )
    return {
        "peft_type": PEFT_TYPE,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "base_model_name_or_path": base.name if base else source.manifest.base.model,
        "revision": None if base else source.manifest.base.revision,
        "sae_clamp": {
            "schema": 2 if any(site.tau is not None for site in source.sites) else 1,
            "sites": [site.said for site in source.sites],
            "exempt_token_ids": list(source.exempt_token_ids),
        },
        "base_fingerprint": base.fingerprint
        if base
        else _fingerprint(source.base_tensors, source.base_config),
        "base_sha256": base.sha256 if base else sorted(files[name] for name in source.base_files),
        **{key: text[key] for key in ("hidden_size", "num_hidden_layers", "vocab_size")},
    }


def fingerprint(first_rows: Iterable[torch.Tensor]) -> str:
    """sha256 that a base keeps when it is loaded in another dtype.

    Args:
        first_rows: of every tensor of the base, its first row (a vector whole), in any order.
    """
    import torch

    digests = {
        hashlib.sha256(
            row.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes()
        ).digest()
        for row in first_rows
    }
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def first_row(tensor: torch.Tensor) -> torch.Tensor:
    """A vector whole, of anything else the first row."""
    return tensor if tensor.ndim < 2 else tensor[0]


def _fingerprint(tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> str:
    """Of a base's tensors as they lie on disk, those that are loaded; only first rows are read."""
    import torch

    unread = unread_tensors(config)
    loaded = (tensor for name, tensor in tensors.items() if not unread.fullmatch(name))
    rows = (t.array() if len(t.shape) < 2 else t.rows(0, 1)[0] for t in loaded)
    return fingerprint(torch.from_numpy(row) for row in rows)


def _module(source: Clamped) -> str:
    """What stands before a decoder layer's number in the module names of transformers' class."""
    return f"base_model.model.model.{source.family.backbone}layers."
