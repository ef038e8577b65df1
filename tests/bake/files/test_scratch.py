"""Scratch folders: gone when they are left, found by the next run when their process was killed."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from bake.files.locks import folder_lock
from bake.files.scratch import Scratch

HOLD = (
    "import sys, tempfile; tempfile.tempdir = sys.argv[1]\n"
    "from bake.files.scratch import Scratch\n"
    "scratch = Scratch('verify')\n"
    "(scratch.path / 'below').mkdir(); (scratch.path / 'below' / 'a').write_text('x')\n"
    "print(scratch.path, flush=True); sys.stdin.read()\n"
)


@pytest.fixture(autouse=True)
def everyone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_it_is_gone_when_it_is_left(everyone: Path) -> None:
    with Scratch("check") as folder:
        (folder / "a").write_text("x")
        assert folder.parent == everyone and folder.name.startswith("bakeout-check-")
    assert not list(everyone.iterdir())
    scratch = Scratch("verify")
    scratch.cleanup()
    scratch.cleanup()
    assert not list(everyone.iterdir())


def test_what_a_killed_process_left_goes_and_what_a_living_one_has_stays(everyone: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(everyone)]
    dead, living = (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    )
    try:
        left, held = (Path(process.stdout.readline().strip()) for process in (dead, living))  # type: ignore[union-attr]
        dead.kill()
        dead.communicate()
        assert left.is_dir()
        with Scratch("gguf") as own:
            assert {path.name for path in everyone.iterdir()} == {held.name, own.name}
            assert (held / "below" / "a").read_text() == "x"
    finally:
        living.communicate()
    assert not list(everyone.iterdir())


def test_what_is_not_its_own_is_left_alone(everyone: Path) -> None:
    (outside := everyone / "outside").mkdir()
    (outside / ".lock").write_text("")
    (everyone / "bakeout-verify-abcdefgh").mkdir()  # somebody's, without a lock
    (everyone / "bakeout-verify-abcdefgi").symlink_to(outside)
    (linked := everyone / "bakeout-verify-abcdefgj").mkdir()
    (linked / ".lock").symlink_to(outside / ".lock")
    (everyone / "bakeout-verify-abcdefgk").write_text("a file")
    before = sorted(everyone.rglob("*"))
    with Scratch("check"):
        pass
    assert sorted(everyone.rglob("*")) == before


def test_links_in_what_was_left_are_removed_and_not_what_they_lead_to(everyone: Path) -> None:
    (outside := everyone / "outside").mkdir()
    (outside / "precious").write_text("x")
    (left := everyone / "bakeout-verify-abcdefgh").mkdir()
    (left / ".lock").write_text("")
    (left / "a").symlink_to(outside)
    (left / "below").mkdir()
    (left / "below" / "b").symlink_to(outside / "precious")
    with Scratch("check"):
        pass
    assert not left.exists() and (outside / "precious").read_text() == "x"


def test_without_locks_it_is_made_and_left_alone(
    everyone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fcntl.flock", no_locks)
    with Scratch("chat") as one, Scratch("chat") as other:
        assert {path.name for path in everyone.iterdir()} == {one.name, other.name}
    assert not list(everyone.iterdir())
    out = everyone / "folder"
    with folder_lock(out):
        assert [path.name for path in everyone.iterdir()] == [".folder.bakeout-lock"]
    assert not list(everyone.iterdir())


def no_locks(*_: int) -> None:
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
