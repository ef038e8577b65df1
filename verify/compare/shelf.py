"""What references read, kept on disk until every engine was held against it.

Logits of a large vocabulary take a megabyte a token. An engine that has to wait for another one to
be gone finds them here, and the models need not all be in memory together.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np

from bake.errors import OutputError
from bake.files.scratch import Scratch
from verify.compare.sensitivity import Nearby
from verify.engines.runners import Reading

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Seen:
    """What the references showed of some prompts."""

    wanted: Tensor
    """[batch, seq] bool: the tokens whose logits are compared."""
    nearby: Mapping[str, Nearby]
    """By engine that is held to rounding."""
    losses: Mapping[str, Tensor]
    """By reference, [m] float64, nats: of each scored token."""


class Shelf:
    """Readings by name, in a scratch folder.

    Args:
        readers: by name, how many are going to take it; then it is gone.
        where: a folder of the user's, which need not exist; else the system's temporary one.

    Raises:
        OutputError: nothing can be kept there.
    """

    def __init__(self, readers: Mapping[str, int], where: Path | None = None) -> None:
        try:
            self._scratch = Scratch("shelf", where)
        except OSError as error:
            raise self._unwritable(where, error) from error
        self._left = Counter(readers)
        self._seen: dict[str, Seen] = {}
        self._changed = threading.Condition()
        self._failed = False

    def put(self, name: str, seen: Seen, logits: Mapping[str, Tensor]) -> None:
        """Keep what was seen, and by reference the logits, [n, vocab] float32 on the CPU."""
        for reference, of in logits.items():
            try:
                np.save(self._file(name, reference), of.numpy(), allow_pickle=False)
            except OSError as error:
                raise self._unwritable(self._scratch.path.parent, error) from error
        with self._changed:
            self._seen[name] = seen
            self._changed.notify_all()

    def take(self, name: str, reference: str) -> tuple[Seen, Reading]:
        """What was seen, and what a reference read; waits until it is there.

        Raises:
            RuntimeError: it never will be.
        """
        import torch

        with self._changed:
            self._changed.wait_for(lambda: name in self._seen or self._failed)
            if name not in self._seen:
                raise RuntimeError(f"{name}: the references did not get so far")
            seen = self._seen[name]
        logits = torch.from_numpy(np.load(self._file(name, reference), allow_pickle=False))
        with self._changed:
            self._left[name] -= 1
            if not self._left[name]:
                for of in seen.losses:
                    self._file(name, of).unlink()
        return seen, Reading(logits, seen.losses[reference])

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Where this is left by an error, nobody waits any longer for what will never be there."""
        try:
            yield
        except BaseException:
            with self._changed:
                self._failed = True
                self._changed.notify_all()
            raise

    def _file(self, name: str, reference: str) -> Path:
        return self._scratch.path / f"{name}-{reference}.npy"

    @staticmethod
    def _unwritable(folder: Path | None, error: OSError) -> OutputError:
        return OutputError(
            f"{folder}: what engines are compared with cannot be kept there ({error.strerror}); "
            "set BAKEOUT_CACHE to a folder with more room"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        self._scratch.cleanup()
