"""Defects to plant in a baked folder, with its hashes rewritten so that they catch nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from safetensors.numpy import load_file, save_file

from bake.recipe import Recipe
from export.carriers.checkpoint import CLAMP_SHARD, plan_checkpoint, write_checkpoint
from export.code_check import MODELING_FILE
from tests.clamps import METHOD_TABLES
from tests.worlds import sae_table

DEFECT_FEATURES = [1, 2, 5, 9, 20, 40]
_VERIFY = {
    "forget_questions": {"path": "forget.jsonl"},
    "retain_questions": {"path": "retain.jsonl"},
    "text": {"path": "text.jsonl"},
}
REFUSAL_TABLE = {
    **METHOD_TABLES["refusal and clamp"],
    "features": DEFECT_FEATURES,
    "exempt_bos": True,
}
_CLAMP = "model.layers.1.sae_clamp."
FORWARD_LINE = "        h: torch.Tensor = super().forward(hidden_states, *args, **kwargs)"
"""Where a decoder layer of the modeling file runs."""


def rewrite_file(folder: Path, name: str, data: bytes) -> None:
    """Change a file and its hash in the manifest."""
    (folder / name).write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = hashlib.sha256(data).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def bake_tables(
    work: Path, name: str, tables: list[dict[str, Any]], base: str = "gemma2", **more: Any
) -> Path:
    """A recipe and its checkpoint."""
    saes = ("sae", "layer_2")
    data = {
        "schema": 1,
        "base": {"model": base, "license": "apache-2.0", **more},
        "clamp": [
            {**sae_table(sae), "features": DEFECT_FEATURES, **table}
            for sae, table in zip(saes, tables, strict=False)
        ],
        "verify": _VERIFY,
    }
    path = work / f"{name}.toml"
    path.write_text(tomli_w.dumps(data))
    plan = plan_checkpoint(Recipe.load(path))
    return write_checkpoint(plan, work / name, card="# card\n", witness_prompts=[])


def in_clamp(change: Callable[[dict[str, np.ndarray]], None]) -> Callable[[Path], None]:
    """A defect in the clamp's tensors."""

    def plant(folder: Path) -> None:
        tensors = load_file(folder / CLAMP_SHARD)
        clamp = {name.removeprefix(_CLAMP): array.copy() for name, array in tensors.items()}
        change(clamp)
        tensors = {_CLAMP + name: np.ascontiguousarray(array) for name, array in clamp.items()}
        save_file(tensors, folder / CLAMP_SHARD, metadata={"format": "pt"})
        rewrite_file(folder, CLAMP_SHARD, (folder / CLAMP_SHARD).read_bytes())

    return plant


def in_code(old: str, new: str) -> Callable[[Path], None]:
    """A defect in the modeling file."""

    def plant(folder: Path) -> None:
        text = (folder / MODELING_FILE).read_text()
        assert old in text
        rewrite_file(folder, MODELING_FILE, text.replace(old, new, 1).encode())

    return plant


def as_released(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a folder's modeling file be the one that bakeout ships: what is wrong in it is a bug of
    bakeout's then, which no check of files can see.
    """
    file = folder / MODELING_FILE
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setattr("export.code_check.RELEASED", {digest: "0"})
    monkeypatch.setattr("verify.engines.runners.MODELING", file)


def in_config(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """A defect in config.json."""

    def plant(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        rewrite_file(folder, "config.json", json.dumps(config).encode())

    return plant


def set_to(key: str, value: Callable[[np.ndarray], Any]) -> Callable[[dict[str, np.ndarray]], None]:
    """One tensor as a function of itself."""

    def change(clamp: dict[str, np.ndarray]) -> None:
        clamp[key] = np.asarray(value(clamp[key])).astype(clamp[key].dtype)

    return change


def drop_graph(folder: Path) -> None:
    """Take the ONNX graph out of a folder and its manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in ("model.onnx", "genai_config.json"):
        (folder / name).unlink()
        del manifest["files"][name]
    (folder / "manifest.json").write_text(json.dumps(manifest))
