"""Integrity: does every file of a folder still have the hash that its manifest states?"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any

from bake.errors import FolderError
from export.new_folder import MANIFEST, check_schema
from verify.report import Failure

CARD = "README.md"
BLOCK_BYTES = 4 << 20
"""How much of a file is hashed between two reports of progress, in bytes."""
THREADS = 4
"""Files hashed at once; hashing releases the interpreter."""
_LEFT_BY_TRANSPORT = (".git/", ".gitattributes", ".cache/huggingface/")
"""What git and the hub's downloader put beside the files; nothing loads it."""


@dataclass(frozen=True)
class Manifest:
    """What a folder says about itself."""

    files: dict[str, str]
    """Every other file of the folder, by its name with forward slashes, and its sha256."""
    carrier: str
    """layer | adapter | compiled | merged."""
    exact: bool
    """Whether the carrier computes the clamp itself rather than an approximation."""
    sha256: str
    """Of manifest.json itself."""


def read_manifest(folder: Path) -> Manifest:
    """Read and check `manifest.json`.

    Raises:
        FolderError: there is no such folder, or its manifest is missing or not readable.
    """
    if not folder.is_dir():
        raise FolderError(f"{folder}: is no folder; expected a folder that bakeout wrote")
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
        data = json.loads(raw)
    except FileNotFoundError as error:
        raise FolderError(
            f"{folder}: has no {MANIFEST}; expected a folder that bakeout wrote"
        ) from error
    except (OSError, ValueError) as error:
        raise FolderError(
            f"{path}: cannot be read ({error}); expected JSON; bake or download it again"
        ) from error
    check_schema(path, data)
    files = data.get("files") if isinstance(data, dict) else None
    if not isinstance(files, dict) or not files:
        raise FolderError(f'{path}: has no "files"; expected file names with their sha256')
    for name, digest in files.items():
        _check_entry(path, name, digest)
    carrier, exact = data.get("carrier", "layer"), data.get("exact", True)
    if not isinstance(carrier, str) or not isinstance(exact, bool):
        raise FolderError(
            f'{path}: "carrier" is {carrier!r} and "exact" is {exact!r}; expected a name and a '
            "boolean"
        )
    return Manifest(files, carrier, exact, hashlib.sha256(raw).hexdigest())


def _check_entry(manifest: Path, name: str, digest: Any) -> None:
    parts = PurePosixPath(name).parts
    if not parts or ".." in parts or name.startswith("/") or "\\" in name:
        raise FolderError(f'{manifest}: names "{name}"; expected files inside the folder')
    if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise FolderError(
            f'{manifest}: files["{name}"] is {digest!r}; expected a sha256 as 64 hex digits'
        )


def check_integrity(
    folder: Path, manifest: Manifest, progress: Callable[[float], None] | None = None
) -> tuple[Failure, ...]:
    """Compare a folder with its manifest.

    Args:
        folder: what to check.
        manifest: what it says about itself.
        progress: called with the share of bytes hashed so far, 0 to 1.

    Returns:
        One failure of kind `integrity` per changed, missing or unlisted file, by name.
    """
    present = {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()
    }
    present = {name for name in present if name != MANIFEST and not _is_transport(name)}
    listed = manifest.files.keys()
    readable = sorted(name for name in listed & present if (folder / name).is_file())
    measured = _hash_files(folder, readable, progress)
    failures = [
        _failure(f"{name}: changed", measured[name], manifest.files[name])
        for name in readable
        if measured[name] != manifest.files[name]
    ]
    failures += [
        _failure(f"{name}: missing", None, manifest.files[name]) for name in listed - set(readable)
    ]
    failures += [
        _failure(f"{name}: not in the manifest", "present", None) for name in present - listed
    ]
    return tuple(sorted(failures, key=lambda failure: failure.what))


def _is_transport(name: str) -> bool:
    return any(
        name.startswith(left) if left.endswith("/") else name == left for left in _LEFT_BY_TRANSPORT
    )


def _failure(what: str, measured: str | None, bar: str | None) -> Failure:
    return Failure(kind="integrity", engine="checkpoint", what=what, measured=measured, bar=bar)


def _hash_files(
    folder: Path, names: list[str], progress: Callable[[float], None] | None
) -> dict[str, str]:
    """sha256 of each file; the largest files start first."""
    sizes = {name: (folder / name).stat().st_size for name in names}
    total = max(1, sum(sizes.values()))
    done = 0
    lock = Lock()

    def advance(n_bytes: int) -> None:
        nonlocal done
        with lock:
            done += n_bytes
            if progress is not None:
                progress(min(1.0, done / total))

    def digest(name: str) -> str:
        sha256 = hashlib.sha256()
        with (folder / name).open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                sha256.update(block)
                advance(len(block))
        return sha256.hexdigest()

    by_size = sorted(names, key=lambda name: -sizes[name])
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(by_size, pool.map(digest, by_size), strict=True))
