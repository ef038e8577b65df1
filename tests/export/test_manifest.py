"""Manifests that are read, and those that are refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bake.errors import FolderError
from bake.new_folder import MANIFEST
from export.manifest import Manifest
from tests.folders import manifest_data

HASH = "0" * 64


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (None, "has no manifest.json"),
        ("[", "cannot be read"),
        ("[1]", r"is \[1\]: Input should be an object"),
        ({"files": {}}, '"files" is {}'),
        ({"files": {"../config.json": HASH}}, "expected files inside the folder"),
        ({"files": {"/etc/passwd": HASH}}, "expected files inside the folder"),
        ({"files": {"config.json": "abc"}}, "\"files.config.json\" is 'abc'"),
        ({"files": {"config.json": 7}}, '"files.config.json" is 7'),
        ({"carrier": 1}, '"carrier" is 1'),
        ({"exact": "yes"}, "\"exact\" is 'yes'"),
    ],
)
def test_a_folder_without_a_readable_manifest_is_no_folder_of_ours(
    manifest: str | dict[str, Any] | None, message: str, tmp_path: Path
) -> None:
    if isinstance(manifest, dict):
        manifest = json.dumps(manifest_data({"config.json": HASH}) | manifest)
    if manifest is not None:
        (tmp_path / MANIFEST).write_text(manifest)
    with pytest.raises(FolderError, match=message) as error:
        Manifest.read(tmp_path)
    assert "\n" not in str(error.value)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="nowhere: is no folder"):
        Manifest.read(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("schema", "match"),
    [(2, "is 2, and this bakeout knows up to 1; update"), ("1", "'1'; expected 1"), (0, "is 0")],
)
def test_a_manifest_of_another_schema_is_refused(schema: Any, match: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps({"schema": schema, "files": {"config.json": HASH}}))
    with pytest.raises(FolderError, match=match):
        Manifest.read(tmp_path)
