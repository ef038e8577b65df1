"""Integrity: does every file of a folder still have the hash that its manifest states?"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from bake.files.folder_files import contents, sha256_in
from export.code_check import foreign_code
from export.folder_contents import odd_contents
from export.manifest import Manifest
from export.signing import SignatureError, Trust, check_signature
from verify.report.findings import Failure

THREADS = 4
"""Files hashed at once; hashing releases the interpreter."""


def check_integrity(
    folder: Path, manifest: Manifest, progress: Callable[[float], None] | None = None
) -> tuple[Failure, ...]:
    """Compare a folder with its manifest.

    Args:
        folder: what to check.
        manifest: what it says about itself.
        progress: called with the share of bytes hashed so far, 0 to 1.

    Returns:
        One failure of kind `integrity` per changed, missing or unlisted file, and per one that
        bakeout does not write, by name.
    """
    readable = sorted(contents(folder).files & manifest.files.keys())
    measured = _hash_files(folder, readable, progress)
    failures = [
        _failure(f"{name}: changed", measured[name], manifest.files[name])
        for name in readable
        if measured[name] != manifest.files[name]
    ]
    odd = [*odd_contents(folder, manifest)]
    missing = manifest.files.keys() - set(readable) - {name for name, _ in odd}
    failures += [_failure(f"{name}: missing", None, manifest.files[name]) for name in missing]
    failures += [_failure(f"{name}: {what}", "present", None) for name, what in odd]
    return tuple(sorted(failures, key=lambda failure: failure.what))


def code_failures(folder: Path, manifest: Manifest) -> tuple[Failure, ...]:
    """What of a folder would run other code than bakeout's own; asked before anything is loaded.

    Returns:
        One failure of kind `integrity` per file or key.
    """
    return tuple(_failure(what, None, None) for what in foreign_code(folder, manifest))


def signature_found(folder: Path, trust: Trust) -> tuple[str | None, tuple[Failure, ...]]:
    """Who signed a folder, or one failure of kind `integrity` where nobody did who is trusted.

    Raises:
        SigningError: a key cannot be used, or model-signing is not installed.
    """
    try:
        return check_signature(folder, trust), ()
    except SignatureError as error:
        return None, (_failure(str(error), None, None),)


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
        return sha256_in(folder, name, advance)

    by_size = sorted(names, key=lambda name: -sizes[name])
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(by_size, pool.map(digest, by_size), strict=True))
