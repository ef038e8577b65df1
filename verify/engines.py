"""The engines that a folder's files can be run in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from verify.onnx_files import Graph
from verify.onnx_runner import OnnxRunner
from verify.runners import TorchRunner


@dataclass(frozen=True)
class Engines:
    """A folder's own engines; none of them knows the base model or the SAE."""

    checkpoint: TorchRunner | None
    """None where the folder holds ONNX files only."""
    graphs: list[Graph]
    device: str
    """As torch names it: cpu, cuda."""

    @property
    def threads(self) -> int:
        """Of one engine that has the machine to itself."""
        import torch

        return torch.get_num_threads()

    @contextmanager
    def open(
        self, graph: Graph, *, threads: int | None = None, clamped: bool = True
    ) -> Iterator[OnnxRunner]:
        """A session over one of the graphs."""
        n = self.threads if threads is None else threads
        with OnnxRunner(graph, device=self.device, threads=n, clamped=clamped) as runner:
            yield runner
