"""A sweep's study: an Optuna journal that several processes share and that outlives them all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from bake.errors import OutputError
from bake.methods import METHODS
from bake.search.grid import AXES, Point

JOURNAL = "study.journal"
_NAME = "sweep"


@dataclass(frozen=True)
class Finished:
    """One point that was measured."""

    number: int
    """Of the trial."""
    point: Point
    forget: float
    """Accuracy on the validation forget questions."""
    retain: float
    """Accuracy on the validation retain questions."""
    about: dict[str, Any]
    """What else was found: features, tokens fired, seconds."""


class _Lock:
    """Optuna's lock of its journal. The system drops it when its process dies, and a line
    that a dead process left unfinished is cut off.
    """

    def __init__(self, journal: Path) -> None:
        self._journal = journal
        self._file = journal.with_suffix(".journal.lock").open("a")

    def acquire(self) -> bool:
        fcntl.flock(self._file, fcntl.LOCK_EX)
        with self._journal.open("ab+") as journal:
            size = journal.seek(0, os.SEEK_END)
            journal.seek(max(0, size - (1 << 20)))
            tail = journal.read()
            if tail and not tail.endswith(b"\n"):
                journal.truncate(size - len(tail) + tail.rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        fcntl.flock(self._file, fcntl.LOCK_UN)


def check_folder(folder: Path) -> None:
    """Refuse a folder that is no sweep's, before anything is computed.

    Raises:
        OutputError: it is a file, or holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"output {folder}: is no folder; choose another name")
    if folder.exists() and any(folder.iterdir()) and not (folder / JOURNAL).exists():
        raise OutputError(f"output {folder}: exists and holds no sweep; choose another folder")


class Study:
    """The points of a sweep: waiting, being measured by somebody, or measured.

    Args:
        folder: of the sweep; its journal is made, or gone on with.
        fingerprint: of everything that decides what a point measures.

    Raises:
        OutputError: the folder holds something else, or a study of other inputs.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        check_folder(folder)
        journal = folder / JOURNAL
        folder.mkdir(parents=True, exist_ok=True)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._folder, self._lock_file = folder, folder / "study.lock"
        with self._locked():
            journal.touch()
            storage = JournalStorage(JournalFileBackend(str(journal), lock_obj=_Lock(journal)))
            self._study = optuna.create_study(
                storage=storage,
                study_name=_NAME,
                directions=["minimize", "maximize"],
                sampler=optuna.samplers.RandomSampler(),
                load_if_exists=True,
            )
            known = self._study.user_attrs.get("fingerprint")
            if known is None:
                self._study.set_user_attr("fingerprint", fingerprint)
            elif known != fingerprint:
                raise OutputError(
                    f"output {folder}: holds a sweep of another recipe, model or data; choose "
                    "another folder"
                )
        self._worker = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        workers = folder / "workers"
        workers.mkdir(exist_ok=True)
        self._alive = (workers / self._worker).open("w")
        fcntl.flock(self._alive, fcntl.LOCK_EX)

    def add(self, points: Sequence[Point]) -> None:
        """Let points wait to be measured, unless they are in the study already."""
        with self._locked():
            known = {
                trial.user_attrs.get("point")
                for trial in self._study.get_trials(deepcopy=False)
                if trial.state != TrialState.FAIL
            }
            for point in points:
                if point.key not in known:
                    self._enqueue(point)

    def claim(self) -> tuple[Trial, Point] | None:
        """A point that nobody measures, now this process's; None when none is left.

        A point whose process has died waits again.
        """
        with self._locked():
            self._release_dead()
            waiting = self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
            if not waiting:
                return None
            trial = self._study.ask()
            trial.set_user_attr("worker", self._worker)
            settings = dict(trial.user_attrs["settings"])
            for name in settings:
                _suggest(trial, name)
            return trial, Point(tuple(settings.items()))

    def tell(self, trial: Trial, forget: float, retain: float, about: dict[str, Any]) -> None:
        """A claimed point was measured."""
        with self._locked():
            for name, entry in about.items():
                trial.set_user_attr(name, entry)
            self._study.tell(trial, [forget, retain])

    def finished(self) -> list[Finished]:
        """Every point that was measured, in the order in which they were added."""
        done = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return [_finished(trial) for trial in done]

    def running(self) -> int:
        """How many points other processes are measuring."""
        with self._locked():
            self._release_dead()
        return len(self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))

    def front(self) -> list[Finished]:
        """The Pareto front: no other point forgets more and retains as much, or the reverse."""
        best = [_finished(trial) for trial in self._study.best_trials]
        return sorted(best, key=lambda point: (point.forget, -point.retain, point.number))

    def close(self) -> None:
        """Let others see that this process is gone."""
        (self._folder / "workers" / self._worker).unlink(missing_ok=True)
        self._alive.close()

    def _enqueue(self, point: Point) -> None:
        settings = dict(point.settings)
        about = {"point": point.key, "settings": list(settings.items())}
        self._study.enqueue_trial(settings, user_attrs=about)

    def _release_dead(self) -> None:
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            worker = trial.user_attrs.get("worker")
            if worker is not None and (worker == self._worker or self._lives(worker)):
                continue
            self._study.tell(trial.number, state=TrialState.FAIL)
            self._enqueue(_point(trial))

    def _lives(self, worker: str) -> bool:
        path = self._folder / "workers" / worker
        try:
            with path.open("r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        path.unlink(missing_ok=True)
        return False

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time; the system drops the lock when the process dies."""
        with self._lock_file.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _suggest(trial: Trial, name: str) -> None:
    """Let Optuna take up a setting that was enqueued."""
    if AXES[name] is str:
        trial.suggest_categorical(name, sorted(METHODS))
    elif AXES[name] is int:
        trial.suggest_int(name, 0, 10**9)  # wide: a later run may add any setting to the study
    else:
        trial.suggest_float(name, -1e9, 1e9)


def _point(trial: FrozenTrial) -> Point:
    return Point(tuple((name, setting) for name, setting in trial.user_attrs["settings"]))


def _finished(trial: FrozenTrial) -> Finished:
    about = {
        key: entry
        for key, entry in trial.user_attrs.items()
        if key not in ("point", "settings", "worker")
    }
    forget, retain = trial.values
    return Finished(trial.number, _point(trial), forget, retain, about)
