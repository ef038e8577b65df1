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
import torch
import transformers
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


def _alter_sae(sae: Path, alter: Callable[[dict[str, np.ndarray]], None]) -> None:
    tensors = load_file(sae / "sae_weights.safetensors")
    alter(tensors)
    save_file(tensors, sae / "sae_weights.safetensors")


def _scaled(by: float) -> Callable[[Path], None]:
    """The SAE of a model whose activations are so many times as large."""

    def alter(tensors: dict[str, np.ndarray]) -> None:
        tensors["W_enc"] /= np.float32(by)
        for name in ("W_dec", "b_dec"):
            tensors[name] *= np.float32(by)

    return lambda root: _alter_sae(root / "sae", alter)


def at_layer(layer: int) -> Callable[[Path], None]:
    """The SAE says another layer."""

    def move(root: Path) -> None:
        config = json.loads((root / "sae" / "cfg.json").read_text())
        config["metadata"]["hook_name"] = f"blocks.{layer}.hook_resid_post"
        (root / "sae" / "cfg.json").write_text(json.dumps(config))

    return move


def _another_model(root: Path) -> None:
    torch.manual_seed(5)
    config = transformers.AutoConfig.from_pretrained(root / "model")
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(root / "model")


def _permuted(root: Path) -> None:
    """Dimensions in another order: the same model, of another run."""

    def alter(tensors: dict[str, np.ndarray]) -> None:
        order = np.random.default_rng(0).permutation(len(tensors["b_dec"]))
        tensors["W_enc"], tensors["b_dec"] = tensors["W_enc"][order], tensors["b_dec"][order]
        tensors["W_dec"] = np.ascontiguousarray(tensors["W_dec"][:, order])

    _alter_sae(root / "sae", alter)


def _alike(root: Path) -> None:
    """Layer 1 adds little to layer 0's output, of which the SAE is."""
    path = root / "model" / "model.safetensors"
    weights = load_file(path)
    for name in ("post_attention_layernorm", "post_feedforward_layernorm"):
        norm = weights[f"model.layers.1.{name}.weight"]
        norm[:] = (1 + norm) * 0.4 - 1
    save_file(weights, path, metadata={"format": "pt"})
    at_layer(1)(root)


UNFIT: dict[str, Callable[[Path], None]] = {
    **{f"layer {layer}": at_layer(layer) for layer in range(1, 6)},
    "another model": _another_model,
    "another run": _permuted,
    "a tenth": _scaled(0.1),
    "ten times": _scaled(10.0),
    "half": _scaled(0.5),
    "twice": _scaled(2.0),
    "the layer before, which is much alike": _alike,
    "the root of d_in": _scaled(128**0.5),
}
"""SAEs that do not fit: what is altered in a folder with the miniature's `model/` and `sae/`."""
