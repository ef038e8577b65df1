"""Scratch folders that a process needs while it runs, and what killed ones left of theirs."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import stat
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from bake.files.locks import NO_LOCKS

_OURS = re.compile(r"bakeout-[a-z-]+-[a-z0-9_]{8}")
_NEW = ".bakeout-new-"
_LOCK = ".lock"


class Scratch:
    """A folder in the system's temporary folder, until it is left or the process ends.

    Making one removes those of processes that are gone: the living hold a lock in theirs.

    Args:
        purpose: a word for its name.
        where: the folder that it lies in instead, which need not exist.
    """

    def __init__(self, purpose: str, where: Path | None = None) -> None:
        everyone = Path(tempfile.gettempdir()) if where is None else where
        everyone.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(everyone)
        new = Path(tempfile.mkdtemp(prefix=_NEW, dir=everyone))
        lock = os.open(new / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        _hold(lock)
        # It takes its name locked: nobody meets one that is not.
        self.path = new.rename(everyone / f"bakeout-{purpose}-{new.name.removeprefix(_NEW)}")
        self.cleanup = weakref.finalize(self, _remove, self.path, lock)
        """Removes it; may be called again."""

    @property
    def name(self) -> str:
        """Its path as text."""
        return str(self.path)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        self.cleanup()


def _hold(lock: int) -> None:
    """Lock a new file. Where there are no locks nobody gets one, so nothing is removed."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise


def _remove_abandoned(everyone: Path) -> None:
    """Remove this user's scratch folders whose process is gone."""
    with os.scandir(everyone) as entries:
        found = [Path(entry.path) for entry in entries if _OURS.fullmatch(entry.name)]
    for folder in found:
        with suppress(OSError):  # somebody else's, or being removed
            about = folder.lstat()
            if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.geteuid():
                continue
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:  # its process lives
                os.close(lock)
                continue
            _remove(folder, lock)


def _remove(folder: Path, lock: int) -> None:
    """Remove a folder, its lock last: where this is killed, the next run finds it."""
    with suppress(OSError):
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != _LOCK:
                path.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)
