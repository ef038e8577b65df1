"""Workers on a Ray cluster: each has work until there is none, and one that dies is replaced."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from importlib.metadata import version
from typing import Any

from bake.errors import BakeoutError, ScaleError, printable, short

MOST_DEATHS = 4
"""A piece of work that this many workers died of is given up."""
AHEAD = 4
"""Pieces of work, for each worker, that may be begun before the oldest one has ended."""
_SAME = ("bakeout", "torch", "transformers")
"""Packages of which workers must have the versions that are here."""


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
        self._about: Mapping[str, str] = {}
        self.size = 0
        """How many workers there are, or will be."""

    def start(
        self,
        worker: type,
        *arguments: Any,
        memory: int,
        cores: int = 1,
        gpu: bool = True,
        beside: type | None = None,
        about: Mapping[str, str] | None = None,
    ) -> Any:
        """Ask for as many workers as the cluster has room for: one a GPU, or where there is none,
        one for so many cores as far as memory goes. Workers of an earlier start are let go.

        Args:
            worker: its class, which has a method `about` that gives what `about_here` gives.
            arguments: of each.
            memory: bytes that each needs.
            cores: that each needs.
            gpu: whether they are given GPUs where there are some.
            beside: a class whose one instance holds the place of this process, which works too,
                and is the workers' last argument.
            about: what a worker's `about` has to give, if more.

        Returns:
            The instance of `beside`.

        Raises:
            ScaleError: there is no room for any, nor for this process.
        """
        for actor in (*self._idle, *self._coming.values(), *self._left.values()):
            self._ray.kill(actor)
        self._idle, self._coming, self._left, self._failed_starts = [], {}, {}, 0
        self._about = about_here() if about is None else about
        alive = [node for node in self._ray.nodes() if node["Alive"]]
        nodes = [node["Resources"] for node in alive]
        gpus = [int(node.get("GPU", 0)) if gpu else 0 for node in nodes]
        n_cores = [int(node.get("CPU", 0)) for node in nodes]
        room = [int(node.get("memory", 0) // memory) for node in nodes]
        each_has = gpus if any(gpus) else [n // cores for n in n_cores]
        places = [min(n, m) for n, m in zip(each_has, room, strict=True)]
        here = self._ray.get_runtime_context().get_node_id()
        held = beside is not None and any(
            n for n, of in zip(places, alive, strict=True) if of["NodeID"] == here
        )
        self.size = sum(places) - held
        if not self.size:
            most = max((node.get("memory", 0) for node in nodes), default=0)
            raise ScaleError(
                f"{self._where}: has no room for a worker{' beside this process' if held else ''}, "
                f"which takes {'a core' if cores == 1 else f'{cores} cores'} and "
                f"{memory / 1e9:,.1f} GB of memory; {max(n_cores, default=0)} cores and "
                f"{most / 1e9:,.1f} GB are the most of its machines. Give it more, or larger ones"
            )
        each = min(n // m for n, m in zip(n_cores, places, strict=True) if m)
        options = {"num_cpus": max(1, each), "num_gpus": int(any(gpus)), "memory": memory}
        seat = None
        if beside is not None:
            at = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(here, False)
            of_seat = options if held else {"num_cpus": 0}
            seat = self._ray.remote(beside).options(**of_seat, scheduling_strategy=at).remote()
            arguments = (*arguments, seat)
        remote = self._ray.remote(worker).options(**options, scheduling_strategy="SPREAD")
        self._new = partial(remote.remote, *arguments)
        for _ in range(self.size):
            self._start_one()
        return seat

    def arrived(self) -> list[Any]:
        """Workers that have started meanwhile, whom the caller has from now on; waits for nobody.

        Raises:
            ScaleError: workers do not start, or are of another version.
        """
        if self._coming:
            n = len(self._coming)
            for done in self._ray.wait([*self._coming], num_returns=n, timeout=0)[0]:
                self._come(done)
        found, self._idle = self._idle, []
        return found

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
                    found.append((number, self.result(done)))
                    self._idle.append(actor)
                except Lost as lost:
                    deaths[number] += 1
                    if deaths[number] >= MOST_DEATHS:
                        raise ScaleError(
                            f"{self._where}: {MOST_DEATHS} workers died of the same piece of work "
                            f"({lost}), mostly of too little memory; what was done is kept. Give "
                            "it larger machines"
                        ) from lost
                    todo.give_back(number, item)
                    self.replace(actor)
        finally:
            self._left |= {done: actor for done, (actor, _, _) in running.items()}
        if todo.trouble is not None:
            raise todo.trouble

    def _start_one(self) -> None:
        actor = self._new()
        self._coming[actor.about.remote()] = actor

    def replace(self, actor: Any) -> None:
        """Start another worker in place of one that is lost."""
        self._ray.kill(actor)  # it may only have been out of reach
        self._start_one()

    def _come(self, done: Any) -> None:
        """Take in a worker that has started, or has ended what nobody waits for any more."""
        actor = self._coming.pop(done, None) or self._left[done]
        new = self._left.pop(done, None) is None
        try:
            found = self.result(done)
        except Lost as lost:
            self._failed_starts += new
            if lost.for_good or self._failed_starts >= MOST_DEATHS:
                raise ScaleError(
                    f"{self._where}: its workers do not start ({lost}); expected bakeout "
                    f"{version('bakeout')} on all of its machines. Install it there"
                ) from lost
            self.replace(actor)
            return
        for what, here in self._about.items() if new else ():
            if found[what] != here:
                raise ScaleError(
                    f"{self._where}: a worker has {what} {found[what]}, here it is {here}; "
                    "expected the same on all machines. Install it there, or leave them out"
                )
        self._failed_starts = 0
        self._idle.append(actor)

    def result(self, done: Any) -> Any:
        """What came of a call.

        Raises:
            Lost: the worker died, or its machine with what it had found.
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
            raise Lost(printable(short(lines[-1 if for_good else 0])), for_good) from error


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


class Lost(Exception):  # noqa: N818
    """A worker is gone."""

    def __init__(self, reason: str, for_good: bool) -> None:
        super().__init__(reason)
        self.for_good = for_good
        """Another one would go the same way."""


def about_here() -> dict[str, str]:
    """The versions on which it depends what a worker finds."""
    return {package: version(package) for package in _SAME}
