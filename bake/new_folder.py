"""A folder that appears whole or not at all, and never in place of something precious."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path

from bake.errors import BakeoutError, FolderError, OutputError
from bake.files.folder_files import contents, file_in, sha256_in, wrong_name
from bake.files.locks import folder_lock
from bake.reading.capped import read_in

MANIFEST = "manifest.json"
"""What tells a folder that bakeout wrote."""
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
        check_replaceable(out)
    check_space(out, size)


def check_replaceable(out: Path) -> None:
    """Raise OutputError unless all that lies in a folder is what bakeout wrote, hash by hash. What
    its manifest lists and is not there is no loss.
    """
    try:
        why = _not_ours(out)
    except FolderError as error:
        why = f"cannot be told from somebody else's ({error})"
    if why is not None:
        raise OutputError(
            f"output {out}: exists and {why}, so bakeout did not write it; choose another "
            "folder, or remove this one: --force replaces only what bakeout wrote"
        )


def _not_ours(out: Path) -> str | None:
    """What in a folder bakeout did not write: the end of a sentence; or None."""
    if not (out / MANIFEST).is_file():
        return f"has no {MANIFEST}"
    try:
        data = json.loads(read_in(out, MANIFEST))
        hashes = {name: {digest} for name, digest in data["files"].items()}
        for name, digest in data.get("in_place", {}).items():  # its writer was killed
            hashes.setdefault(name, set()).add(digest)
        ours = all(type(data[key]) is str for key in ("bakeout", "carrier", "recipe_sha256"))
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        ours = False
    if not ours or any(wrong_name(name) is not None for name in hashes):
        return f"has a {MANIFEST} of something else"
    found = contents(out)
    for name, what in found.odd.items():
        return f"its {name} {what}"
    if strange := sorted((found.files | found.transport) - hashes.keys() - {MANIFEST}):
        return f"holds {strange[0]}, which its {MANIFEST} does not list"
    for name in sorted(found.files - {MANIFEST}):
        about = file_in(out, name).stat()
        state = (about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)
        if _sha256(out.resolve(), name, state) not in hashes[name]:
            return f"its {name} is not what its {MANIFEST} lists"
    return None


@lru_cache(maxsize=4096)
def _sha256(folder: Path, name: str, state: tuple[int, ...]) -> str:
    """Of a file, which is asked more than once in a run; `state` changes whenever it does."""
    return sha256_in(folder, name)


def check_space(out: Path, size: int) -> None:
    """Raise OutputError unless a disk has room for what is to be written there, and some more."""
    free = shutil.disk_usage(_existing_parent(out.resolve())).free
    if free < size + _MARGIN:
        raise OutputError(
            f"output {out}: needs {size / 1e6:,.1f} MB, the disk has {free / 1e6:,.1f} MB free; "
            "free some, or choose another disk"
        )


@contextlib.contextmanager
def new_folder(out: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of `out`; on success it takes out's place in one step.

    When the body raises, the temporary folder is removed and `out` is as it was; an error that
    names the temporary folder names `out` instead. A folder left
    behind by a process that was killed is removed by the next run.

    Args:
        out: the folder.
        force: replace what bakeout wrote there, if anything is.

    Raises:
        OutputError: another process is writing it, it holds something that may not be replaced,
            the disk is full, or the folder cannot be written.
    """
    out = out.resolve()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(out, error) from error
    with folder_lock(out):
        try:
            _remove_abandoned(out)
            _check_place(out, force=force)
            temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.bakeout-", dir=out.parent))
        except OSError as error:
            raise _unwritable(out, error) from error
        try:
            with disk_full(out):
                temporary.chmod(0o755)
                yield temporary
                fsync_folder(temporary)
                _check_place(out, force=force)
                _take_place(temporary, out)
            fsync_folder(out.parent)
        except BakeoutError as error:
            if str(temporary) not in str(error):
                raise
            raise type(error)(str(error).replace(str(temporary), str(out))) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _check_place(out: Path, *, force: bool) -> None:
    """Raise OutputError where something lies that may not be replaced; it may have come since it
    was looked at first.
    """
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not force:
        raise OutputError(f"output {out}: exists; choose another folder, or pass --force")
    check_replaceable(out)


def _unwritable(out: Path, error: OSError) -> OutputError:
    return OutputError(f"output {out}: cannot be written ({error.strerror}); choose another folder")


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


def write_whole(file: Path, text: str, *, option: str) -> None:
    """Write a file whole or not at all, or into what is no file; `option` leads the error.

    Raises:
        OutputError: it cannot be written.
    """
    there = file.resolve()
    place = whole_file(there) if there.is_file() or not there.exists() else nullcontext(there)
    try:
        with place as new:
            new.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"{option}: cannot be written ({error.strerror}); choose another place, in a folder "
            "that exists"
        ) from error


@contextlib.contextmanager
def disk_full(out: Path) -> Iterator[None]:
    """Say in one line that the disk is full, where writing within the block fails for that."""
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise OutputError(
            f"output {out}: the disk is full; nothing was kept. Free some, or choose another disk"
        ) from error


def is_disk_full(error: BaseException) -> bool:
    """Whether something could not be written because there is no room, or not for so much; some
    libraries say it in words only.
    """
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in numbers
    said = str(error)
    return not isinstance(error, BakeoutError) and any(
        f"(os error {number})" in said or f"[Errno {number}]" in said for number in numbers
    )


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


def _remove_abandoned(out: Path) -> None:
    """Remove temporary folders of `out`, whose lock is held: their processes are gone. An old one
    that was on its way out of the place is put back.
    """
    ours = re.compile(re.escape(f".{out.name}.bakeout-") + r"[a-z0-9_]{8}(-old)?")
    for folder in sorted(out.parent.iterdir()):
        if not ours.fullmatch(folder.name) or not stat.S_ISDIR(folder.lstat().st_mode):
            continue
        if folder.name.endswith("-old") and not out.exists():
            folder.rename(out)
        else:
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
