"""llama.cpp, over what `bakeout export gguf` writes."""

from __future__ import annotations

from tests.clients.cells import Client, Way

CLIENT = Client(
    "llama.cpp",
    ("llama-cpp-python",),
    (Way("gguf", "f32"), Way("gguf", "bf16"), Way("gguf", "q8_0"), Way("gguf", "q4_k_m")),
    why="there is no `bakeout export gguf` yet, whose files it would take",
)
