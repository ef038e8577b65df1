"""Processes that make attempts side by side, each with one thread and models of its own."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, Self

from bake.errors import OutputError
from bake.files.memory import available_memory
from verify.audit.attempts import Attempt, Lead, Settings
from verify.audit.subject import Subject
from verify.audit.target import Target

Job = Callable[[Target, Settings], list[Attempt]]
"""Attempts of some settings: a function of a module, the same for the same settings."""
COPIES = 8
"""Times a model's weights that one process may take: weights, gradients, two moments, a copy to
read from, activations."""
LEAST = 1 << 29
"""Bytes of a process without a model."""
SHARE = 0.75
"""Of the memory that is free, what processes may take together."""

_targets: dict[tuple[int, Lead], Target] = {}
_subjects: Sequence[Subject] = ()
_n_parts = 0


class Workers:
    """A pool of processes over some subjects; one process is this one.

    Args:
        subjects: what is attacked.
        n_parts: how many disjoint parts of the facts there are.
        processes: how many work side by side.
    """

    def __init__(self, subjects: Sequence[Subject], n_parts: int, processes: int) -> None:
        self._pool: ProcessPoolExecutor | None = None
        if processes == 1:
            _begin(subjects, n_parts)
        else:
            self._pool = ProcessPoolExecutor(
                processes,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_begin_apart,
                initargs=(subjects, n_parts),
            )

    def each(
        self, subject: int, job: Job, settings: Sequence[Settings], lead: Lead
    ) -> Iterator[tuple[int, list[Any]]]:
        """Do a job with several settings: (which of them, its attempts as JSON data), as they come.

        Args:
            subject: the number of a subject.
            job: what is done.
            settings: with what.
            lead: by what it is told what came back.

        Raises:
            OutputError: a process was killed.
        """
        if self._pool is None:
            yield from ((n, _done(subject, lead, job, of)) for n, of in enumerate(settings))
            return
        pool = self._pool
        begun = {pool.submit(_done, subject, lead, job, of): n for n, of in enumerate(settings)}
        try:
            for future in as_completed(begun):
                yield begun[future], future.result()
        except BrokenProcessPool as error:
            raise OutputError(
                "audit: a process was killed, for want of memory perhaps; what was found is kept. "
                "Free some, and run the same command again"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        if self._pool is None:
            _targets.clear()
            return
        if kind is not None:  # nobody waits for what is under way
            for process in multiprocessing.active_children():
                process.terminate()
        self._pool.shutdown(cancel_futures=True)


def fitting_processes(model_bytes: int, device: str) -> int:
    """How many processes have room: as many as there are cores, where there is memory for them; one
    on a GPU.

    Args:
        model_bytes: of the subject's weights in float32.
        device: as torch names it.
    """
    if device != "cpu":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    room = int(SHARE * available_memory()) // (LEAST + COPIES * model_bytes)
    return max(1, min(cores or 1, room))


def _begin(subjects: Sequence[Subject], n_parts: int) -> None:
    global _subjects, _n_parts
    _targets.clear()
    _subjects, _n_parts = subjects, n_parts


def _begin_apart(subjects: Sequence[Subject], n_parts: int) -> None:
    """What a process begins with: one thread, and an end when the one that began it ends."""
    import signal

    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says what an interruption means
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    _begin(subjects, n_parts)


def _done(subject: int, lead: Lead, job: Job, settings: Settings) -> list[Any]:
    """The attempts of a job as JSON data."""
    if (subject, lead) not in _targets:
        _targets.clear()  # one at a time
        _targets[subject, lead] = Target(_subjects[subject], _n_parts, lead)
    return [attempt.to_dict() for attempt in job(_targets[subject, lead], settings)]
