"""A sweep's study: an Optuna storage that several processes share and that outlives them all."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from bake.errors import OutputError, ScaleError, printable, short
from bake.methods import METHODS
from bake.scale.crew import about_here
from bake.scale.storage import SharedStore, worker_name
from bake.search.grid import AXES, Point

JOURNAL, STORED = "study.journal", "study.storage"
_DIRECTIONS = ["minimize", "maximize"]
"""Of forget and of retained accuracy."""
"""In a sweep's folder: its study; or the place of one that lies in a storage."""


@dataclass(frozen=True)
class Finished:
    """One point that was measured."""

    number: int
    """Its place in the order in which points were added."""
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


class _JournalStore:
    """A study in a file of the sweep's folder.

    Args:
        folder: of the sweep.
    """

    name = "sweep"

    def __init__(self, folder: Path) -> None:
        self.where, self.worker = f"output {folder}", worker_name()
        self._journal, self._lock_file = folder / JOURNAL, folder / "study.lock"
        self._workers = folder / "workers"
        self._workers.mkdir(exist_ok=True)
        self._alive = (self._workers / self.worker).open("w")
        fcntl.flock(self._alive, fcntl.LOCK_EX)

    def open(self) -> JournalStorage:
        """For Optuna; within `locked`."""
        self._journal.touch()
        return JournalStorage(JournalFileBackend(str(self._journal), lock_obj=_Lock(self._journal)))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One process at a time; the system drops the lock when the process dies."""
        with self._lock_file.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def lives(self, worker: str) -> bool:
        """Whether a process is there that had this name."""
        path = self._workers / worker
        try:
            with path.open("r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        path.unlink(missing_ok=True)
        return False

    def close(self) -> None:
        """Let others see that this process is gone."""
        (self._workers / self.worker).unlink(missing_ok=True)
        self._alive.close()


def check_folder(folder: Path, storage: str | None = None) -> None:
    """Refuse a folder that is no sweep's, before anything is computed.

    Args:
        folder: of the sweep.
        storage: where its study is to lie, if not there.

    Raises:
        OutputError: it is a file, or holds something else.
        ScaleError: the storage cannot be used.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"output {folder}: is no folder; choose another name")
    if (folder / (JOURNAL if storage else STORED)).exists():
        there, remedy = ("here", "leave --storage out") if storage else ("in a storage", "name it")
        raise OutputError(
            f"output {folder}: holds a sweep whose study lies {there}; {remedy}, or choose another "
            "folder"
        )
    marked = folder / (STORED if storage else JOURNAL)
    if folder.exists() and any(folder.iterdir()) and not marked.exists():
        raise OutputError(f"output {folder}: exists and holds no sweep; choose another folder")
    if storage is not None:
        store = SharedStore(storage, folder.resolve().name)
        store.close()
        if marked.exists() and (there := _line_of(marked)) != store.where:
            raise OutputError(
                f"output {folder}: holds a sweep whose study lies elsewhere ({there}); name that, "
                "or choose another folder"
            )


def _line_of(marker: Path) -> str:
    """What a file says in its one line, as far as it may be shown."""
    with marker.open("rb") as file:
        return printable(short(file.read(1000).decode(errors="replace").strip()))


class Study:
    """The points of a sweep: waiting, being measured by somebody, or measured.

    Args:
        folder: of the sweep. Its journal is made, or gone on with.
        fingerprint: of everything that decides what a point measures.
        storage: URL of a PostgreSQL in which the study is to lie instead, under the folder's name.

    Raises:
        OutputError: the folder holds something else, or a study of other inputs.
        ScaleError: the storage does not answer, or the study was begun with other versions.
    """

    def __init__(self, folder: Path, fingerprint: str, storage: str | None = None) -> None:
        check_folder(folder, storage)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.shared = storage is not None
        """Whether other machines may work on it too."""
        self._store: _JournalStore | SharedStore
        if storage is None:
            folder.mkdir(parents=True, exist_ok=True)
            self._store = _JournalStore(folder)
        else:
            self._store = SharedStore(storage, folder.resolve().name)
        try:
            with self._store.locked():
                self._study = self._opened(fingerprint)
        except BaseException:
            self._store.close()
            raise
        if storage is not None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / STORED).write_text(f"{self._store.where}\n", encoding="utf-8")

    def _opened(self, fingerprint: str) -> optuna.Study:
        study = optuna.create_study(
            storage=self._store.open(),
            study_name=self._store.name,
            directions=_DIRECTIONS,
            sampler=optuna.samplers.RandomSampler(),
            load_if_exists=True,
        )
        versions = about_here() if self.shared else {}
        known = study.user_attrs
        directions = [of.name.lower() for of in study.directions]
        if directions != _DIRECTIONS or ("fingerprint" not in known and study.get_trials()):
            raise OutputError(
                f"{self._store.where}: holds a study of something else; choose another folder, "
                "whose name is the study's"
            )
        if "fingerprint" not in known:
            study.set_user_attr("versions", versions)
            study.set_user_attr("fingerprint", fingerprint)
            return study
        for package, here in versions.items():
            if (there := known["versions"][package]) != here:
                raise ScaleError(
                    f"{self._store.where}: was begun with {package} {there}, here it is {here}; "
                    "expected the same on all machines. Install it there"
                )
        if known["fingerprint"] != fingerprint:
            what = "model, data or grid" if self.shared else "model or data"
            raise OutputError(
                f"{self._store.where}: holds a sweep of another recipe, {what}; choose another "
                "folder"
            )
        return study

    def add(self, points: Sequence[Point]) -> None:
        """Let points wait to be measured, unless they are in the study already."""
        with self._store.locked():
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
        with self._store.locked():
            self._release_dead()
            waiting = self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
            if not waiting:
                return None
            trial = self._study.ask()
            trial.set_user_attr("worker", self._store.worker)
            settings = dict(trial.user_attrs["settings"])
            for name in settings:
                _suggest(trial, name)
            return trial, Point(tuple(settings.items()))

    def tell(self, trial: Trial, forget: float, retain: float, about: dict[str, Any]) -> None:
        """A claimed point was measured. Of one that passed to others meanwhile, nothing is kept."""
        with self._store.locked():
            now = self._study.get_trials(deepcopy=False)[trial.number]
            if now.state != TrialState.RUNNING:
                return
            for name, entry in about.items():
                trial.set_user_attr(name, entry)
            self._study.tell(trial, [forget, retain])

    def finished(self) -> list[Finished]:
        """Every point that was measured, in the order in which they were added."""
        with self._store.locked():
            done = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return sorted((_finished(trial) for trial in done), key=lambda found: found.number)

    def left(self) -> int:
        """How many points are not measured: they wait, or others are measuring them."""
        with self._store.locked():
            self._release_dead()
            states = (TrialState.RUNNING, TrialState.WAITING)
            return len(self._study.get_trials(deepcopy=False, states=states))

    def front(self) -> list[Finished]:
        """The Pareto front: no other point forgets more and retains as much, or the reverse."""
        with self._store.locked():
            best = [_finished(trial) for trial in self._study.best_trials]
        return sorted(best, key=lambda point: (point.forget, -point.retain, point.number))

    def close(self) -> None:
        """Let others see that this process is gone."""
        self._store.close()

    def _enqueue(self, point: Point, **place: int) -> None:
        settings = dict(point.settings)
        about = {"point": point.key, "settings": list(settings.items()), **place}
        self._study.enqueue_trial(settings, user_attrs=about)

    def _release_dead(self) -> None:
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            worker = trial.user_attrs.get("worker")
            if worker is not None and (worker == self._store.worker or self._store.lives(worker)):
                continue
            self._study.tell(trial.number, state=TrialState.FAIL)
            self._enqueue(_point(trial), place=_place(trial))


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


def _place(trial: FrozenTrial) -> int:
    """Of what somebody left undone, and was added again, the first one's."""
    return int(trial.user_attrs.get("place", trial.number))


def _finished(trial: FrozenTrial) -> Finished:
    about = {
        key: entry
        for key, entry in trial.user_attrs.items()
        if key not in ("point", "settings", "worker", "place")
    }
    forget, retain = trial.values
    return Finished(_place(trial), _point(trial), forget, retain, about)
