"""Folders whose files are links: the hub's cache is one of them, and is verified like any other."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest

from bake.errors import FolderError
from bakeout.cli import run
from tests.worlds import talkative
from verify.engines.onnx_files import find_graphs
from verify.engines.onnx_runner import open_runner
from verify.run import verify_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a shared graph and rounded copies in `onnx/`."""
    root = tmp_path_factory.mktemp("links")
    assert run(["bake", str(talkative(root)), "--out", str(root / "baked")]) == 0
    for precision in ("shared", "int8"):
        assert run(["export", "onnx", str(root / "baked"), "--precision", precision]) == 0
    return root / "baked"


def in_cache(folder: Path, cache: Path) -> Path:
    """The folder as the hub's cache holds it: a snapshot of relative links into `blobs/`."""
    repository = cache / "models--someone--clamped"
    snapshot = repository / "snapshots" / ("0f" * 20)
    (repository / "blobs").mkdir(parents=True)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        blob = repository / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copyfile(path, blob)
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


@pytest.mark.parametrize("linked", [False, True])
def test_a_snapshot_of_the_hubs_cache_is_verified(
    folder: Path, tmp_path: Path, linked: bool
) -> None:
    snapshot = in_cache(folder, tmp_path / "hub")
    if linked:  # somebody's own name for it
        (tmp_path / "mine").symlink_to(snapshot)
        snapshot = tmp_path / "mine"
    assert {graph.name for graph in find_graphs(snapshot)} == {"onnx", "onnx-int8"}
    report = verify_folder(snapshot, only=frozenset({"integrity", "witnesses"}))
    assert report.verdict == "pass"
    assert {"onnx", "onnx-int8"} <= {engine.name for engine in report.engines}
    with open_runner(snapshot, threads=1) as runner:
        assert runner.name == "onnx"


@pytest.mark.parametrize("where", ["elsewhere", "another repository", "a plain blobs", "above"])
def test_links_that_lead_elsewhere_stay_suspicious(
    folder: Path, tmp_path: Path, where: str
) -> None:
    copy = tmp_path / "copy"
    if where in ("another repository", "above"):
        copy = in_cache(folder, tmp_path / "hub")
    else:
        shutil.copytree(folder, copy)
    shard = next(path for path in sorted(copy.glob("*.safetensors")) if "clamp" not in path.name)
    target = {
        "elsewhere": tmp_path / "weights",
        "another repository": tmp_path / "hub" / "models--other--x" / "blobs" / "weights",
        "a plain blobs": tmp_path / "blobs" / "weights",
        "above": copy.parent.parent / "weights",
    }[where]
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(shard, target)
    shard.unlink()
    shard.symlink_to(target)
    with pytest.raises(FolderError, match="is a link, which is followed in"):
        find_graphs(copy)


def test_neither_blobs_nor_the_graph_may_lead_out(folder: Path, tmp_path: Path) -> None:
    snapshot = in_cache(folder, tmp_path / "hub")
    blobs = snapshot.parent.parent / "blobs"
    private = Path(shutil.move(blobs, tmp_path / "private"))
    blobs.symlink_to(private)
    with pytest.raises(FolderError, match="is a link, which is followed in"):
        find_graphs(snapshot)
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "model.onnx").unlink()
    (copy / "model.onnx").symlink_to(folder / "model.onnx")
    with pytest.raises(FolderError, match=r"model\.onnx is a link, which is followed in"):
        find_graphs(copy)
