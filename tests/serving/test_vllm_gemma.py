"""vLLM's own registry, loader and layers on clamped checkpoints, in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bake.recipe import Recipe
from export.carriers.checkpoint import plan_checkpoint, write_checkpoint
from tests.folders import write_verify_recipe
from tests.worlds import (
    VOCAB,
    save_sae_lens,
    tiny_base,
    tiny_sae,
    tiny_tokenizer,
    write_questions,
    write_texts,
)

ROOT = Path(__file__).parents[2]
APART = Path(sys.prefix) / "vllm"
"""Where `make test` puts it."""
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None and not (APART / "vllm").is_dir(),
    reason="vLLM is not installed; `make test` installs it",
)
TRUSTED = "float32, bakeout not installed, the folder's code trusted"
"""Then vLLM puts its own attention into the folder's classes."""
OFFLOADED = "float32, weights offloaded"
"""Then vLLM wraps the forward of each layer as it makes it."""
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
    import shutil

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
    "sae_clamp": _has_more,  # in vLLM's own words
    "is not finite": _has_nan,
    "has another shape than": _has_another_shape,
}
TENSORS = ("W_enc", "b_enc", "theta", "W_dec", "trigger", "route", "value", "scale")


@dataclass
class Served:
    """Folders, and what vLLM says of each."""

    folders: dict[str, Path]
    said: dict[tuple[str, str], Any]
    """(name, dtype or `TRUSTED`) -> [tokens, vocab], or the words of a refusal."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    out = tmp_path_factory.mktemp("vllm")
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
    asked = [(name, "float32") for name in folders]
    for dtype in ("bfloat16", "float16"):
        asked += [(name, dtype) for name in ("gemma", "gemma2, two places", "gemma3_text")]
    asked += [(name, TRUSTED) for name in (*CASES, *DAMAGE, *TENSORS)]
    asked += [(name, OFFLOADED) for name in ("gemma", "gemma3_text")]
    requests = [
        {
            "folder": str(folders[name]),
            "dtype": dtype.partition(",")[0],
            "trust_remote_code": dtype == TRUSTED,
            "wrapped": dtype == OFFLOADED,
            "rows": ROWS,
            "logits": str(out / f"{number}.pt"),
        }
        for number, (name, dtype) in enumerate(asked)
    ]
    paths = [str(ROOT), str(APART), os.environ.get("PYTHONPATH", "")]
    for alone in (False, True):
        request = [of for of in requests if of["trust_remote_code"] == alone]
        (out / "request.json").write_text(json.dumps(request))
        command = [sys.executable, "-m", "tests.serving.vllm_here", str(out / "request.json")]
        process = subprocess.run(
            [*command, *(["alone"] if alone else [])],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"},
            cwd=ROOT,
            capture_output=True,
            check=False,
        )
        assert process.returncode == 0, process.stderr.decode()[-3000:]
    said = {of: torch.load(out / f"{n}.pt") for n, of in enumerate(asked)}
    return Served(folders, said)


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


@pytest.mark.parametrize("name", SERVED)
def test_it_serves_what_transformers_does(served: Served, name: str) -> None:
    got = served.said[name, "float32"]
    assert isinstance(got, torch.Tensor), got
    assert got.shape == (sum(map(len, ROWS)), VOCAB)
    want, base = (ours(served.folders[name], "float32", clamped=of) for of in (True, False))
    assert kl(want, got) < 1e-8 < 1e-3 < kl(want, base)
    if (name, "bfloat16") in served.said:
        rounded = served.said[name, "bfloat16"]  # a token near its threshold may fire or not
        assert kl(want, rounded) < 0.05 * kl(base, rounded)


def test_bos_is_left_alone_by_its_id(served: Served) -> None:
    name = "gemma2, BOS too"
    with_bos = ours(served.folders[name], "float32")
    at = [0, len(ROWS[0]), len(ROWS[0]) + len(ROWS[1])]  # where each sequence begins with BOS
    alone = ours(served.folders["gemma2, two places"], "float32")
    assert kl(with_bos[at], served.said[name, "float32"][at]) < 1e-8
    assert kl(alone[at], served.said["gemma2, two places", "float32"][at]) < 1e-8
    assert not torch.equal(with_bos[at], alone[at])


def test_a_sequence_gate_is_refused(served: Served) -> None:
    said = served.said["gemma2, dynamic", "float32"]
    assert isinstance(said, str)
    assert "a clamp with a sequence gate cannot be served by vLLM" in said
    said = served.said["gemma2, dynamic", TRUSTED]
    assert isinstance(said, str)
    assert "nor with the attention of vLLM and others (vllm)" in said


@pytest.mark.parametrize("name", SERVED)
def test_so_does_the_folders_own_code_in_vllm(served: Served, name: str) -> None:
    got = served.said[name, TRUSTED]
    assert isinstance(got, torch.Tensor), got
    assert kl(ours(served.folders[name], "float32"), got) < 1e-8


@pytest.mark.parametrize("name", ["gemma", "gemma3_text"])
def test_offloaded_layers_are_clamped_too(served: Served, name: str) -> None:
    got = served.said[name, OFFLOADED]
    assert isinstance(got, torch.Tensor), got
    assert kl(ours(served.folders[name], "float32"), got) < 1e-8


@pytest.mark.parametrize("words", DAMAGE)
def test_a_damaged_clamp_is_refused(served: Served, words: str) -> None:
    said = served.said[words, "float32"]
    assert isinstance(said, str)
    assert words in said
    answered = served.said[words, TRUSTED]
    assert isinstance(answered, str) or answered.isnan().all()


@pytest.mark.parametrize("tensor", TENSORS)
def test_a_clamp_that_lacks_a_tensor_never_answers_as_the_base(served: Served, tensor: str) -> None:
    assert isinstance(served.said[tensor, "float32"], str)
    answered = served.said[tensor, TRUSTED]
    assert isinstance(answered, str) or answered.isnan().all()


def test_float16_is_refused_as_the_bases_is(served: Served) -> None:
    for name, refused in (("gemma", False), ("gemma2, two places", True), ("gemma3_text", True)):
        said = served.said[name, "float16"]
        assert isinstance(said, str) == refused
        assert not refused or "dtype float16" in said
