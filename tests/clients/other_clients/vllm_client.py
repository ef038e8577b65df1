"""vLLM: not run."""

from __future__ import annotations

from tests.clients.cells import Client, Way

_WHY = "its wheel is built for CUDA, and there was no GPU"

CLIENT = Client("vLLM", ("vllm",), (Way("compiled", "auto"),), why=_WHY)
