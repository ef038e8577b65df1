"""Code in a folder is never run, by no verb, in no way; and the folder is refused by all of them.

As in `test_planted_defects`, the manifest lists what was planted, with its hashes.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

import bake
from bake.errors import FolderError
from bake.families import family_of
from bake.recipe import Recipe
from bakeout.cli import run
from bakeout.verbs.exporting import export_adapter, export_compiled
from export.code_check import MODELING_FILE, RELEASED, auto_map_of, check_code
from export.manifest import read_json
from tests.folders import baked_world, make_adapter
from tests.reports import error_line
from tests.verify.defects.planted_code import WAYS, Bomb, code, plant, rehash
from tests.verify.engines.test_links import in_cache
from verify.run import verify_folder

ROOT = Path(__file__).parents[3]
VERBS = (
    "verify {}",
    "verify {} --recipe {}",
    "verify {} --recipe {} --only parity",
    "verify {} --only witnesses",
    "export onnx {}",
    "export compiled {} --out new",
    "export adapter {} --out new",
    "export merged {} --out new",
    "chat {}",
    "chat {} --engine onnx",
    "card {}",
    "push {} user/name --unverified --dry-run",
    "show {}",
    "compare {}",
    "audit {} --recipe {} --quick",
)
REPORTING = ("verify", "compare", "audit")
"""Verbs that report what is broken."""
REFUSED = re.compile(
    r"is none that a released bakeout wrote|may be run when it is loaded|expected no such key"
    r"|(auto_map|model_type|peft_type) is |is loaded on top of the weights|says 'auto_mapping'"
)
UNLOADABLE = (
    *("custom generation, linked", "pickled weights alone", "a pickled adapter", "a quantizer"),
    *("a fusion", "another config", "other weights", "another method of peft", "code on the hub"),
    *("code of a part", "another architecture"),
)
"""What transformers refuses by itself, or what cannot be planted beside the others."""
ALL = [(carrier, way) for carrier, ways in WAYS.items() for way in ways]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base, SAE, data, recipe, and a folder of each carrier."""
    folder = baked_world(tmp_path_factory.mktemp("strangers"), [1, 5, 9])
    export_compiled(folder / "checkpoint", folder / "compiled")
    export_adapter(folder / "checkpoint", folder / "adapter")
    return folder


def test_there_are_twenty_ways_and_more() -> None:
    assert len({way for _, way in ALL}) >= 20 and len(WAYS) == 3


@pytest.mark.parametrize(("carrier", "way"), ALL)
def test_no_verb_runs_it_and_every_verb_refuses_it(
    world: Path,
    tmp_path: Path,
    carrier: str,
    way: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, marker = shutil.copytree(world / carrier, tmp_path / "folder"), tmp_path / "marker"
    plant(folder, marker, WAYS[carrier][way])
    monkeypatch.setattr("verify.engines.engines.TorchRunner", None)  # not even started
    monkeypatch.chdir(folder)
    for verb in VERBS:
        monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
        capsys.readouterr()
        exit_code = run(verb.format(folder, world / "recipe.toml").split())
        said = capsys.readouterr()
        assert exit_code == (1 if verb.startswith(REPORTING) else 2), (verb, said)
        assert exit_code == 1 or said.err.count("\n") == 1, said.err
        assert exit_code == 2 or "integrity" in said.out or "broken" in said.out, said.out
        assert REFUSED.search(said.out + said.err), said
        assert not marker.exists(), verb
    assert not (folder / "new").exists()


@pytest.mark.parametrize("carrier", WAYS)
def test_nothing_runs_even_where_it_is_not_looked_for(
    world: Path, tmp_path: Path, carrier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second wall: what loads a folder is shown config and safetensors, and runs no code."""
    for module in ("export.code_check", "verify.evidence.integrity"):
        monkeypatch.setattr(f"{module}.foreign_code", lambda *_: [])
    for module in ("verify.run", "export.clamped", "bakeout.verbs.streaming", "model_cards.facts"):
        monkeypatch.setattr(f"{module}.check_contents", lambda *_: None)
    marker = tmp_path / "marker"
    ways = [way for name, way in WAYS[carrier].items() if name not in UNLOADABLE]
    folder = plant(shutil.copytree(world / carrier, tmp_path / "folder"), marker, *ways)
    monkeypatch.chdir(folder)
    recipe = Recipe.load(world / "recipe.toml")
    report = verify_folder(folder, recipe, frozenset({"parity"}))
    assert report.verdict == "pass"  # bakeout's own code ran
    for verb in VERBS[4:]:
        monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
        run(verb.format(folder, world / "recipe.toml").split())
    if carrier == "adapter":
        plant(folder, marker, WAYS[carrier]["another method of peft"])
        with pytest.raises(FolderError, match="its peft_type is 'LORA'; expected 'SAE_CLAMP'"):
            verify_folder(folder, recipe, frozenset({"parity"}))
    assert not marker.exists()


def test_what_is_planted_would_run(world: Path, tmp_path: Path) -> None:
    """Otherwise the tests above could not fail."""
    from transformers import AutoModelForCausalLM

    marker = tmp_path / "marker"
    folder = shutil.copytree(world / "compiled", tmp_path / "folder")
    WAYS["checkpoint"]["custom generation"](folder, marker)
    with suppress(AttributeError):  # it has no function `generate`
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert marker.exists()
    marker.unlink()
    pickle.loads(pickle.dumps(Bomb(marker)))
    assert marker.exists()


# --------------------------------------------------------------------------- what is known


def test_the_shipped_modeling_file_is_listed() -> None:
    digest = hashlib.sha256((Path(bake.__file__).parent / MODELING_FILE).read_bytes()).hexdigest()
    assert digest in RELEASED, (
        f'{MODELING_FILE} was changed: add "{digest}": "VERSION" to RELEASED in '
        "export/code_check.py, and leave the others there"
    )


def test_another_version_is_refused_with_what_to_do(
    world: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("export.code_check.RELEASED", {"0" * 64: "9.9"})
    assert run(["export", "adapter", str(world / "checkpoint"), "--out", str(world / "new")]) == 2
    said = error_line(capsys)
    assert "modeling_clamped_gemma.py: is none that a released bakeout wrote" in said
    assert "Verify it with that version, or bake it again" in said
    report = verify_folder(world / "checkpoint", Recipe.load(world / "recipe.toml"))
    assert (report.verdict, report.scope, report.engines) == ("fail", "integrity", ())


@pytest.mark.parametrize("carrier", WAYS)
def test_a_sound_folder_has_none(world: Path, tmp_path: Path, carrier: str) -> None:
    check_code(world / carrier)
    # As the hub's cache and downloader, and git, lay it.
    check_code(in_cache(world / carrier, tmp_path / "cache"))
    folder = shutil.copytree(world / carrier, tmp_path / "local")
    (folder / ".cache/huggingface/download").mkdir(parents=True)
    (folder / f".cache/huggingface/download/{MODELING_FILE}.metadata").write_text("0f")
    (folder / ".git/hooks").mkdir(parents=True)
    (folder / ".git/hooks/pre-commit.sample").write_text("#!/bin/sh")
    check_code(folder)
    assert verify_folder(folder, only=frozenset({"integrity"})).verdict == "pass"


@pytest.mark.parametrize("family", ["gemma", "gemma3_text", "gemma3"])
def test_sound_folders_of_the_other_families_have_none(tmp_path: Path, family: str) -> None:
    work = make_adapter(tmp_path, family)
    for name in ("checkpoint", "adapter"):
        check_code(work / name)
    checkpoint = work / "checkpoint"
    config = read_json(checkpoint / "config.json")
    assert config["auto_map"] == auto_map_of(family_of(config["model_type"]))
    (checkpoint / MODELING_FILE).unlink()  # as where a graph of rounded weights lies alone
    rehash(checkpoint)
    check_code(checkpoint)


def test_settings_that_are_no_files_or_too_large_are_refused_at_once(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(world / "checkpoint", tmp_path / "folder")
    for name in (MODELING_FILE, "extra.json"):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)  # to open it would wait for ever
    assert run(["chat", str(folder)]) == 2
    assert "is none that a released bakeout wrote (sha256 of no such file" in error_line(capsys)
    (folder / MODELING_FILE).unlink()
    for text in (f'{{"a": "{"x" * (17 << 20)}"}}', '{"a":' * 100_000 + "1" + "}" * 100_000):
        (folder / "extra.json").unlink()
        (folder / "extra.json").write_text(text)
        capsys.readouterr()
        assert run(["show", str(folder)]) == 2
        assert re.search(r"expected settings of at most|nested too deeply", error_line(capsys))


def test_a_base_with_code_is_not_baked(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = shutil.copytree(world, tmp_path / "work")
    marker = tmp_path / "marker"
    (work / "base/tokenizer_evil.py").write_text(code(marker))
    bake_it = ["bake", str(work / "recipe.toml"), "--out", str(work / "new")]
    assert run(bake_it) == 0  # left behind
    check_code(work / "new")
    for name, key in (("tokenizer_config.json", "auto_map"), ("config.json", "fusion_config")):
        text = (work / "base" / name).read_text()
        (work / "base" / name).write_text(text.replace("{", f'{{"{key}": {{"a": "b"}},', 1))
        capsys.readouterr()
        assert run([*bake_it, "--dry-run", "--force"]) == 2
        assert f"{name} says {key}" in error_line(capsys)
        (work / "base" / name).write_text(text)
    assert not marker.exists()


def test_nothing_is_imported_from_the_current_folder(world: Path, tmp_path: Path) -> None:
    folder, marker = shutil.copytree(world / "checkpoint", tmp_path / "here"), tmp_path / "marker"
    for name in ("pydantic", "typer", "sitecustomize", "rich"):
        (folder / f"{name}.py").write_text(code(marker))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "bakeout", "show", "."]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, ""), done
    assert "may be run when it is loaded" in done.stderr and not marker.exists()
