"""Work of several engines, side by side: each has a lane, in which it does its own in order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from verify.engines.engines import used
from verify.engines.runners import HookedRunner, Runner

HERE = "here"
"""The lane of the engines that share this process's model."""


@contextmanager
def side_by_side(asked: Sequence[tuple[Runner, Callable[[], Any]]]) -> Iterator[list[Future[Any]]]:
    """Begin some work, each piece of it of one engine. Where this is left by an error, what was not
    begun is not done.

    Returns:
        What each piece will give, in the order in which they were asked for.
    """
    futures: list[Future[Any]] = [Future() for _ in asked]
    lanes: dict[str, list[tuple[Runner, Callable[[], Any], Future[Any]]]] = {}
    for (runner, work), future in zip(asked, futures, strict=True):
        lane = HERE if isinstance(runner, HookedRunner) else runner.name
        lanes.setdefault(lane, []).append((runner, work, future))
    left = threading.Event()

    def run(lane: list[tuple[Runner, Callable[[], Any], Future[Any]]]) -> None:
        try:
            with used(lane[0][0]):
                for _, work, future in lane:
                    if not left.is_set():
                        _do(work, future)
        except BaseException as error:  # it cannot be loaded: whoever waits for it is told
            for _, _, future in lane:
                if not future.done():
                    future.set_exception(error)

    threads = [threading.Thread(target=run, args=(lane,), name=of) for of, lane in lanes.items()]
    for thread in threads:
        thread.start()
    try:
        yield futures
    except BaseException:
        left.set()
        raise
    finally:
        for thread in threads:
            thread.join()


def _do(work: Callable[[], Any], future: Future[Any]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:  # whoever waits for it is told
        future.set_exception(error)
