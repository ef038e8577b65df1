from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest

from bake.errors import ModelError
from bakeout.gemma import gemma_files
from bakeout.gemma.gemma_files import PACKAGE, PARTS, base_folder, link_folder
from tests.gguf_files import write_gguf


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Packages like the registry's, with a made-up model in pieces."""
    data = write_gguf(tmp_path / "whole.gguf").read_bytes()
    size = -(-len(data) // PARTS)
    for number in range(PARTS):
        folder = tmp_path / "packages" / f"{PACKAGE}_part{number + 1}"
        (folder / "data").mkdir(parents=True)
        (folder / "__init__.py").write_text("raise RuntimeError('this is not to be run')\n")
        part = folder / "data" / f"model.gguf.part{number:02}"
        part.write_bytes(data[number * size : (number + 1) * size])
    monkeypatch.setattr(gemma_files, "SHA256", hashlib.sha256(data).hexdigest())
    monkeypatch.setattr(sys, "path", [str(tmp_path / "packages"), *sys.path])
    return tmp_path / "packages"


def quiet(_what: str, _share: float) -> None:
    pass


def test_it_is_made_once(packages: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    folder = base_folder(cache, quiet)
    assert [path.name for path in cache.iterdir()] == [folder.name]  # no GGUF file is left
    before = (folder / "model.safetensors").stat().st_mtime_ns
    for part in packages.glob("*/data/*"):
        part.unlink()
    assert base_folder(cache, quiet) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    link_folder(folder, tmp_path / "out")
    link_folder(folder, tmp_path / "out")
    names = {path.name for path in folder.iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert all((tmp_path / "out" / n).read_bytes() == (folder / n).read_bytes() for n in names)
    (tmp_path / "out" / "config.json").write_text("changed")  # by whoever goes on from there
    assert (folder / "config.json").read_text() != "changed"


def test_what_is_missing_or_other_is_said(packages: Path, tmp_path: Path) -> None:
    (part,) = packages.glob("*part3/data/*")
    data = part.read_bytes()
    part.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ModelError, match="has sha256"):
        base_folder(tmp_path / "cache", quiet)
    assert list((tmp_path / "cache").iterdir()) == []
    part.unlink()
    with pytest.raises(ModelError, match=r"part3 is not installed; pip install 'bakeout\[gemma\]'"):
        base_folder(tmp_path / "cache", quiet)
