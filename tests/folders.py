"""Folders that are baked and exported, with all that a verification of them needs."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import tomli_w

from bake.recipe import Recipe
from bakeout.verbs.baking import bake_recipe
from bakeout.verbs.exporting import export_adapter
from export.carriers.checkpoint import plan_checkpoint, write_checkpoint
from export.carriers.compiled.compiling import plan_compiled, write_compiled
from tests.worlds import (
    save_sae_lens,
    tiny_base,
    tiny_sae,
    tiny_tokenizer,
    tiny_words,
    write_jsonl,
    write_questions,
    write_texts,
)

N_FORGET, N_RETAIN = 5, 7
STOCK_TEXT_CLASSES = {
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
"""The stock class of each family without images, before Gemma 4."""
COMPILED_CLASSES = STOCK_TEXT_CLASSES | {
    "gemma4_text": "Gemma4ForCausalLM",
    "gemma4_unified_text": "Gemma4UnifiedForCausalLM",
}
"""The same of each family that is compiled."""


def manifest_data(files: dict[str, str], **changes: Any) -> dict[str, Any]:
    """A whole manifest.json of a folder with files of these hashes."""
    return {
        "schema": 1,
        "bakeout": "0.1.0",
        "carrier": "layer",
        "exact": True,
        "base": {"model": "base", "revision": None},
        "recipe_sha256": "0" * 64,
        "clamps": [],
        "sources": {},
        "tools": {},
        "files": files,
        **changes,
    }


def rehash(folder: Path, *added: str, lost: Container[str] = ()) -> None:
    """Rewrite a folder's manifest, as somebody does who altered its files.

    Args:
        folder: what was altered.
        added: names that it is to list besides.
        lost: names that it is to list no longer.
    """
    manifest = json.loads((folder / "manifest.json").read_text())
    names = {name: manifest["files"].get(name) for name in (*manifest["files"], *added)}
    manifest["files"] = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        if (folder / name).is_file()
        else old or "0" * 64
        for name, old in names.items()
        if name not in lost
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2))


def baked_world(folder: Path, features: list[int], *, n_texts: int = 6) -> Path:
    """Fills a folder with all that a verification needs, and gives it."""
    tiny_tokenizer(tiny_base(folder / "base"))
    save_sae_lens(folder / "sae", tiny_sae())
    write_questions(folder / "forget.jsonl", N_FORGET, seed=1, subject="bell_ringing")
    write_questions(folder / "retain.jsonl", N_RETAIN, seed=2)
    write_texts(folder / "text.jsonl", n_texts)
    clamp = {"sae": {"path": "sae"}, "method": "clamp", "features": features, "value": -6.0}
    recipe = Recipe.load(write_verify_recipe(folder / "recipe.toml", clamp))
    write_checkpoint(plan_checkpoint(recipe), folder / "checkpoint", card="# card\n")
    return folder


def write_verify_recipe(path: Path, *clamps: dict[str, Any], **base: Any) -> Path:
    """A recipe over `base/` that is verified on the questions and text beside it."""
    verify = {
        "forget_questions": {"path": "forget.jsonl"},
        "retain_questions": {"path": "retain.jsonl"},
        "text": {"path": "text.jsonl"},
        "prompt": "plain",
    }
    base = {"model": "base", "license": "apache-2.0", **base}
    data = {"schema": 1, "base": base, "clamp": list(clamps), "verify": verify}
    path.write_text(tomli_w.dumps(data))
    return path


def distill_world(folder: Path, **table: Any) -> Path:
    """`baked_world`, with texts and a [distill] table of a few steps; gives the folder."""
    baked_world(folder, [1, 5, 9])
    for seed, side in enumerate(("forget", "retain")):
        own = " zox" if side == "forget" else ""
        texts = [{"text": tiny_words(14 + n % 5, 100 * seed + n) + own} for n in range(24)]
        write_jsonl(folder / f"{side}_texts.jsonl", texts)
    corpora = {side: {"path": f"{side}_texts.jsonl"} for side in ("forget", "retain")}
    data = tomllib.loads((folder / "recipe.toml").read_text())
    data["distill"] = {**corpora, "seq_len": 32, "batch_size": 4, "steps": 3, **table}
    (folder / "recipe.toml").write_text(tomli_w.dumps(data))
    return folder


def recipe_variant(work: Path, name: str, change: Callable[[dict[str, Any]], None]) -> Recipe:
    """The recipe with something changed, in the same folder."""
    data = tomllib.loads((work / "recipe.toml").read_text())
    change(data)
    path = work / f"{name}.toml"
    path.write_text(tomli_w.dumps(data))
    return Recipe.load(path)


def compile_recipe(recipe: Path, out: Path, **options: Any) -> Path:
    """Bake a recipe and compile the checkpoint; returns the compiled folder."""
    bake_recipe(recipe, out / "checkpoint", force=False)
    plan = plan_compiled(out / "checkpoint", **options)
    return write_compiled(plan, out / "compiled", card="# card\n")


def make_adapter(
    folder: Path, family: str = "gemma2", dtype: str = "float32", layer: int = 1
) -> Path:
    """`base/`, `sae/`, `recipe.toml`, the baked `checkpoint/` and the `adapter/`."""
    tiny_base(folder / "base", family, shards=2, dtype=dtype)
    save_sae_lens(folder / "sae", tiny_sae(), layer=layer)
    (folder / "recipe.toml").write_text(
        'schema = 1\n[base]\nmodel = "base"\nlicense = "gemma"\n[[clamp]]\n'
        'sae = { path = "sae" }\nmethod = "clamp"\nfeatures = [1, 5, 9]\nvalue = -6.0\n'
    )
    bake_recipe(folder / "recipe.toml", folder / "checkpoint", force=False)
    export_adapter(folder / "checkpoint", folder / "adapter", force=False)
    return folder
