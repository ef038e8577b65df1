"""What README shows is what runs: its recipe parses, its code loads, its commands exist."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from conftest import RecipeWriter, save_sae_lens, tiny_base, tiny_sae, tiny_tokenizer

from bake.recipe import METHOD_FIELDS, Recipe
from bakeout.baking import bake_recipe
from bakeout.cli import app
from export.onnx_folder import export_onnx
from verify.kinds import KINDS

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_recipe_is_a_recipe() -> None:
    text, select, shown = blocks("toml")
    recipe = Recipe.parse(tomllib.loads(text), name="README.md", folder=Path())
    assert recipe.clamp[0].method == "clamp"
    selecting = tomllib.loads(f"{text}\n{select}")
    selecting["clamp"][0]["features"] = "select"
    assert Recipe.parse(selecting, name="README.md", folder=Path()).selects
    more = Recipe.parse(tomllib.loads(f"{text}\n{shown}"), name="README.md", folder=Path())
    assert more.verify is not None and more.verify.completions is not None
    assert list(more.verify.reworded) == ["german"]


def test_the_python_loads_a_checkpoint(
    tmp_path: Path, write_recipe: RecipeWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_base(tmp_path / "base")
    tiny_tokenizer(base)
    save_sae_lens(tmp_path / "sae", tiny_sae())
    table = {"sae": {"path": "sae"}, "method": "clamp", "features": [1, 5, 9], "value": -6.0}
    folder = tmp_path / "gemma-2-2b-clamped"
    bake_recipe(write_recipe(table), folder, force=False)
    export_onnx(folder)
    monkeypatch.chdir(tmp_path)
    in_torch, in_onnx, *others = blocks("python")
    names: dict[str, Any] = {}
    exec(in_torch, names)
    assert type(names["model"]).__name__ == "ClampedGemma2ForCausalLM"
    assert names["tokenizer"].bos_token == "<bos>"
    exec(in_onnx, names)
    assert len(names["tokens"]) == 8 and type(names["model"]).__module__.startswith("onnxruntime")
    assert not others


def test_every_command_and_method_that_is_named_exists() -> None:
    verbs = {
        command.name or (command.callback.__name__ if command.callback else "")
        for command in app.registered_commands
    } | {group.name or "" for group in app.registered_groups}
    named = set(re.findall(r"bakeout ([a-z-]+) ", "\n".join(blocks("sh"))))
    assert named and named <= verbs
    rows = set(re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE))
    assert rows == set(METHOD_FIELDS) | set(KINDS) - {"integrity", "witnesses"}
