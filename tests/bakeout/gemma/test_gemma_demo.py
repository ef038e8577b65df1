"""`bakeout demo --gemma` on a tiny stand-in for the model, and what is shipped for the real one."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path

import pytest
import tomli_w

from bake.recipe import Recipe
from bakeout.verbs import demo
from bakeout.verbs.demo import GEMMA, run_demo
from tests.folders import baked_world
from tests.worlds import tiny_words, write_jsonl, write_texts


def test_what_is_shipped_is_small_and_fits_together() -> None:
    recipe = Recipe.load(GEMMA / "recipe.toml")
    assert sum(path.stat().st_size for path in GEMMA.rglob("*") if path.is_file()) < 1e6
    for clamp in recipe.clamp:
        assert clamp.sae.path is not None
        config = json.loads((GEMMA / clamp.sae.path / "cfg.json").read_text())
        assert clamp.features == "select"
        assert config["metadata"]["slice_of"] == 8192 and config["d_in"] == 640
        assert len(set(config["metadata"]["features"])) == config["d_sae"]
        assert config["metadata"]["hook_name"] == clamp.hook_point
    assert recipe.verify is not None and recipe.select is not None
    rows = {
        path: [json.loads(line) for line in (GEMMA / path).read_text().splitlines()]
        for path in {source.path for source in recipe.verify.sources if source.path is not None}
    }
    assert all(len(found) >= 5 for found in rows.values())
    measured = {row["text"][:60] for found in rows.values() for row in found if "text" in row}
    for source in (recipe.select.forget, recipe.select.retain):
        assert source.path is not None
        texts = [
            json.loads(line)["text"] for line in (GEMMA / source.path).read_text().splitlines()
        ]
        assert len(set(texts)) >= 100 and not measured & {text[:60] for text in texts}


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny base in the cache's place, and a recipe for it in the shipped one's."""
    work = baked_world(tmp_path / "world", [0, 1, 9])
    base = shutil.move(work / "base", tmp_path / "base")
    rows = [{"prompt": tiny_words(2 + i % 3, i), "answers": ["a"]} for i in range(6)]
    write_jsonl(work / "topic.jsonl", rows[:4])
    write_jsonl(work / "generic.jsonl", rows[4:])
    write_texts(work / "near.jsonl", 3, seed=5)
    data = tomllib.loads((work / "recipe.toml").read_text())
    data["verify"] |= {
        "texts": {"near": {"path": "near.jsonl"}},
        "completions": {
            "prompts": {"path": "topic.jsonl"},
            "generic": {"path": "generic.jsonl"},
        },
    }
    data["clamp"][0]["sae"] = {"path": "sae"}
    (work / "recipe.toml").write_text(tomli_w.dumps(data))
    monkeypatch.setattr(demo, "GEMMA", work)
    monkeypatch.setattr("bakeout.gemma.gemma_files.base_folder", lambda *_: Path(base))
    return work


@pytest.mark.timeout(300)
def test_one_command_to_a_table_of_every_engine(
    stand_in: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs"
    assert run_demo(out, gemma=True) == 0
    said = capsys.readouterr().out
    names = {path.name for path in out.iterdir()}
    assert {"base", "checkpoint", "compiled", "adapter", "report.json", "report.html"} <= names
    report = json.loads((out / "report.json").read_text())
    assert report["verdict"] == "pass"
    engines = {one["engine"]: one for one in report["completions"]["engines"]}
    shown = {"reference", "checkpoint", "onnx", "onnx-int4", "compiled", "adapter"}
    assert shown <= engines.keys()
    assert report["engines"]["onnx-int8"]["witnesses"]["effect"] > 0.5
    for name in ("reference", "checkpoint", "onnx", "adapter"):
        assert engines[name]["as_reference"] == {"right": 6, "n": 6}
        assert engines[name]["topic"]["n"] == 4 and engines[name]["generic"]["n"] == 2
    table = said[said.index("right") :]
    for title in ("hooked reference", "checkpoint", "onnx-int4", "compiled", "adapter"):
        (row,) = [line for line in table.splitlines() if line.startswith(f"{title} ")]
        assert " of 4 " in row and " of 2 " in row and float(row.split()[-1]) > 0
    assert "loss added" in table and "near" in table
    assert "near" in (out / "report.html").read_text()
    # What is left is a folder that anybody can go on with.
    assert Recipe.load(out / "recipe.toml").base.model == "base"
