"""Workers on a Ray cluster: each has work until there is none, and one that dies is replaced."""

from __future__ import annotations

import heapq
import logging
import os
import re
import signal
import socket
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from typing import Any

from bake.errors import BakeoutError, ScaleError, printable, short
from bake.files.scratch import Scratch

LOCAL = "local"
"""In place of an address: a Ray of this run's own, on this machine's cores."""
ANSWER_SECONDS = 10
"""How long a cluster may take to answer."""
MOST_DEATHS = 4
"""A piece of work that this many workers died of is given up."""
AHEAD = 4
"""Pieces of work, for each worker, that may be begun before the oldest one has ended."""
_LONGEST_FOLDER = 36
"""Most characters of a folder in which Ray's sockets can lie, whose names are long themselves."""
_SAME = ("bakeout", "torch", "transformers")
"""Packages of which workers must have the versions that are here."""
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_NUM_REDIS_GET_RETRIES": "1",
    "RAY_gcs_rpc_server_connect_timeout_s": "5",
    "RAY_py_gcs_connect_timeout_s": str(ANSWER_SECONDS),
}
"""Ray tells nobody of this run, says nothing by itself, and does not wait for minutes."""


class Crew:
    """A cluster's workers, started when there is work.

    Args:
        ray: the module, connected.
        where: what to call the cluster.
    """

    def __init__(self, ray: Any, where: str) -> None:
        self._ray, self._where = ray, where
        self._idle: list[Any] = []
        self._coming: dict[Any, Any] = {}
        """Workers that start, by what `about` will give."""
        self._left: dict[Any, Any] = {}
        """Workers that do what nobody waits for any more."""
        self._failed_starts = 0
        self.size = 0
        """How many workers there are, or will be."""

    def start(self, worker: type, *arguments: Any, memory: int) -> None:
        """Ask for as many workers as the cluster has room for: one a GPU, or where there is none,
        one a core as far as memory goes. Workers of an earlier start are let go.

        Args:
            worker: its class, which has a method `about` that gives what `about_here` gives.
            arguments: of each.
            memory: bytes that each needs.

        Raises:
            ScaleError: there is no room for any.
        """
        for actor in (*self._idle, *self._coming.values(), *self._left.values()):
            self._ray.kill(actor)
        self._idle, self._coming, self._left, self._failed_starts = [], {}, {}, 0
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        gpus = [int(node.get("GPU", 0)) for node in nodes]
        cores = [int(node.get("CPU", 0)) for node in nodes]
        room = [int(node.get("memory", 0) // memory) for node in nodes]
        places = [min(n, m) for n, m in zip(gpus if any(gpus) else cores, room, strict=True)]
        self.size = sum(places)
        if not self.size:
            most = max((node.get("memory", 0) for node in nodes), default=0)
            raise ScaleError(
                f"{self._where}: has no room for a worker, which takes a core and "
                f"{memory / 1e9:,.1f} GB of memory; {max(cores, default=0)} cores and "
                f"{most / 1e9:,.1f} GB are the most of its machines. Give it larger ones"
            )
        each = min(n // m for n, m in zip(cores, places, strict=True) if m)
        options = {"num_cpus": max(1, each), "num_gpus": int(any(gpus)), "memory": memory}
        remote = self._ray.remote(worker).options(**options, scheduling_strategy="SPREAD")
        self._new = partial(remote.remote, *arguments)
        for _ in range(self.size):
            self._start_one()

    def map(self, method: str, items: Iterable[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """Let the workers do all items, each once; of what a dying worker leaves, another one does
        all of that item anew.

        Args:
            method: of the worker.
            items: arguments of each call; taken as workers get to them.

        Yields:
            (number of an item from 0, what came of it), as they end.

        Raises:
            ScaleError: workers do not start, or die of the same item again and again.
            BakeoutError: of a worker; or of `items`, once all before it are done.
        """
        running: dict[Any, tuple[Any, int, tuple[Any, ...]]] = {}
        found: list[tuple[int, Any]] = []
        todo = _Todo(items)
        deaths: Counter[int] = Counter()
        try:
            while True:
                oldest = min((number for _, number, _ in running.values()), default=None)
                while self._idle and (job := todo.take(oldest, AHEAD * self.size)):
                    actor = self._idle.pop()
                    running[getattr(actor, method).remote(*job[1])] = (actor, *job)
                    oldest = job[0] if oldest is None else min(oldest, job[0])
                if found:  # whose worker has new work by now
                    yield found.pop()
                    continue
                if not running and todo.ended:
                    break
                (done,), _ = self._ray.wait([*running, *self._coming, *self._left], num_returns=1)
                if done not in running:
                    self._come(done)
                    continue
                actor, number, item = running.pop(done)
                try:
                    found.append((number, self._result(done)))
                    self._idle.append(actor)
                except _Lost as lost:
                    deaths[number] += 1
                    if deaths[number] >= MOST_DEATHS:
                        raise ScaleError(
                            f"{self._where}: {MOST_DEATHS} workers died of the same piece of work "
                            f"({lost}), mostly of too little memory; what was done is kept. Give "
                            "it larger machines"
                        ) from lost
                    todo.give_back(number, item)
                    self._replace(actor)
        finally:
            self._left |= {done: actor for done, (actor, _, _) in running.items()}
        if todo.trouble is not None:
            raise todo.trouble

    def _start_one(self) -> None:
        actor = self._new()
        self._coming[actor.about.remote()] = actor

    def _replace(self, actor: Any) -> None:
        self._ray.kill(actor)  # it may only have been out of reach
        self._start_one()

    def _come(self, done: Any) -> None:
        """Take in a worker that has started, or has ended what nobody waits for any more."""
        actor = self._coming.pop(done, None) or self._left[done]
        new = self._left.pop(done, None) is None
        try:
            found = self._result(done)
        except _Lost as lost:
            self._failed_starts += new
            if lost.for_good or self._failed_starts >= MOST_DEATHS:
                raise ScaleError(
                    f"{self._where}: its workers do not start ({lost}); expected bakeout "
                    f"{version('bakeout')} on all of its machines. Install it there"
                ) from lost
            self._replace(actor)
            return
        for package, here in about_here().items() if new else ():
            if found[package] != here:
                raise ScaleError(
                    f"{self._where}: a worker has {package} {found[package]}, here it is {here}; "
                    "expected the same on all machines. Install it there"
                )
        self._failed_starts = 0
        self._idle.append(actor)

    def _result(self, done: Any) -> Any:
        """What came of a call.

        Raises:
            _Lost: the worker died, or its machine with what it had found.
        """
        errors = self._ray.exceptions
        died = (errors.RayActorError, errors.WorkerCrashedError, errors.OutOfMemoryError)
        try:
            return self._ray.get(done)
        except errors.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, BakeoutError) else error) from None
        except (*died, errors.ObjectLostError) as error:
            for_good = getattr(error, "actor_init_failed", False)
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise _Lost(printable(short(lines[-1 if for_good else 0])), for_good) from error


class _Todo:
    """Numbered items that are to be done, taken when somebody gets to them."""

    def __init__(self, items: Iterable[tuple[Any, ...]]) -> None:
        self._items, self._begun = iter(items), 0
        self._again: list[tuple[int, tuple[Any, ...]]] = []
        self._over = False
        self.trouble: BakeoutError | None = None
        """What the items ended with, if not well."""

    @property
    def ended(self) -> bool:
        """Whether nothing is left."""
        return self._over and not self._again

    def give_back(self, number: int, item: tuple[Any, ...]) -> None:
        """Let another one do this."""
        heapq.heappush(self._again, (number, item))

    def take(self, oldest: int | None, ahead: int) -> tuple[int, tuple[Any, ...]] | None:
        """(number, item) of what comes next; None where nothing may be begun.

        Args:
            oldest: least number of those that are being done.
            ahead: how far numbers may be in front of it.
        """
        if self._again:
            return heapq.heappop(self._again)
        if self._over or (oldest is not None and self._begun - oldest >= ahead):
            return None
        try:
            item = next(self._items)
        except (StopIteration, BakeoutError) as ended:
            self._over = True
            self.trouble = ended if isinstance(ended, BakeoutError) else None
            return None
        self._begun += 1
        return self._begun - 1, item


class _Lost(Exception):  # noqa: N818
    """A worker is gone."""

    def __init__(self, reason: str, for_good: bool) -> None:
        super().__init__(reason)
        self.for_good = for_good
        """Another one would go the same way."""


def about_here() -> dict[str, str]:
    """The versions on which it depends what a worker finds."""
    return {package: version(package) for package in _SAME}


@contextmanager
def cluster(address: str | None) -> Iterator[Crew | None]:
    """Connect to a Ray cluster, or start one of this run's own, which ends with the block.

    Args:
        address: HOST:PORT as `ray start --head` prints it, on a machine of the cluster; `LOCAL`; or
            None, for no crew and no Ray.

    Raises:
        ScaleError: Ray is not installed, or does not answer there.
    """
    if address is None:
        yield None
        return
    if address != LOCAL:
        _check_answers(address)
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise ScaleError("--ray: Ray is not here; pip install 'bakeout[scale]'") from error
    # It prints what happens to workers to stdout.
    ray._private.worker.print_to_stdstream = lambda *_args, **_options: None
    where = "--ray" if address == LOCAL else f"--ray {address}"
    own: dict[str, Any] = {}
    if address == LOCAL:
        logs = Scratch("ray")
        own["include_dashboard"] = False
        if len(logs.name) <= _LONGEST_FOLDER:
            own["_temp_dir"] = logs.name
    terminate = signal.getsignal(signal.SIGTERM)
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    try:
        with _silent():
            ray.init(address=address, log_to_driver=False, configure_logging=False, **own)
    except SystemExit as ended:  # Ray makes that of SIGTERM
        raise KeyboardInterrupt from ended
    except Exception as error:  # Ray raises every kind
        reason = printable(short(next(iter(str(error).splitlines()), type(error).__name__)))
        raise ScaleError(
            f"{where}: does not start ({reason}); expected a cluster of Ray {ray.__version__}, and "
            "this to be one of its machines"
        ) from error
    try:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, terminate)  # which Ray takes for itself
        yield Crew(ray, where)
    finally:
        ray.shutdown()


@contextmanager
def _silent() -> Iterator[None]:
    """Within the block, nothing that is written to stderr is seen: Ray's C++ writes there."""
    sys.stderr.flush()
    seen, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(seen, 2)
        os.close(seen)
        os.close(nothing)


def _check_answers(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not re.fullmatch(r"[\w.-]+:[0-9]{1,5}|\[[0-9a-f:]+\]:[0-9]{1,5}", address):
        raise ScaleError(
            f"--ray {short(printable(address))}: is no address; expected HOST:PORT, as `ray start "
            "--head` prints it, or nothing for a Ray of this machine's own"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ScaleError(
            f"--ray {address}: does not answer ({error}); expected the HOST:PORT that `ray start "
            "--head` prints. Start it, or leave the address out"
        ) from error
