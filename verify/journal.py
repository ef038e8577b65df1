"""What a verification has found so far, so that one that was interrupted goes on where it was.

A journal is a file of lines, one for each piece of work: its name, and what was found, as JSON.
Whoever needs a piece asks for it by name; what is in the file is not computed again. Floats are
written so that the same bits come back, hence a report does not depend on interruptions.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, Self

from filelock import FileLock, Timeout

from bake.errors import OutputError

_COMPUTE = (
    *("bakeout", "torch", "transformers", "sae_lens"),
    *("onnxruntime", "onnxruntime-gpu", "peft", "lm_eval"),
)
"""Packages of which another version may find another last digit."""
Progress = Callable[[str, float], None]
"""Called with what is being done, and the share of it that is done, 0 to 1."""
LOOK_AGAIN_SECONDS = 0.05
"""How often is looked whether others have done what they are at."""


class Others(Protocol):
    """Processes that do the same verification at the same time, and share its pieces."""

    n_parts: int
    """In how many parts work should be cut for all of them."""

    def take(self, names: Sequence[str]) -> tuple[dict[str, Any], str | None]:
        """(every piece that was done since the last call, by whomever; one of some pieces that
        nobody does, if there is one: it is this process's now).
        """

    def put(self, found: Mapping[str, Any]) -> None:
        """Pieces are done."""


class Journal:
    """Pieces of work by name.

    Args:
        path: the file, which need not exist; None keeps nothing. Where another process has it
            open, nothing is kept either.
        shared: what `shared` is to be.
        keep: whether the file stays when all is done: the same work then finds everything there.
        others: who does pieces of the same work.

    Raises:
        OutputError: it cannot be written.
    """

    def __init__(
        self,
        path: Path | None = None,
        shared: Journal | None = None,
        *,
        keep: bool = False,
        others: Others | None = None,
    ) -> None:
        self.shared = self if shared is None else shared
        """Of what the base and its references do, which is the same for every folder."""
        self._keep = keep
        self._found: dict[str, Any] = {}
        self._file: IO[bytes] | None = None
        self._lock: FileLock | None = None
        self._writing = threading.Lock()
        self._path = path
        self.others = others
        if path is not None:
            self._open(path)
        if others is not None:
            others.put(self._found)

    def has(self, name: str) -> bool:
        """Whether a piece was done before, or by others."""
        if name not in self._found and self.others is not None:
            self._add(self.others.take([])[0])
        return name in self._found

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """A piece of work: from the journal, or computed and written there. Threads may do pieces
        of different names at the same time.

        Args:
            name: of the piece; the same name always means the same work.
            compute: gives JSON data.

        Returns:
            The data as JSON gives it back, lists for tuples, whether it was there or not.
        """
        self.ahead({name: compute})
        if name not in self._found:
            self._add({name: compute()})
        return self._found[name]

    def ahead(self, pieces: Mapping[str, Callable[[], Any]]) -> None:
        """With others, do of pieces that will be asked for those that nobody does, until all are
        done; alone, nothing. They must not need one another.

        Args:
            pieces: names, and what gives JSON data. A piece may be a part of the work that does
                pieces of its own, and give None.
        """
        others = self.others
        while others is not None and (left := [of for of in pieces if of not in self._found]):
            found, mine = others.take(left)
            self._add(found)
            if mine is not None:
                self._add({mine: pieces[mine]()})
                others.put({mine: self._found[mine]})
            elif not found:
                time.sleep(LOOK_AGAIN_SECONDS)

    def parts(self, n_pieces: int) -> list[range]:
        """So many pieces in a row, in parts of which each may be done by another process."""
        n_parts = 1 if self.others is None else min(n_pieces, self.others.n_parts)
        edges = [n_pieces * part // n_parts for part in range(n_parts + 1)] if n_pieces else []
        return [range(*pair) for pair in pairwise(edges)]

    def remove(self) -> None:
        """Forget everything: the verification is complete."""
        if self._file is not None and self._path is not None:
            self._path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let others have the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._lock is not None:
            Path(self._lock.lock_file).unlink(missing_ok=True)  # before others may have it
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        if kind is None and not self._keep:
            self.remove()
        self.close()

    def _add(self, pieces: Mapping[str, Any]) -> None:
        """Write down what was found; of a part of the work nothing, since its pieces are there."""
        for name, found in pieces.items():
            if name in self._found:
                continue
            line = json.dumps({"name": name, "found": found})
            if self._file is not None and found is not None:
                try:
                    with self._writing:
                        self._file.write(line.encode() + b"\n")
                        self._file.flush()
                except OSError as error:
                    raise self._unwritable(error) from error
            self._found[name] = json.loads(line)["found"]

    def _open(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path.with_suffix(".lock"))
            lock.acquire(timeout=0)
        except Timeout:
            return
        except OSError as error:
            raise self._unwritable(error) from error
        self._lock = lock
        try:
            whole = _read(path, self._found)
            self._file = path.open("r+b" if path.exists() else "w+b")
            self._file.truncate(whole)  # a line that was cut off is written anew
            self._file.seek(whole)
        except OSError as error:
            self.close()
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> OutputError:
        folder = None if self._path is None else self._path.parent
        return OutputError(
            f"{folder}: what verify has found cannot be kept there ({error.strerror}); set "
            "BAKEOUT_CACHE to a folder that can be written"
        )


def journal_path(cache: Path, work: Any, kind: str = "verify") -> Path:
    """Where the journal of some work lies.

    Args:
        cache: the user's folder for what may be lost.
        work: everything that decides what is found, as JSON data: other work, another journal.
        kind: the folder in the cache.
    """
    text = json.dumps([[*versions().values()], arithmetic(), work], sort_keys=True, default=str)
    return cache / kind / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.jsonl"


def arithmetic() -> list[str | None]:
    """What of this machine decides the last digit of a result: another one's are not mixed in."""
    import torch

    chosen = ("MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "DNNL_MAX_CPU_ISA")
    return [
        platform.machine(),
        torch.backends.cpu.get_cpu_capability(),
        *(os.environ.get(name) for name in chosen),
    ]


def versions() -> dict[str, str | None]:
    """By package on which results depend, the version that is here."""
    found: dict[str, str | None] = {}
    for name in _COMPUTE:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def files_below(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    """What tells files from changed ones without reading them: name, size and time of change."""
    files = {
        file
        for path in paths
        for file in (path.rglob("*") if path.is_dir() else [path])
        if file.is_file()
    }
    return [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(files)]


def _read(path: Path, found: dict[str, Any]) -> int:
    """Take whole lines into `found`; returns where they end, in bytes."""
    end = 0
    if not path.exists():
        return end
    with path.open("rb") as file:
        for line in file:
            try:
                piece = json.loads(line) if line.endswith(b"\n") else None
                found[piece["name"]] = piece["found"]  # type: ignore[index]
            except (ValueError, TypeError, KeyError, RecursionError):
                break
            end += len(line)
    return end
