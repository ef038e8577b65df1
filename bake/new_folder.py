"""A folder that appears whole or not at all, and never in place of something precious."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from bake.errors import BakeoutError, OutputError

MANIFEST = "manifest.json"
"""What tells a folder that bakeout wrote."""
_LOCK = ".lock"
_MARGIN = 1 << 20
"""Bytes that must stay free beside the output."""
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def check_output(out: Path, *, inputs: Iterable[Path], size: int, force: bool) -> None:
    """Refuse an output folder before anything is written.

    Args:
        out: the folder to be written.
        inputs: what is read; `out` may neither be, contain, nor lie within one of them.
        size: bytes that will be written.
        force: replace an existing folder, if it was written by bakeout.

    Raises:
        OutputError: says which of these it is, and what to do.
    """
    there = out.resolve()
    for path in (path.resolve() for path in inputs):
        inside = path.is_dir() and there.is_relative_to(path)
        if inside or path.is_relative_to(there):
            raise OutputError(f"output {out}: overlaps the input {path}; choose another folder")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise OutputError(f"output {out}: exists and is no folder; choose another name")
    if out.is_dir() and any(out.iterdir()):
        if not force:
            raise OutputError(f"output {out}: exists; choose another folder, or pass --force")
        if not (out / MANIFEST).is_file():
            raise OutputError(
                f"output {out}: exists and has no {MANIFEST}, so bakeout did not write it; "
                "choose another folder: --force replaces only what bakeout wrote"
            )
    check_space(out, size)


def check_space(out: Path, size: int) -> None:
    """Raise OutputError unless a disk has room for what is to be written there, and some more."""
    free = shutil.disk_usage(_existing_parent(out.resolve())).free
    if free < size + _MARGIN:
        raise OutputError(
            f"output {out}: needs {size / 1e6:,.1f} MB, the disk has {free / 1e6:,.1f} MB free; "
            "free some, or choose another disk"
        )


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `out`; on success it takes out's place in one step.

    When the body raises, the temporary folder is removed and `out` is as it was; an error that
    names the temporary folder names `out` instead. A folder left
    behind by a process that was killed is removed by the next run.

    Raises:
        OutputError: the disk is full, or the folder cannot be written.
    """
    out = out.resolve()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(out)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.bakeout-", dir=out.parent))
    except OSError as error:
        raise OutputError(
            f"output {out}: cannot be written ({error.strerror}); choose another folder"
        ) from error
    try:
        with disk_full(out), _locked(temporary):
            temporary.chmod(0o755)
            yield temporary
            (temporary / _LOCK).unlink()
            fsync_folder(temporary)
            _take_place(temporary, out)
        fsync_folder(out.parent)
    except BakeoutError as error:
        if str(temporary) not in str(error):
            raise
        raise type(error)(str(error).replace(str(temporary), str(out))) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a place beside a file; on success what lies there takes the file's place in one step.

    A reader never meets half of it, and several processes may write it at once.
    """
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield new
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


@contextlib.contextmanager
def disk_full(out: Path) -> Iterator[None]:
    """Say in one line that the disk is full, where writing within the block fails for that."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OutputError(
            f"output {out}: the disk is full; nothing was kept. Free some, or choose another disk"
        ) from error


def _take_place(temporary: Path, out: Path) -> None:
    """Rename `temporary` to `out`; an existing `out` is swapped out in the same instant."""
    if not out.exists() or not any(out.iterdir()):
        temporary.replace(out)
        return
    try:
        _exchange(temporary, out)  # afterwards `temporary` is the old folder
    except OSError:
        # A file system without an atomic exchange: two renames, the old folder kept until last.
        old = Path(f"{temporary}-old")
        out.rename(old)
        temporary.rename(out)
        shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> None:
    """Swap two folders atomically (Linux renameat2 with RENAME_EXCHANGE)."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        raise OSError(errno.ENOSYS, "no renameat2")
    if renameat2(_AT_FDCWD, bytes(one), _AT_FDCWD, bytes(other), _RENAME_EXCHANGE) != 0:
        raise OSError(ctypes.get_errno(), "renameat2")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock in the folder, which the system drops when the process dies."""
    with (folder / _LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _remove_abandoned(out: Path) -> None:
    """Remove temporary folders of `out` whose process is gone."""
    for folder in out.parent.glob(f".{out.name}.bakeout-*"):
        try:
            with (folder / _LOCK).open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            pass
        except OSError:
            continue
        shutil.rmtree(folder, ignore_errors=True)


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.parents if parent.is_dir())


def fsync_folder(folder: Path) -> None:
    """Bring a folder's entries to disk: what was renamed into it is there after a crash."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
