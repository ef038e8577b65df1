from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from bake.errors import FolderError
from export.new_folder import MANIFEST
from verify.integrity import check_integrity, read_manifest
from verify.report import Failure

FILES = {"a.safetensors": b"x" * 9000, "config.json": b"{}", "onnx/model.onnx": b"graph"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, data in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()}
    write_manifest(tmp_path, {"files": hashes, "carrier": "layer", "exact": True})
    return tmp_path


def write_manifest(folder: Path, data: Any) -> None:
    (folder / MANIFEST).write_text(json.dumps(data))


def failures(folder: Path) -> dict[str, Failure]:
    found = check_integrity(folder, read_manifest(folder))
    assert all(failure.kind == "integrity" for failure in found)
    return {failure.what: failure for failure in found}


def test_an_untouched_folder_has_no_failures(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert (manifest.carrier, manifest.exact) == ("layer", True)
    assert check_integrity(folder, manifest) == ()


def test_one_changed_byte_is_named_with_both_hashes(folder: Path) -> None:
    changed = bytearray(FILES["a.safetensors"])
    changed[4321] ^= 1
    (folder / "a.safetensors").write_bytes(changed)
    (failure,) = failures(folder).values()
    assert failure.what == "a.safetensors: changed"
    assert failure.measured == hashlib.sha256(changed).hexdigest()
    assert failure.bar == hashlib.sha256(FILES["a.safetensors"]).hexdigest()


def test_missing_and_unlisted_files_are_named(folder: Path) -> None:
    (folder / "onnx/model.onnx").unlink()
    (folder / "modeling_other.py").write_text("")
    (folder / "onnx/extra.data").write_text("")
    assert set(failures(folder)) == {
        "onnx/model.onnx: missing",
        "modeling_other.py: not in the manifest",
        "onnx/extra.data: not in the manifest",
    }


def test_a_link_that_leads_nowhere_is_missing(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(folder / "nowhere")
    assert "config.json: missing" in failures(folder)


def test_what_git_and_the_hub_leave_behind_does_not_count(folder: Path) -> None:
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("ref")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs")
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    (folder / ".cache" / "huggingface" / "CACHEDIR.TAG").write_text("tag")
    assert failures(folder) == {}
    (folder / ".gitignore").write_text("*")
    assert set(failures(folder)) == {".gitignore: not in the manifest"}


def test_progress_reaches_one_and_never_falls(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("verify.integrity.BLOCK_BYTES", 1000)
    shares: list[float] = []
    check_integrity(folder, read_manifest(folder), shares.append)
    assert len(shares) == 9 + 1 + 1
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (None, "has no manifest.json"),
        ("[", "cannot be read"),
        ("[1]", 'has no "files"'),
        ('{"files": {}}', 'has no "files"'),
        ('{"files": {"../config.json": "%s"}}', "expected files inside the folder"),
        ('{"files": {"/etc/passwd": "%s"}}', "expected files inside the folder"),
        ('{"files": {"config.json": "abc"}}', "expected a sha256 as 64 hex digits"),
        ('{"files": {"config.json": 7}}', "expected a sha256 as 64 hex digits"),
        ('{"files": {"config.json": "%s"}, "carrier": 1}', '"carrier" is 1'),
        ('{"files": {"config.json": "%s"}, "exact": "yes"}', "\"exact\" is 'yes'"),
    ],
)
def test_a_folder_without_a_readable_manifest_is_no_folder_of_ours(
    manifest: str | None, message: str, folder: Path
) -> None:
    (folder / MANIFEST).unlink()
    if manifest is not None:
        (folder / MANIFEST).write_text(manifest.replace("%s", "0" * 64))
    with pytest.raises(FolderError, match=message):
        read_manifest(folder)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="nowhere: is no folder"):
        read_manifest(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("schema", "match"),
    [(2, "is 2, and this bakeout knows up to 1; update"), ("1", "'1'; expected 1"), (0, "is 0")],
)
def test_a_manifest_of_another_schema_is_refused(schema: Any, match: str, folder: Path) -> None:
    write_manifest(folder, {"schema": schema, "files": {"config.json": "0" * 64}})
    with pytest.raises(FolderError, match=match):
        read_manifest(folder)
