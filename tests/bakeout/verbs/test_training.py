"""`bakeout distill` and `bakeout export merged` from the command line, and what follows them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from bakeout.cli import run
from export.manifest import Manifest
from tests.engines import InProcess
from tests.folders import distill_world, recipe_variant
from tests.reports import error_line
from tests.worlds import tiny_base, tiny_tokenizer


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A baked world with texts, `merged/` and `rmu/`."""
    folder = distill_world(tmp_path_factory.mktemp("distill"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BAKEOUT_CACHE", str(folder / "cache"))
        for method in ("merged", "rmu"):
            asked = ["--method", method, "--out", str(folder / method)]
            assert run(["distill", str(folder / "recipe.toml"), *asked]) == 0
    return folder


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("verify.engines.engines.TorchRunner", InProcess)
    monkeypatch.setenv("BAKEOUT_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("method", ["merged", "rmu"])
def test_it_is_measured_and_not_held_to_rounding(
    world: Path, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.json"
    asked = ["--recipe", str(world / "recipe.toml"), "--only", "integrity,parity,choices,loss"]
    code = run(["verify", str(world / method), *asked, "--json", str(report)])
    found = json.loads(report.read_text())
    assert (code, found["failures"]) == (0, [])
    engine = found["engines"][method]
    assert list(found["engines"]) == ["base", "reference", method]
    assert engine["parity"]["mean_kl"] > 1e-3  # a distance, far beyond rounding
    assert "rounding" not in engine["parity"] or engine["parity"]["rounding"] is None
    assert set(engine["forget"]) >= {"plain", "chat"} and engine["loss_added"] is not None
    assert "an approximation" in capsys.readouterr().out
    assert run(["card", str(world / method), "--report", str(report)]) == 0
    card = (world / method / "README.md").read_text()
    assert "**an approximation**" in card and "seed 0" in card and "trust_remote_code" not in card
    assert run(["verify", str(world / method), "--only", "integrity"]) == 0


def test_show(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["show", str(world / "merged")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "merged, an approximation" in shown and "lost by fine-tuning" in shown
    assert "student full" in shown and "from the base on retain text" in shown


def test_export_merged_takes_a_checkpoint_and_gives_the_same(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = ["--recipe", str(world / "recipe.toml")]
    out = ["--out", str(tmp_path / "merged")]
    assert run(["export", "merged", str(world / "checkpoint"), *recipe, *out]) == 0
    printed = capsys.readouterr().out
    assert "retain text" in printed and "from the clamped model" in printed
    names = ["model-00001-of-00001.safetensors", "recipe.toml", "config.json"]
    one, other = (Manifest.read(folder).files for folder in (world / "merged", tmp_path / "merged"))
    assert [one[name] for name in names] == [other[name] for name in names]


EXACT_ONLY = {
    "onnx": ["export", "onnx", "merged"],
    "compiled": ["export", "compiled", "merged", "--out", "new"],
    "adapter": ["export", "adapter", "merged", "--out", "new"],
    "merged": ["export", "merged", "merged", "--out", "new"],
    "distill": ["distill", "merged", "--out", "new"],
}


@pytest.mark.parametrize("what", EXACT_ONLY)
def test_where_an_exact_folder_is_needed(
    world: Path, what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(world)
    capsys.readouterr()
    assert run(EXACT_ONLY[what]) == 2
    assert "is an export already (carrier merged); expected a clamped" in error_line(capsys)
    assert not (world / "new").exists()


def test_it_has_no_witnesses(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run(["verify", str(world / "merged"), "--only", "witnesses"]) == 2
    assert "merged: has no witnesses" in error_line(capsys)


def test_bad_input(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, out = str(world / "recipe.toml"), ["--out", str(tmp_path / "out")]
    recipe_variant(world, "outside", lambda data: data["distill"].update(layers=[0, 4]))
    recipe_variant(world, "no-texts", lambda data: data.pop("distill"))
    short = {"path": "short.jsonl"}
    recipe_variant(world, "short", lambda data: data["distill"].update(forget=short))
    (world / "short.jsonl").write_text(json.dumps({"text": "a text that is long " * 4}) + "\n")
    checkpoint = str(world / "checkpoint")
    capsys.readouterr()
    for asked, said in (
        (["distill", recipe, "--method", "rum"], '--method "rum": expected one of merged, rmu'),
        (["distill", recipe, "--recipe", recipe], "--recipe goes with a folder"),
        (["distill", str(world / "outside.toml")], "0 to 4, but the model has 4 layers"),
        (["distill", str(world / "no-texts.toml")], "names no texts to train on"),
        (["distill", str(world / "short.toml")], "has 1 texts over 50 characters"),
        (["distill", checkpoint], "give the recipe with --recipe"),
        (
            ["distill", recipe, "--steps", "-1"],
            "steps: got -1, expected greater than or equal to 0",
        ),
    ):
        assert run([*asked, *out]) == 2
        assert said in error_line(capsys)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_base(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "world"
    shutil.copytree(world, folder)
    shutil.rmtree(folder / "base")
    tiny_tokenizer(tiny_base(folder / "base", seed=9))
    capsys.readouterr()
    asked = ["--recipe", str(folder / "recipe.toml"), "--out", str(tmp_path / "out")]
    assert run(["distill", str(folder / "checkpoint"), *asked]) == 2
    assert "was not baked from base" in error_line(capsys)
