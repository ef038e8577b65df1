"""Whole or not at all: overlaps, overwriting, kills."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bake import new_folder as module
from bake.errors import FolderError, OutputError
from bake.new_folder import check_output, new_folder
from tests.folders import manifest_data


def write(folder: Path, text: str = "old") -> Path:
    """A folder as bakeout writes it, with one file, of this text."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a.txt").write_text(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest_data({"a.txt": digest})))
    return folder


def text_in(folder: Path) -> str:
    return (folder / "a.txt").read_text()


def test_appears_whole_and_replaces_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with new_folder(out, force=True) as temporary:
        write(temporary, "new")
        assert not out.exists()
    assert text_in(out) == "new"
    with new_folder(out, force=True) as temporary:
        write(temporary, "newer")
        assert text_in(out) == "new"
    assert text_in(out) == "newer"
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert sorted(p.name for p in out.iterdir()) == ["a.txt", "manifest.json"]


def test_an_error_names_the_folder_that_was_asked_for(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(FolderError) as caught, new_folder(out, force=True) as temporary:
        raise FolderError(f"{temporary}/config.json: is broken; bake again")
    assert str(caught.value) == f"{out}/config.json: is broken; bake again"


def test_failure_leaves_the_old_folder_and_no_trace(tmp_path: Path) -> None:
    out = write(tmp_path / "out")
    with pytest.raises(ZeroDivisionError), new_folder(out, force=True) as temporary:
        write(temporary, "half")
        raise ZeroDivisionError
    assert text_in(out) == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_without_an_atomic_exchange_it_still_replaces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: Path) -> None:
        raise OSError(38, "no renameat2")

    monkeypatch.setattr(module, "_exchange", unsupported)
    out = write(tmp_path / "out")
    with new_folder(out, force=True) as temporary:
        write(temporary, "new")
    assert text_in(out) == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_half_way_the_old_folder_survives_and_the_next_run_cleans_up(
    tmp_path: Path, number: signal.Signals
) -> None:
    out = write(tmp_path / "out")
    script = (
        "import signal, sys, time; from pathlib import Path\n"
        "from bake.new_folder import new_folder\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background\n"
        "with new_folder(Path(sys.argv[1]), force=True) as t:\n"
        "    (t / 'half').write_text('x'); print('ready', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(out)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    # A folder that another live process is writing is not touched.
    with (
        pytest.raises(OutputError, match="is being written by another process"),
        new_folder(tmp_path / "out", force=True),
    ):
        raise AssertionError
    assert len(list(tmp_path.glob(".out.bakeout-????????"))) == 1
    os.kill(process.pid, number)
    process.wait()
    process.stdout.close()
    assert text_in(out) == "old"
    with new_folder(out, force=True) as temporary:
        write(temporary, "third")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_outputs_that_are_refused(tmp_path: Path) -> None:
    base = write(tmp_path / "base")
    inner = write(tmp_path / "base" / "inner")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("")
    file = tmp_path / "file"
    file.write_text("")
    link = tmp_path / "link"
    link.symlink_to(base)
    ours = write(tmp_path / "ours")

    def check(out: Path, *, force: bool = True, size: int = 0) -> None:
        check_output(out, inputs=[base], size=size, force=force)

    (other := tmp_path / "other").mkdir()
    (other / "manifest.json").write_text('{"name": "an extension", "files": {}}')
    for out, match in (
        (other, "of something else, so bakeout did not write it"),
        (base, "overlaps the input"),
        (inner, "overlaps the input"),
        (base / "new", "overlaps the input"),
        (tmp_path, "overlaps the input"),
        (link, "overlaps the input"),
        (file, "is no folder"),
        (foreign, "bakeout did not write it"),
    ):
        with pytest.raises(OutputError, match=match):
            check(out)
    with pytest.raises(OutputError, match="pass --force"):
        check(ours, force=False)
    with pytest.raises(OutputError, match="MB free"):
        check(tmp_path / "big", size=1 << 60)
    check(ours)
    check(tmp_path / "new", force=False)
    (tmp_path / "empty").mkdir()
    check(tmp_path / "empty", force=False)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"), new_folder(tmp_path / "file" / "x"):
        raise AssertionError


def plant(folder: Path, name: str, text: str = "mine") -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


STRANGE = {
    "a file": (lambda f: plant(f, "thesis.tex"), "holds thesis.tex, which its manifest"),
    "below": (lambda f: plant(f, "sub/thesis.tex"), "holds sub/thesis.tex, which its manifest"),
    "git": (lambda f: plant(f, ".git/HEAD"), r"holds \.git, which its manifest"),
    "attributes": (lambda f: plant(f, ".gitattributes"), r"holds \.gitattributes"),
    "changed": (lambda f: plant(f, "a.txt"), "its a.txt is not what its manifest.json lists"),
    "link": (lambda f: (f / "b").symlink_to(f.parent), "its b is a link, which"),
    "linked": (lambda f: relink(f), "its a.txt is a link, which"),
    "pipe": (lambda f: os.mkfifo(f / "b"), "its b is no regular file"),
    "names": (
        lambda f: plant(f, "manifest.json", json.dumps(manifest_data({"../a": "0" * 64}))),
        "of something else",
    ),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "has no manifest.json"),
    "a folder": (
        lambda f: [(f / "manifest.json").unlink(), (f / "manifest.json").mkdir()],
        "has no manifest.json",
    ),
    "deep": (lambda f: plant(f, "manifest.json", "[" * 100_000), "of something else"),
}


def relink(folder: Path) -> None:
    shutil.move(folder / "a.txt", folder.parent / "a.txt")
    (folder / "a.txt").symlink_to(folder.parent / "a.txt")


@pytest.mark.parametrize(("spoil", "match"), STRANGE.values(), ids=STRANGE)
def test_force_replaces_only_what_bakeout_wrote(
    tmp_path: Path, spoil: Callable[[Path], object], match: str
) -> None:
    out = write(tmp_path / "out")
    check_output(out, inputs=[], size=0, force=True)
    spoil(out)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError, match=match) as caught:
        check_output(out, inputs=[], size=0, force=True)
    assert "choose another folder" in str(caught.value)
    with pytest.raises(OutputError, match=match), new_folder(out, force=True):
        raise AssertionError
    assert sorted(tmp_path.rglob("*")) == before


def test_force_replaces_what_has_lost_a_file_or_was_left_half_written(tmp_path: Path) -> None:
    out = write(tmp_path / "out")
    (out / "a.txt").unlink()
    plant(out, ".bakeout-partial/model.onnx")
    (out / "empty").mkdir()
    with new_folder(out, force=True) as temporary:
        write(temporary, "new")
    assert text_in(out) == "new" and len(list(out.iterdir())) == 2


@pytest.mark.parametrize("force", [False, True])
def test_what_appears_while_it_is_written_is_not_replaced(tmp_path: Path, force: bool) -> None:
    out = tmp_path / "out"
    with (
        pytest.raises(OutputError, match="exists and has no" if force else "exists; choose"),
        new_folder(out, force=force) as temporary,
    ):
        write(temporary, "new")
        plant(out, "thesis.tex")
    assert [p.name for p in out.iterdir()] == ["thesis.tex"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_old_folder_that_was_half_moved_away_comes_back(tmp_path: Path) -> None:
    write(tmp_path / ".out.bakeout-abcdefgh-old")
    write(tmp_path / ".out.bakeout-abcdefgh", "half")
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "out", force=True):
        raise ZeroDivisionError
    write(tmp_path / ".out.bakeout-abcdefgh-old")
    with pytest.raises(OutputError, match="exists; choose"), new_folder(tmp_path / "out"):
        raise AssertionError


def test_two_outputs_whose_names_begin_alike_do_not_meet(tmp_path: Path) -> None:
    with (
        new_folder(tmp_path / "a.bakeout-b") as one,
        new_folder(tmp_path / "a") as other,
    ):
        write(one, "one")
        write(other, "other")
    assert text_in(tmp_path / "a") == "other" and text_in(tmp_path / "a.bakeout-b") == "one"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "a.bakeout-b"]
