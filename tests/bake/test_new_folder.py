"""Whole or not at all: overlaps, overwriting, kills."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bake import new_folder as module
from bake.errors import FolderError, OutputError
from bake.new_folder import check_output, new_folder


def write(folder: Path, text: str = "old") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(text)
    return folder


def test_appears_whole_and_replaces_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with new_folder(out) as temporary:
        write(temporary, "new")
        assert not out.exists()
    assert (out / "manifest.json").read_text() == "new"
    with new_folder(out) as temporary:
        write(temporary, "newer")
        assert (out / "manifest.json").read_text() == "new"
    assert (out / "manifest.json").read_text() == "newer"
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert [p.name for p in out.iterdir()] == ["manifest.json"]


def test_an_error_names_the_folder_that_was_asked_for(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(FolderError) as caught, new_folder(out) as temporary:
        raise FolderError(f"{temporary}/config.json: is broken; bake again")
    assert str(caught.value) == f"{out}/config.json: is broken; bake again"


def test_failure_leaves_the_old_folder_and_no_trace(tmp_path: Path) -> None:
    out = write(tmp_path / "out")
    with pytest.raises(ZeroDivisionError), new_folder(out) as temporary:
        write(temporary, "half")
        raise ZeroDivisionError
    assert (out / "manifest.json").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_without_an_atomic_exchange_it_still_replaces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: Path) -> None:
        raise OSError(38, "no renameat2")

    monkeypatch.setattr(module, "_exchange", unsupported)
    out = write(tmp_path / "out")
    with new_folder(out) as temporary:
        write(temporary, "new")
    assert (out / "manifest.json").read_text() == "new"
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
        "with new_folder(Path(sys.argv[1])) as t:\n"
        "    (t / 'half').write_text('x'); print('ready', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(out)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    # A folder that another live process is writing is not touched.
    with new_folder(tmp_path / "out") as temporary:
        write(temporary, "second")
    assert len(list(tmp_path.glob(".out.bakeout-*"))) == 1
    os.kill(process.pid, number)
    process.wait()
    process.stdout.close()
    assert (out / "manifest.json").read_text() == "second"
    with new_folder(out) as temporary:
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

    for out, match in (
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
