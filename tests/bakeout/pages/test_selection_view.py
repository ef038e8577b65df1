"""`bakeout select`, and `bakeout bake` of a recipe that says "select"."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from bake.recipe import Recipe
from bakeout.cli import run
from tests.worlds import (
    RecipeWriter,
    save_sae_lens,
    tiny_base,
    tiny_sae,
    tiny_tokenizer,
    write_texts,
)

TABLE: dict[str, Any] = {
    "sae": {"path": "sae"},
    "method": "clamp",
    "features": "select",
    "value": -6.0,
}
SELECT: dict[str, Any] = {
    "forget": {"path": "forget.jsonl"},
    "retain": {"path": "retain.jsonl"},
    "retain_threshold": 0.3,
    "n_features": 4,
    "seq_len": 24,
    "n_seqs": 20,
}


@pytest.fixture
def recipe(tmp_path: Path, write_recipe: RecipeWriter, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BAKEOUT_CACHE", str(tmp_path / "cache"))
    tiny_tokenizer(tiny_base(tmp_path / "base"))
    save_sae_lens(tmp_path / "sae", tiny_sae())
    write_texts(tmp_path / "forget.jsonl", 12, seed=0)
    write_texts(tmp_path / "retain.jsonl", 12, seed=1)
    return write_recipe(TABLE, select=SELECT)


def test_select_shows_writes_and_says_why(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sub").mkdir()
    out, found = tmp_path / "sub" / "out.toml", tmp_path / "found.json"
    assert run(["select", str(recipe), "--write", str(out), "--json", str(found)]) == 0
    shown = capsys.readouterr().out
    assert "forget share" in shown and "4 of 64 features of sae" in shown
    report = json.loads(found.read_text())
    (selection,) = report["selections"]
    numbers = [entry["feature"] for entry in selection["features"]]
    assert [entry["rank"] for entry in selection["features"]] == [1, 2, 3, 4]
    written = Recipe.load(out)
    assert written.clamp[0].features == numbers
    assert written.local("../sae").is_dir() and written.clamp[0].sae.path == "../sae"
    assert len(written.local_sources) == len(Recipe.load(recipe).local_sources)
    assert 'features = "select"' in recipe.read_text()
    folder = tmp_path / "baked"
    assert run(["bake", str(out), "--out", str(folder)]) == 0
    direct = tmp_path / "direct"
    assert run(["bake", str(recipe), "--out", str(direct)]) == 0
    for name in ("model-sae-clamp.safetensors", "config.json"):
        assert (folder / name).read_bytes() == (direct / name).read_bytes()
    stored = tomllib.loads((direct / "recipe.toml").read_text())
    assert stored["clamp"][0]["features"] == numbers and stored["select"]["n_features"] == 4
    manifest = json.loads((direct / "manifest.json").read_text())
    assert manifest["clamps"][0]["features"] == numbers


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--write", "{recipe}"], "is an input"),
        (["--write", "{folder}/cache.toml"], "exists; choose another name, or pass --force"),
        (["--write", "{folder}/absent/out.toml"], "its folder does not exist"),
    ],
)
def test_what_is_not_overwritten(
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    match: str,
) -> None:
    (tmp_path / "cache.toml").write_text("mine")
    filled = [a.format(recipe=recipe, folder=tmp_path) for a in arguments]
    assert run(["select", str(recipe), *filled]) == 2
    assert match in capsys.readouterr().err
    assert (tmp_path / "cache.toml").read_text() == "mine" and not (tmp_path / "cache").exists()
    target = tmp_path / "cache.toml"
    assert run(["select", str(recipe), "--write", str(target), "--force"]) == 0
    assert Recipe.load(target).clamp[0].features != "select"


def test_a_recipe_that_names_its_features(
    recipe: Path, write_recipe: RecipeWriter, capsys: pytest.CaptureFixture[str]
) -> None:
    write_recipe({**TABLE, "features": [1]}, select=SELECT)
    assert run(["select", str(recipe)]) == 2
    assert 'names its features; expected features = "select"' in capsys.readouterr().err


def test_bake_of_what_cannot_be_selected_writes_nothing(
    recipe: Path, tmp_path: Path, write_recipe: RecipeWriter, capsys: pytest.CaptureFixture[str]
) -> None:
    write_recipe(TABLE, select={**SELECT, "retain_threshold": 0.0})
    assert run(["bake", str(recipe), "--out", str(tmp_path / "out")]) == 2
    (line,) = [ln for ln in capsys.readouterr().err.splitlines() if "Writing" not in ln]
    assert "would at" in line and not (tmp_path / "out").exists()
