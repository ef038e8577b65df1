"""The files of a folder that somebody else may have made: names, links, and what lies there.

Every name that comes out of a manifest, an index, a graph or a config goes through here before it
is opened, copied or hashed.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from bake.errors import FolderError, shown

LONGEST = 255
"""Bytes of a file's name in a folder, at most."""
BLOCK_BYTES = 4 << 20
"""How much is hashed between two reports of progress."""
PARTIAL = ".bakeout-partial"
"""What is written within a folder lies in a folder of this name first, or has a name that begins so
and ends in one of `_PARTIAL_FILES`. A process that is killed leaves it; nothing loads it."""
_PARTIAL_FILES = (".onnx", ".onnx_data", ".lock")
SIGNATURE = "model.sig"
_TRANSPORT = (".git", ".gitattributes", ".cache/huggingface", SIGNATURE)
"""What git, the hub's downloader and `bakeout sign` put beside the files; nothing loads it."""
_LINK = "is a link, which is followed in the hub's cache only"
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def wrong_name(name: object) -> str | None:
    """Why something cannot be the name of a file in a folder, with forward slashes; or None."""
    if not isinstance(name, str) or not name:
        return "is no name"
    if not name.isprintable():
        return "holds control characters"
    if len(name.encode()) > LONGEST:
        return f"is longer than {LONGEST} bytes"
    if "\\" in name or ":" in name:
        return "holds a backslash or a colon"
    if any(part in ("", ".", "..") for part in name.split("/")):
        return "is no plain path below the folder"
    return None


def check_name(named_by: Path, name: object) -> str:
    """A name that something in a folder gives.

    Args:
        named_by: the file, or folder, that gives it.
        name: what it gives.

    Raises:
        FolderError: it is not the name of a file inside the folder.
    """
    if (why := wrong_name(name)) is not None:
        raise FolderError(
            f"{named_by}: names {shown(name)}, which {why}; expected files inside the folder. "
            f"Do not use this folder"
        )
    return str(name)


def lies_in(folder: Path, path: Path) -> bool:
    """Whether a file is a folder's own: no link, nor below one; or a link of a snapshot in the
    hub's cache, whose files are links into the `blobs` of the same repository, which is itself no
    link.

    Args:
        folder: which may be a link itself.
        path: in it, by its name there.
    """
    parents = path.relative_to(folder).parents
    if any((folder / parent).is_symlink() for parent in list(parents)[:-1]):
        return False
    return not path.is_symlink() or _blob(folder, path) is not None


def file_in(folder: Path, name: str) -> Path:
    """A regular file of a folder, by its name there.

    Raises:
        FolderError: the name leads elsewhere, there is no such file, it is a link out of the
            folder, or something that is no file.
    """
    path = folder / check_name(folder, name)
    if not lies_in(folder, path):
        raise _linked(folder, name)
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise _missing(folder, name, error) from error
    if not stat.S_ISREG(mode):
        raise FolderError(
            f"{folder}: {name} is no regular file; expected one. Do not use this folder"
        )
    return path


def open_in(folder: Path, name: str) -> BinaryIO:
    """Open a regular file of a folder. Neither a link nor a pipe that takes its place meanwhile is
    followed or waited for.

    Raises:
        FolderError: as `file_in`.
    """
    path = file_in(folder, name)
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    *parents, last = name.split("/")
    try:
        here = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for parent in parents:
                below = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=here)
                os.close(here)
                here = below
            try:
                descriptor = os.open(last, flags, dir_fd=here)
            except OSError as error:
                blob = _blob(folder, path) if error.errno == errno.ELOOP else None
                if blob is None:
                    raise
                descriptor = os.open(blob, flags)
        finally:
            os.close(here)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise _linked(folder, name) from error
        raise _missing(folder, name, error) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FolderError(
            f"{folder}: {name} is no regular file; expected one. Do not use this folder"
        )
    return os.fdopen(descriptor, "rb")


def sha256_in(folder: Path, name: str, advance: Callable[[int], None] = lambda _: None) -> str:
    """sha256 of a file of a folder; `advance` is called with the bytes of each block.

    Raises:
        FolderError: as `file_in`.
    """
    digest = hashlib.sha256()
    with open_in(folder, name) as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


@dataclass(frozen=True)
class Contents:
    """What lies in a folder, by name with forward slashes. Empty folders do not count."""

    files: set[str] = field(default_factory=set)
    """Its own regular files."""
    odd: dict[str, str] = field(default_factory=dict)
    """What is no file of its own, and what it is: a link elsewhere, a pipe, a device."""
    transport: set[str] = field(default_factory=set)
    """What git or the hub's downloader left, at its top, and a signature."""
    partial: set[str] = field(default_factory=set)
    """What a write that was killed left, at its top."""


def contents(folder: Path) -> Contents:
    """Look what lies in a folder; no link is followed but the hub's cache's.

    Raises:
        FolderError: it cannot be listed.
    """
    found = Contents()
    try:
        _look(folder, "", found)
    except OSError as error:
        raise FolderError(
            f"{folder}: cannot be listed ({error.strerror}); check its permissions"
        ) from error
    return found


def _look(folder: Path, below: str, found: Contents) -> None:
    with os.scandir(folder / below) as entries:
        inside = sorted(entries, key=lambda entry: entry.name)
    for entry in inside:
        name = f"{below}{entry.name}"
        if entry.is_symlink() and not lies_in(folder, folder / name):
            found.odd[name] = _LINK
        elif name in _TRANSPORT:
            found.transport.add(name)
        elif entry.is_symlink():
            if (folder / name).is_file():  # else its blob was not downloaded
                found.files.add(name)
        elif name == PARTIAL or name in {f"{PARTIAL}{end}" for end in _PARTIAL_FILES}:
            found.partial.add(name)
        elif entry.is_dir():
            _look(folder, f"{name}/", found)
        elif entry.is_file():
            found.files.add(name)
        else:
            found.odd[name] = "is no regular file"


def _blob(folder: Path, path: Path) -> Path | None:
    """Where a link of a snapshot in the hub's cache leads; None for any other."""
    real, file = (Path(os.path.realpath(of)) for of in (folder, path))  # also of links in a ring
    for snapshot in (real, *real.parents):
        if snapshot.parent.name == "snapshots":
            inside = file.parent == snapshot.parent.parent / "blobs"
            return file if inside and _BLOB.fullmatch(file.name) else None
    return None


def _linked(folder: Path, name: str) -> FolderError:
    return FolderError(
        f"{folder}: {name} {_LINK}; copy the file itself there (`hf download --local-dir` does)"
    )


def _missing(folder: Path, name: str, error: OSError) -> FolderError:
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
        return FolderError(
            f"{folder / name}: is missing; expected a file; bake or download the folder again"
        )
    return FolderError(f"{folder}: {name} cannot be read ({error.strerror}); check its permissions")
