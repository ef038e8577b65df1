"""The engines that a folder's files can be run in, and which of them are loaded side by side."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from bake.base import INDEX, find_base
from bake.recipe import Recipe
from export.carriers.carriers import CARRIERS
from verify.engines.heap import give_back, keep_little
from verify.engines.onnx_files import Graph
from verify.engines.onnx_runner import OnnxRunner
from verify.engines.runners import DecodingRunner, Reading, Runner, TorchRunner
from verify.engines.token_tree import TokenTree, TreeRunner

if TYPE_CHECKING:
    from torch import Tensor

LITTLE = 1 << 30
"""Engines that weigh no more together, in bytes, all stay loaded."""
BESIDE = 1.5
"""How much those loaded side by side may weigh otherwise, as a multiple of the heaviest."""


@dataclass(frozen=True)
class Engines:
    """A folder's own engines; none of them knows the SAE."""

    carrier: str
    """How the folder carries the clamp."""
    torch: TorchRunner | None
    """None where the folder holds ONNX files only."""
    graphs: list[Graph]
    device: str
    """As torch names it: cpu, cuda."""

    @property
    def threads(self) -> int:
        """Of one engine that has the machine to itself."""
        import torch

        return torch.get_num_threads()

    def load_torch(self, recipe: Recipe, dtype: str, threads: int, bits: int | None = None) -> None:
        """Load the folder in torch, an adapter over the recipe's base; its matrices rounded to so
        many bits, if any.
        """
        assert self.torch is not None
        base = find_base(recipe).folder if CARRIERS[self.carrier].over_base else None
        self.torch.load(dtype, device=self.device, threads=threads, base=base, bits=bits)

    @contextmanager
    def loaded(
        self, recipe: Recipe, dtype: str, threads: int, bits: int | None = None
    ) -> Iterator[TorchRunner]:
        """The folder in torch, until this is left; see `load_torch`."""
        assert self.torch is not None
        self.load_torch(recipe, dtype, threads, bits)
        yield self.torch
        self.torch.drop()

    @contextmanager
    def open(
        self, graph: Graph, *, threads: int | None = None, clamped: bool = True
    ) -> Iterator[OnnxRunner]:
        """A session over one of the graphs."""
        n = self.threads if threads is None else threads
        with OnnxRunner(graph, device=self.device, threads=n, clamped=clamped) as runner:
            yield runner

    def in_turn(
        self, recipe: Recipe, dtype: str, threads: int, weight: int
    ) -> tuple[Room, list[Turn]]:
        """All of them, none of them loaded yet; that in torch is first.

        Args:
            recipe: names the base.
            dtype: of that in torch.
            threads: of each.
            weight: of that in torch, in bytes.
        """
        weights = {graph.name: graph.weight for graph in self.graphs}
        weights |= {self.torch.name: weight} if self.torch is not None else {}
        room = Room(0, 1)  # what else a GPU holds is not known
        if self.device == "cpu":
            heaviest = max(weights.values(), default=0)
            room = Room(max(LITTLE, int(BESIDE * heaviest)), os.cpu_count() or 1)
        turns: list[Turn] = []
        if self.torch is not None:
            load = partial(self.loaded, recipe, dtype, threads)
            turns.append(TreeTurn(self.torch.name, weight, load, room))
        for graph in self.graphs:
            opened = partial(self.open, graph, threads=threads)
            turns.append(Turn(graph.name, graph.weight, opened, room))
        return room, turns


@dataclass(frozen=True)
class _Loaded:
    weight: int
    runner: DecodingRunner
    until: ExitStack
    """Closed, it is let go of."""


class Room:
    """Which engines are loaded. One that nobody uses makes room for another that is wanted; one
    that is wanted waits until there is room.

    Args:
        most: how much they may weigh together, in bytes; one alone may weigh more.
        users: how many may be used at the same time.
    """

    def __init__(self, most: int, users: int) -> None:
        self._most, self._users = most, users
        self._loaded: dict[str, _Loaded] = {}  # used last, last
        self._used = Counter[str]()
        self._changed = threading.Condition()

    @contextmanager
    def use(self, turn: Turn) -> Iterator[DecodingRunner]:
        """An engine, loaded, until this is left."""
        with self._changed:
            self._changed.wait_for(lambda: self._make_room(turn))
            if (here := self._loaded.pop(turn.name, None)) is None:
                stack = ExitStack()
                here = _Loaded(turn.weight, stack.enter_context(turn.load()), stack)
            self._loaded[turn.name] = here
            self._used[turn.name] += 1
        try:
            yield here.runner
        finally:
            with self._changed:
                self._used[turn.name] -= 1
                self._changed.notify_all()

    def empty(self) -> None:
        """Let go of every engine; none may be in use."""
        with self._changed:
            for name in [*self._loaded]:
                self._let_go(name)

    def _make_room(self, turn: Turn) -> bool:
        """Let go of idle engines as long as there is no room. Returns whether there is."""
        if self._used[turn.name]:
            return True
        if sum(n > 0 for n in self._used.values()) >= self._users:
            return False
        for name in [name for name in self._loaded if name != turn.name]:
            if self._weight_beside(turn) + turn.weight <= self._most:
                break
            if not self._used[name]:
                self._let_go(name)
        beside = self._weight_beside(turn)
        return not beside or beside + turn.weight <= self._most

    def _weight_beside(self, turn: Turn) -> int:
        return sum(of.weight for name, of in self._loaded.items() if name != turn.name)

    def _let_go(self, name: str) -> None:
        self._loaded.pop(name).until.close()
        give_back()


class Turn(DecodingRunner):
    """An engine that is loaded once something is asked of it, and may be let go of afterwards.

    Args:
        name: of the engine.
        weight: about how much its weights take, in bytes.
        load: loads it until it is left.
        room: shared with the other engines.
    """

    def __init__(
        self,
        name: str,
        weight: int,
        load: Callable[[], AbstractContextManager[DecodingRunner]],
        room: Room,
    ) -> None:
        self.name, self.weight, self.load, self._room = name, weight, load, room

    def used(self) -> AbstractContextManager[DecodingRunner]:
        """The engine itself, which stays loaded until this is left."""
        return self._room.use(self)

    def read(
        self, input_ids: Tensor, attention_mask: Tensor, wanted: Tensor, scored: Tensor
    ) -> Reading:
        """See `Runner.read`."""
        with self.used() as runner:
            return runner.read(input_ids, attention_mask, wanted, scored)

    def go_on(
        self, input_ids: Tensor, attention_mask: Tensor, stops: Sequence[int], most: int
    ) -> Tensor:
        """See `Runner.go_on`."""
        with self.used() as runner:
            return runner.go_on(input_ids, attention_mask, stops, most)

    def decoded(self, input_ids: Tensor, attention_mask: Tensor, n_last: int) -> Tensor:
        """See `DecodingRunner.decoded`."""
        with self.used() as runner:
            return runner.decoded(input_ids, attention_mask, n_last)


class TreeTurn(Turn):
    """The same of an engine that reads trees."""

    reads_trees = True

    def width(self) -> int:
        """See `TreeRunner.width`."""
        with self.used() as runner:
            assert isinstance(runner, TreeRunner)
            return runner.width()

    def tree_logits(self, tree: TokenTree) -> Tensor:
        """See `TreeRunner.tree_logits`."""
        with self.used() as runner:
            assert isinstance(runner, TreeRunner)
            return runner.tree_logits(tree)


def used(runner: Runner) -> AbstractContextManager[Runner]:
    """Any engine, which stays loaded until this is left."""
    return runner.used() if isinstance(runner, Turn) else nullcontext(runner)


@contextmanager
def open_engines(folder: Path, carrier: str, graphs: list[Graph], device: str) -> Iterator[Engines]:
    """Start what a folder can be run in; nothing is loaded yet."""
    keep_little()
    with ExitStack() as stack:
        runner = None
        known = CARRIERS[carrier]
        if known.over_base or (folder / INDEX).is_file():
            needs = "bakeout" if known.over_base else None
            runner = stack.enter_context(TorchRunner(folder, known.engine, needs))
        yield Engines(carrier, runner, graphs, device)
