"""The clamp as a PEFT folder: a few hundred kilobytes beside a base that stays where it is.

Exact: the same module as in the checkpoint (`peft_clamp.py`), hooked onto the base's layers.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import save_file

from bake.errors import ExportError
from bake.new_folder import check_output, new_folder
from export.carriers.carriers import LICENCES
from export.clamped import CLAMP_TENSORS, Clamped, check_weights
from export.copying import hash_new
from export.folder_contents import copy_listed
from export.manifest import json_text

if TYPE_CHECKING:
    import torch

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def write_adapter(source: Clamped, out: Path, *, card: str, force: bool = False) -> Path:
    """Write an adapter folder, whole or not at all.

    Args:
        source: the clamped checkpoint.
        out: the folder; it may exist only with `force`.
        card: text of the folder's README.md.
        force: replace a folder that bakeout wrote.

    Raises:
        OutputError: `out` exists, overlaps the input, or does not fit on the disk.
        ExportError: the checkpoint's manifest does not name the base's weight files.
    """
    check_weights(source)
    tensors = {
        f"{_module(source)}{site.layer}.sae_clamp_site.{name}": np.ascontiguousarray(
            getattr(site, name)
        )
        for site in source.sites
        for name in CLAMP_TENSORS
    }
    size = sum(tensor.nbytes for tensor in tensors.values())
    check_output(out, inputs=[source.folder], size=size, force=force)
    with new_folder(out, force=force) as folder:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        texts = {CONFIG: json_text(adapter_config(source)), "README.md": card}
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        files = {name: hash_new(folder / name) for name in (WEIGHTS, *texts)}
        kept = rf"{LICENCES}|recipe\.toml"
        for name in (name for name in source.manifest.files if re.fullmatch(kept, name)):
            files[name] = copy_listed(source.folder, source.manifest, name, folder / name)
        source.manifest.derived(files, carrier="adapter").write(folder)
    return out


def adapter_config(source: Clamped) -> dict[str, Any]:
    """`adapter_config.json`."""
    text = {**source.base_config, **(source.base_config.get("text_config") or {})}
    files = source.manifest.files
    if missing := [name for name in source.base_files if name not in files]:
        raise ExportError(
            f"{source.name}: its manifest has no hash of {missing[0]}; an adapter is bound to its "
            "base by hash. Bake the folder again"
        )
    return {
        "peft_type": "SAE_CLAMP",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "base_model_name_or_path": source.manifest.base.model,
        "revision": source.manifest.base.revision,
        "sae_clamp": {
            "schema": 1,
            "sites": [
                {"layer": site.layer, "k": len(site.value), "exempt_bos": site.exempt_bos}
                for site in source.sites
            ],
            "exempt_token_ids": list(source.exempt_token_ids),
        },
        "base_fingerprint": _fingerprint(source),
        "base_sha256": sorted(files[name] for name in source.base_files),
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


def _fingerprint(source: Clamped) -> str:
    """Of the base's tensors as they lie on disk; only first rows are read."""
    import torch

    tensors = source.base_tensors.values()
    rows = (t.array() if len(t.shape) < 2 else t.rows(0, 1)[0] for t in tensors)
    return fingerprint(torch.from_numpy(row) for row in rows)


def _module(source: Clamped) -> str:
    """What stands before a decoder layer's number in the module names of transformers' class."""
    return f"base_model.model.model.{source.family.backbone}layers."
