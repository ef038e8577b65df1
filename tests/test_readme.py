"""What README shows is what runs: its recipe parses, its code loads, its commands exist."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from bake.methods import METHODS
from bake.recipe import Recipe
from bakeout.cli import VERBS
from bakeout.verbs.baking import bake_recipe
from export.carriers.carriers import CARRIERS
from export.carriers.onnx.onnx_folder import export_onnx
from tests.engines import InProcess
from tests.folders import baked_world
from tests.worlds import RecipeWriter, save_sae_lens, tiny_base, tiny_sae, tiny_tokenizer
from verify.evidence.kinds import KINDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]


def blocks(language: str, page: Path = ROOT / "README.md") -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_recipe_is_a_recipe() -> None:
    text, select = blocks("toml")
    (shown,) = blocks("toml", ROOT / "docs" / "verifying.md")
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
    (in_torch,), (in_onnx,) = blocks("python"), blocks("python", ROOT / "docs" / "onnx.md")
    names: dict[str, Any] = {}
    exec(in_torch, names)
    assert type(names["model"]).__name__ == "ClampedGemma2ForCausalLM"
    assert names["tokenizer"].bos_token == "<bos>"
    exec(in_onnx, names)
    assert len(names["tokens"]) == 8 and type(names["model"]).__module__.startswith("onnxruntime")


def test_the_python_api_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("verify.engines.engines.TorchRunner", InProcess)
    monkeypatch.chdir(baked_world(tmp_path, [1, 5, 9]))
    names: dict[str, Any] = {}
    exec(blocks("py")[0], names)
    assert names["report"].verdict == "pass" and names["graph"].is_file()


def test_every_command_that_is_named_exists() -> None:
    shown = "\n".join(path.read_text(encoding="utf-8") for path in PAGES)
    commands = "\n".join(re.findall(r"```sh\n(.*?)```", shown, re.DOTALL))
    named = set(re.findall(r"bakeout ([a-z-]+) ", commands))
    assert named and named <= set(VERBS)


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_tables_are_those_of_the_code() -> None:
    said = dict(re.findall(r"^\| `([a-z_]+)` \| (.+) \|$", README, re.MULTILINE))
    expected = {name: kind.what for name, kind in KINDS.items()}
    for name, method in METHODS.items():
        parameters = ", ".join(f"`{field}`" for field in (*method.fields, "trigger"))
        expected[name] = f"{method.becomes} | {parameters}"
    for name, c in CARRIERS.items():
        if c.baseline:
            continue  # docs/distilled.md lists those
        expected[name] = f"{c.takes} | {c.claim} | {c.needs} | {c.comes_off}"
    assert said == expected
