from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from bake.new_folder import MANIFEST
from export.manifest import Manifest
from tests.folders import manifest_data
from verify.evidence.integrity import check_integrity
from verify.report.findings import Failure

FILES = {"tokenizer.json": b"x" * 9000, "config.json": b"{}", "onnx/model_q4.onnx": b"graph"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, data in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()}
    (tmp_path / MANIFEST).write_text(json.dumps(manifest_data(hashes)))
    return tmp_path


def failures(folder: Path) -> dict[str, Failure]:
    found = check_integrity(folder, Manifest.read(folder))
    assert all(failure.kind == "integrity" for failure in found)
    return {failure.what: failure for failure in found}


def test_an_untouched_folder_has_no_failures(folder: Path) -> None:
    manifest = Manifest.read(folder)
    assert (manifest.carrier, manifest.exact) == ("layer", True)
    assert check_integrity(folder, manifest) == ()


def test_one_changed_byte_is_named_with_both_hashes(folder: Path) -> None:
    changed = bytearray(FILES["tokenizer.json"])
    changed[4321] ^= 1
    (folder / "tokenizer.json").write_bytes(changed)
    (failure,) = failures(folder).values()
    assert failure.what == "tokenizer.json: changed"
    assert failure.measured == hashlib.sha256(changed).hexdigest()
    assert failure.bar == hashlib.sha256(FILES["tokenizer.json"]).hexdigest()


def test_missing_and_unlisted_files_are_named(folder: Path) -> None:
    (folder / "onnx/model_q4.onnx").unlink()
    (folder / "modeling_other.py").write_text("")
    (folder / "onnx/extra.data").write_text("")
    assert set(failures(folder)) == {
        "onnx/model_q4.onnx: missing",
        "modeling_other.py: not in the manifest",
        "onnx/extra.data: not in the manifest",
    }


@pytest.mark.parametrize("target", ["nowhere", "tokenizer.json", "../elsewhere", "/dev/null"])
def test_a_link_is_not_followed(folder: Path, target: str) -> None:
    (folder.parent / "elsewhere").write_bytes(FILES["config.json"])
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(target)
    assert set(failures(folder)) == {
        "config.json: is a link, which is followed in the hub's cache only"
    }


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
    monkeypatch.setattr("bake.files.folder_files.BLOCK_BYTES", 1000)
    shares: list[float] = []
    check_integrity(folder, Manifest.read(folder), shares.append)
    assert len(shares) == 9 + 1 + 1
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
