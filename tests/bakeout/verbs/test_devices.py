"""`--device` and `--dtype`: every verb that runs a model hands them on to it."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

import bake.search.corpus_statistics as corpus_statistics
from bake.stock import load_base
from bakeout.cli import run
from bakeout.verbs.streaming import TorchSpeaker, open_speaker
from tests.worlds import (
    RecipeWriter,
    notes,
    room_for,
    save_sae_lens,
    tiny_base,
    tiny_sae,
    tiny_tokenizer,
    write_corpora,
)

CLAMP = {"sae": {"path": "sae"}, "method": "clamp", "value": -9.0}
SELECTING = (
    "select r.toml",
    "features r.toml --html f.html",
    "sweep r.toml --out s --grid value=-1",
)


@pytest.fixture
def world(tmp_path: Path, write_recipe: RecipeWriter, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`r.toml` selects, `named.toml` names its features, `baked` was made of that."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BAKEOUT_CACHE", str(tmp_path / "cache"))
    tiny_tokenizer(tiny_base(tmp_path / "base"))
    save_sae_lens(tmp_path / "sae", tiny_sae())
    write_corpora(tmp_path)
    corpora = {side: {"path": f"{side}.jsonl"} for side in ("forget", "retain")}
    select = {**corpora, "retain_threshold": 0.3, "n_features": 4, "seq_len": 24, "n_seqs": 20}
    verify = {f"{side}_questions": {"path": f"{side}_questions.jsonl"} for side in corpora}
    verify["text"] = {"path": "text.jsonl"}
    named = write_recipe(CLAMP | {"features": [0, 1, 2, 3]}, verify=verify)
    named.rename(tmp_path / "named.toml")
    recipe = write_recipe(CLAMP | {"features": "select"}, select=select, verify=verify)
    recipe.rename(tmp_path / "r.toml")
    assert run(["bake", "named.toml", "--out", "baked", "--no-witnesses"]) == 0
    return tmp_path


@pytest.mark.parametrize(
    "verb",
    [
        *SELECTING,
        "bake r.toml --out out",
        "bake named.toml --out out --witnesses",
        "export onnx baked",
        "export compiled baked --out out",
        "verify baked --recipe named.toml",
    ],
)
def test_a_device_that_torch_does_not_have_is_one_line(
    world: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    capsys.readouterr()
    said = {"moon": "expected cpu, or cuda", "cuda:77": "torch cannot run the model there"}
    for device, what in said.items():
        assert run([*verb.split(), "--device", device]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: --device {device}: {what}")
    assert not (world / "out").exists()


def test_the_model_runs_where_and_in_what_is_asked_for(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded: list[tuple[str, str | None]] = []

    def load(recipe: Any, device: str = "cpu", dtype: str | None = None) -> Any:
        loaded.append((device, dtype))
        return load_base(recipe, "cpu", dtype)

    monkeypatch.setattr(corpus_statistics, "load_base", load)
    for verb in SELECTING:
        asked = ["--device", "cuda", "--dtype", "bfloat16"]
        assert run([*verb.split(), *asked]) == 0
    assert loaded == [("cuda", "bfloat16")] * 2  # what was selected by was kept for the page
    assert run(["select", "r.toml", "--write", "chosen.toml", "--device", "cuda"]) == 0
    assert loaded.pop() == ("cuda", "auto")  # other numbers than those in 16 bits
    assert "dtype" not in tomllib.loads((world / "chosen.toml").read_text())["base"]
    verify = ["verify", "baked", "--recipe", "r.toml", "--only", "integrity"]
    assert run([*verify, "--device", "cpu"]) == 1
    for path in (world / "cache").rglob("*"):
        path.unlink() if path.is_file() else None
    assert run([*verify, "--device", "cuda"]) == 1
    assert loaded.pop() == ("cuda", "auto")
    capsys.readouterr()
    assert run(["select", "r.toml", "--dtype", "int8"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said == ["error: --dtype int8: expected float32, bfloat16 or float16"]


def test_chat_runs_in_what_is_asked_for(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for dtype in (None, "bfloat16"):
        speaker = open_speaker(world / "baked", "torch", "cpu", dtype)
        assert isinstance(speaker, TorchSpeaker)
        assert speaker._model.dtype == (torch.float32 if dtype is None else torch.bfloat16)
    capsys.readouterr()
    assert run(["chat", "baked", "--engine", "onnx", "--dtype", "float32"]) == 2
    assert "error: --dtype float32: a graph has its own" in capsys.readouterr().err


def test_in_halves_the_same_is_found(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def found() -> tuple[str, list[Any]]:
        for path in (world / "cache").rglob("*"):
            path.unlink() if path.is_file() else None
        assert run(["select", "r.toml", "--write", "chosen.toml", "--force"]) == 0
        out = f"sweep{len(list(world.iterdir()))}"
        assert run(["sweep", "r.toml", "--out", out, "--grid", "value=-1,-9"]) == 0
        points = json.loads((world / out / "report.json").read_text())["validation"]["points"]
        told = [[of for name, of in sorted(p.items()) if name != "seconds"] for p in points]
        return (world / "chosen.toml").read_text(), told

    whole = found()
    assert notes(capsys) == []
    with room_for(300, layer=3):
        halved = found()
    with room_for(300, layer=1):
        assert found() == halved == whole
    said = " ".join(notes(capsys))
    for what in ("reading windows", "prompts", "clamping"):
        assert f"note: {what}: memory ran out at " in said


@pytest.mark.parametrize("device", ["bogus", "meta", "cuda:x", "CPU", ""])
def test_a_device_that_is_none_is_refused_before_anything_is_looked_up(
    device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for verb in ("features r.toml --html f.html", "verify baked", "audit baked --recipe r.toml"):
        assert run([*verb.split(), "--device", device]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"--device {device}: expected cpu, or cuda" in line
