"""Who writes a folder: one process at a time."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bake.errors import OutputError
from bake.files.folder_files import PARTIAL

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""What file systems say that have none, as some of clusters."""


class TakenError(OutputError):
    """Another process has the lock."""


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which may not exist yet; the system drops it when the process
    dies.

    It is a file beside the folder, or in it where nobody may write beside it. A file system without
    locks keeps nobody away.

    Raises:
        TakenError: another process has it.
        OutputError: no lock can be had there.
    """
    folder = folder.resolve()
    beside = folder.parent / f".{folder.name}.bakeout-lock"
    try:
        lock = _take(folder, beside)
    except OSError as error:
        try:
            beside = folder / f"{PARTIAL}.lock"
            lock = _take(folder, beside)
        except OSError:
            raise OutputError(
                f"output {folder}: cannot be written ({error.strerror}); choose another folder, "
                "or check the permissions of the folder and of the one above it"
            ) from error
    try:
        yield
    finally:
        beside.unlink(missing_ok=True)
        os.close(lock)


def _take(folder: Path, path: Path) -> int:
    while True:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        lock = os.open(path, flags, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), os.lstat(path)):
                return lock
        except FileNotFoundError:
            pass  # whoever had it removed it meanwhile
        except BlockingIOError as error:
            os.close(lock)
            raise TakenError(
                f"output {folder}: is being written by another process, which must end first; "
                "choose another folder, or run this again then"
            ) from error
        except OSError as error:
            if error.errno in NO_LOCKS:
                return lock
            os.close(lock)
            raise
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)
