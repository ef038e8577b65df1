"""A folder's bill of materials."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bakeout.cli import run
from export.manifest import Manifest
from tests.folders import baked_world


def test_it_names_all_that_the_folder_was_made_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = baked_world(tmp_path / "work", [1, 5]) / "checkpoint"
    before = (folder / "README.md").read_bytes()
    for name in ("one.json", "two.json"):
        assert run(["card", str(folder), "--bom", str(tmp_path / name)]) == 0
    text = (tmp_path / "one.json").read_text()
    found = json.loads(text)
    assert text == (tmp_path / "two.json").read_text()  # nothing of the time and place
    assert str(tmp_path) not in text and (folder / "README.md").read_bytes() == before
    manifest = Manifest.read(folder)
    parts = {part["name"]: part for part in found["components"]}
    for name, digest in manifest.files.items():
        assert parts[name]["type"] == "file"
        assert parts[name]["hashes"] == [{"alg": "SHA-256", "content": digest}]
    assert parts[manifest.base.model]["type"] == "machine-learning-model"
    (clamp,) = manifest.clamps
    assert parts[clamp.sae.name]["hashes"][0]["content"] == clamp.sae.sha256
    assert manifest.sources.items() <= {
        (name, part["hashes"][0]["content"])
        for name, part in parts.items()
        if part["type"] == "data"
    }
    about = found["metadata"]
    tools = {tool["name"]: tool["version"] for tool in about["tools"]["components"]}
    assert tools == manifest.tools
    assert about["component"]["hashes"][0]["content"] == manifest.sha256
    refs = {part["bom-ref"] for part in parts.values()}
    (depends,) = [of["dependsOn"] for of in found["dependencies"] if of.get("dependsOn")]
    assert set(depends) <= refs and len(depends) == 2 + len(manifest.sources)
    assert run(["card", str(folder), "--bom", str(tmp_path / "no" / "x.json")]) == 2
    assert "--bom: cannot be written" in capsys.readouterr().err
