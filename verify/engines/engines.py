"""The engines that a folder's files can be run in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bake.base import INDEX, find_base
from bake.recipe import Recipe
from export.carriers.carriers import CARRIERS
from verify.engines.heap import keep_little
from verify.engines.onnx_files import Graph
from verify.engines.onnx_runner import OnnxRunner
from verify.engines.runners import TorchRunner


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
    def open(
        self, graph: Graph, *, threads: int | None = None, clamped: bool = True
    ) -> Iterator[OnnxRunner]:
        """A session over one of the graphs."""
        n = self.threads if threads is None else threads
        with OnnxRunner(graph, device=self.device, threads=n, clamped=clamped) as runner:
            yield runner


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
