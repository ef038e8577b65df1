"""Clamped folders that engines serve, damaged ones, and what transformers says of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bake.recipe import Recipe
from export.carriers.checkpoint import plan_checkpoint, write_checkpoint
from tests.folders import write_verify_recipe
from tests.worlds import (
    save_sae_lens,
    tiny_base,
    tiny_sae,
    tiny_tokenizer,
    write_questions,
    write_texts,
)

ROOT = Path(__file__).parents[2]
APART = Path(sys.prefix) / "serving"
"""Where `make test` puts the engines."""
BOS = 2
CLAMP = {"method": "clamp", "features": [1, 5, 9, 12], "value": -6.0}
CASES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "gemma": ("gemma", [CLAMP]),
    "gemma2, two places": ("gemma2", [CLAMP, {**CLAMP, "sae": {"path": "later"}}]),
    "gemma2, BOS too": ("gemma2", [{**CLAMP, "exempt_bos": False}]),
    "gemma3_text": ("gemma3_text", [CLAMP]),
    "gemma3_text, TopK": ("gemma3_text", [{**CLAMP, "sae": {"path": "topk"}}]),
    "gemma2, dynamic": ("gemma2", [{**CLAMP, "method": "dynamic", "tau": 0.1}]),
}
ROWS = [[BOS, *range(6, 40)], [BOS, 8, BOS, *range(40, 60)], [BOS, 9]]
"""Longer than the window; with BOS where no text begins; short."""


def checkpoint(folder: Path, family: str, clamps: list[dict[str, Any]]) -> Path:
    tiny_tokenizer(tiny_base(folder / "base", family))
    save_sae_lens(folder / "sae", tiny_sae())
    save_sae_lens(folder / "later", tiny_sae(seed=3), layer=3)
    save_sae_lens(folder / "topk", tiny_sae(), architecture="topk", k=12)
    for side in ("forget", "retain"):
        write_questions(folder / f"{side}.jsonl", 4)
    write_texts(folder / "text.jsonl", 2)
    tables = [{"sae": {"path": "sae"}, **clamp} for clamp in clamps]
    recipe = Recipe.load(write_verify_recipe(folder / "recipe.toml", *tables))
    write_checkpoint(plan_checkpoint(recipe), folder / "checkpoint", card="# card\n")
    return folder / "checkpoint"


def damaged(folder: Path, name: str, change: Any) -> Path:
    """A copy whose clamp's tensors were changed."""
    copy = folder.parent / name
    shutil.copytree(folder, copy)
    (shard,) = (of for of in copy.glob("*.safetensors") if "clamp" in of.name)
    tensors = load_file(shard)
    change(tensors, next(key for key in tensors if key.endswith("W_dec")))
    save_file(tensors, shard)
    return copy


def _misses(tensors: Any, key: str) -> None:
    del tensors[key]


def _has_more(tensors: Any, key: str) -> None:
    tensors[key.replace("layers.1", "layers.2")] = tensors[key].clone()


def _has_nan(tensors: Any, key: str) -> None:
    tensors[key][0, 0] = float("nan")


def _has_another_shape(tensors: Any, key: str) -> None:
    tensors[key] = tensors[key][:-1].clone()


DAMAGE = {
    "is missing from the checkpoint": _misses,
    "sae_clamp": _has_more,  # some in their own words
    "is not finite": _has_nan,
    "has another shape than": _has_another_shape,
}
TENSORS = ("W_enc", "b_enc", "theta", "W_dec", "trigger", "route", "value", "scale")


@dataclass
class Served:
    """Folders, and what an engine says of each."""

    folders: dict[str, Path]
    said: dict[tuple[str, str], Any]
    """(name, way of asking) -> [tokens, vocab], or the words of a refusal."""


def clamped_folders(out: Path) -> dict[str, Path]:
    """Those of `CASES`, `DAMAGE` and `TENSORS`."""
    folders = {
        name: checkpoint(out / name.replace(",", "").replace(" ", "-"), *case)
        for name, case in CASES.items()
    }
    for words, change in DAMAGE.items():
        folders[words] = damaged(folders["gemma2, BOS too"], words.replace(" ", "-"), change)
    for tensor in TENSORS:
        folders[tensor] = damaged(
            folders["gemma2, BOS too"],
            f"without-{tensor}",
            lambda tensors, key, lost=tensor: tensors.pop(key.replace("W_dec", lost)),
        )
    return folders


def answers(module: str, requests: Sequence[dict[str, Any]], out: Path, *flags: str) -> list[Any]:
    """What an engine in a process of its own says to each of some requests."""
    for number, request in enumerate(requests):
        request["logits"] = str(out / f"{module}-{number}{''.join(flags)}.pt")
    (out / "request.json").write_text(json.dumps(requests))
    paths = [str(ROOT), str(APART), os.environ.get("PYTHONPATH", "")]
    process = subprocess.run(
        [sys.executable, "-m", f"tests.serving.{module}", str(out / "request.json"), *flags],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"},
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr.decode()[-3000:]
    return [torch.load(request["logits"]) for request in requests]


@torch.no_grad()
def ours(folder: Path, dtype: str, *, clamped: bool = True) -> torch.Tensor:
    """What transformers says, one sequence after another."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="eager"
    ).eval()
    for layer in model.model.layers:
        layer.sae_clamp = layer.sae_clamp if clamped else None
    return torch.cat([model(torch.tensor([row])).logits[0] for row in ROWS]).float()


def kl(one: torch.Tensor, other: torch.Tensor) -> float:
    """Mean, nats per token."""
    one, other = one.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((one.exp() * (one - other)).sum(-1).mean())


SERVED = [name for name in CASES if "dynamic" not in name]
