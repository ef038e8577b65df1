"""Each engine does its own work in order, and nobody is left waiting when something fails."""

from __future__ import annotations

import threading
from functools import partial

import pytest

from verify.compare.lanes import side_by_side
from verify.engines.runners import HookedRunner, Runner


class Named(Runner):
    """An engine that is never run."""

    def __init__(self, name: str) -> None:
        self.name = name

    read = go_on = None  # type: ignore[assignment]


def test_each_engine_in_order_and_engines_beside_each_other() -> None:
    first, second = Named("first"), Named("second")
    done: list[str] = []
    both = threading.Barrier(2, timeout=60)  # passed only where both are under way

    def work(name: str) -> str:
        if name.endswith("0"):
            both.wait()
        done.append(name)
        return name

    asked = [(of, partial(work, f"{of.name} {n}")) for of in (first, second) for n in range(5)]
    with side_by_side(asked) as futures:
        found = [future.result(60) for future in futures]
    assert found == [f"{of} {n}" for of in ("first", "second") for n in range(5)]
    for of in ("first", "second"):
        assert [name for name in done if name.startswith(of)] == [f"{of} {n}" for n in range(5)]


def test_engines_on_one_model_take_turns() -> None:
    threads = set()
    asked = [
        (HookedRunner(name, None), lambda: threads.add(threading.get_ident()))
        for name in ("base", "reference", "base")
    ]
    with side_by_side(asked) as futures:
        for future in futures:
            future.result(60)
    assert len(threads) == 1


def test_an_error_is_given_to_whoever_asked_and_what_was_not_begun_is_left() -> None:
    going, done = threading.Event(), []

    def fail() -> None:
        raise ValueError("it ended")

    def wait() -> None:
        going.wait(60)

    asked = [
        (Named("broken"), fail),
        (Named("slow"), wait),
        (Named("slow"), lambda: done.append("never")),
    ]
    with pytest.raises(ValueError, match="it ended"), side_by_side(asked) as futures:
        try:
            futures[0].result(60)
        finally:
            threading.Timer(0.2, going.set).start()
    assert done == []


def test_an_engine_that_cannot_be_loaded_fails_all_of_its_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def used(_: Runner) -> None:
        raise OSError("no such folder")

    monkeypatch.setattr("verify.compare.lanes.used", used)
    with side_by_side([(Named("gone"), list), (Named("gone"), list)]) as futures:
        for future in futures:
            with pytest.raises(OSError, match="no such folder"):
                future.result(60)
