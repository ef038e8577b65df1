"""Confined processes that are kept from one test to the next: each takes seconds to import torch.

What a test asks of a folder is asked of a process of its own, as outside of tests, but one that may
have served another folder before and let go of it. Tests of these processes themselves
(`tests/verify/engines/test_runners.py`) start their own.
"""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from bake.strangers import confined
from verify.engines import runners
from verify.engines.runners import TorchRunner

Key = tuple[Any, ...]
"""What a process was started with."""
_idle: defaultdict[Key, list[KeptRunner]] = defaultdict(list)


class KeptRunner(TorchRunner):
    """Left with nothing unanswered and no request that failed, it is there for the next folder."""

    _key: Key
    _sound = True

    def _ask(self, words: dict[str, str], **tensors: Any) -> tuple[dict[str, str], Any]:
        self._sound = False
        answer = super()._ask(words, **tensors)
        self._sound = True
        return answer

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._sound and self._process.poll() is None:
            self.drop()
            _idle[self._key].append(self)
        else:
            super().__exit__(kind)


def kept_runner(folder: Path, name: str = "checkpoint", needs: str | None = None) -> KeptRunner:
    """In place of `TorchRunner`: one that is idle, or a new one."""
    settings = sorted(confined.environment(Path()).items())
    code = runners.MODELING.read_bytes()
    key = (os.getpid(), tempfile.gettempdir(), runners.MODELING, code, needs, *settings)
    while _idle[key]:
        runner = _idle[key].pop()
        if runner._process.poll() is None:
            runner.name, runner._folder, runner._hidden_size = name, folder, 0
            return runner
        runner.close()
    runner = KeptRunner(folder, name, needs)
    runner._key = key
    return runner


def end_all() -> None:
    """End what is idle."""
    for kept in _idle.values():
        for runner in kept:
            runner._process.kill()
            runner.close()
        kept.clear()
