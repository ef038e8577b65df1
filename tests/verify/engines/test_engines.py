"""Engines are loaded when they are asked, and let go of where another one needs the room."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from verify.engines.engines import Room, TreeTurn, Turn, used
from verify.engines.runners import DecodingRunner
from verify.engines.token_tree import TreeRunner


class Loaded(DecodingRunner):
    """An engine that says how it is called."""

    reads_trees = True

    def __init__(self, name: str) -> None:
        self.name = name

    def read(self, *_: Any) -> Any:
        return self.name

    go_on = decoded = tree_logits = read

    def width(self) -> int:
        return 7


class World:
    """Some engines, and which of them are loaded."""

    def __init__(self, weights: dict[str, int], most: int, users: int = 8) -> None:
        self.loaded: list[str] = []
        self.loads = 0
        self.weights = weights
        self.room = Room(most, users)
        self.engines = {
            name: Turn(name, weight, lambda name=name: self._load(name), self.room)
            for name, weight in weights.items()
        }

    @contextmanager
    def _load(self, name: str) -> Iterator[DecodingRunner]:
        self.loads += 1
        self.loaded.append(name)
        yield Loaded(name)
        self.loaded.remove(name)

    @property
    def weight(self) -> int:
        return sum(self.weights[name] for name in self.loaded)


def ask(engine: Turn) -> Any:
    return engine.read(None, None, None, None)  # type: ignore[arg-type]


def test_what_fits_stays_loaded() -> None:
    world = World({"a": 3, "b": 4, "c": 3}, most=10)
    for _ in range(3):
        assert [ask(of) for of in world.engines.values()] == ["a", "b", "c"]
    assert world.loads == 3 and world.loaded == ["a", "b", "c"]
    world.room.empty()
    assert world.loaded == []
    assert ask(world.engines["b"]) == "b" and world.loaded == ["b"]


def test_idle_ones_make_room_and_only_as_many_as_must() -> None:
    world = World({"a": 3, "b": 4, "c": 3, "heavy": 6}, most=10)
    for name in ("a", "b", "c", "a", "heavy"):  # b was not used for longest
        ask(world.engines[name])
        assert world.weight <= 10
    assert world.loaded == ["a", "heavy"]


def test_one_alone_may_weigh_more_than_there_is_room_for() -> None:
    world = World({"a": 3, "heavy": 60}, most=10)
    assert ask(world.engines["a"]) == "a"
    assert ask(world.engines["heavy"]) == "heavy" and world.loaded == ["heavy"]


@pytest.mark.parametrize(("most", "users"), [(9, 8), (100, 1)])
def test_one_that_is_wanted_waits_while_others_are_used(most: int, users: int) -> None:
    world = World({"a": 5, "b": 5}, most, users)
    asked = threading.Thread(target=ask, args=(world.engines["b"],))
    with used(world.engines["a"]) as runner:
        assert ask(world.engines["a"]) == "a"  # whoever uses it goes on
        asked.start()
        asked.join(0.2)
        assert asked.is_alive() and world.loaded == ["a"]
        assert isinstance(runner, Loaded)
    asked.join(60)
    assert not asked.is_alive() and "b" in world.loaded


def test_many_at_once_never_take_more_than_there_is() -> None:
    world = World({f"e{n}": 1 + n for n in range(6)}, most=8, users=3)
    heaviest = 0
    lock = threading.Lock()

    def use(engine: Turn) -> None:
        nonlocal heaviest
        for _ in range(20):
            with used(engine):
                with lock:
                    heaviest = max(heaviest, world.weight)
                ask(engine)

    threads = [threading.Thread(target=use, args=(of,)) for of in world.engines.values()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert 0 < heaviest <= 8


def test_one_that_does_not_load_leaves_the_room_as_it_was() -> None:
    world = World({"a": 5}, most=9)

    @contextmanager
    def fail() -> Iterator[DecodingRunner]:
        raise OSError("no such folder")
        yield  # type: ignore[unreachable]

    broken = Turn("broken", 3, fail, world.room)
    for _ in range(2):
        with pytest.raises(OSError, match="no such folder"):
            ask(broken)
    assert ask(world.engines["a"]) == "a"


def test_only_an_engine_that_reads_trees_says_so() -> None:
    with ExitStack() as stack:
        room = Room(1, 1)

        @contextmanager
        def load() -> Iterator[DecodingRunner]:
            yield Loaded("tree")

        stack.callback(room.empty)
        tree = TreeTurn("tree", 1, load, room)
        assert isinstance(tree, TreeRunner) and tree.tree_logits(None) == "tree"  # type: ignore[arg-type]
        assert tree.width() == 7
        assert not isinstance(Turn("plain", 1, load, room), TreeRunner)
