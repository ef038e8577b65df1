"""llama.cpp, over what `bakeout export gguf` writes, on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from tests.clients.cells import Client, NotHereError, Said, Way

TYPES = ("f32", "bf16", "f16", "q8_0")
"""`bakeout export gguf --outtype`; the folder `gguf` has a file of each, by that name."""


def say(way: Way, folders: Mapping[str, Path], prompts: Sequence[list[int]]) -> Sequence[Said]:
    """See `Client.say`."""
    import xllamacpp

    file = folders["gguf"] / f"{way.dtype}.gguf"
    if not file.is_file():
        raise NotHereError(f"there is no {file.name}")
    wanted = xllamacpp.CommonParams()
    wanted.model.path = str(file)
    wanted.n_ctx = wanted.n_batch = wanted.n_ubatch = max(64, *(len(ids) + 8 for ids in prompts))
    wanted.n_parallel, wanted.n_gpu_layers, wanted.verbosity = 1, 0, -1
    wanted.cpuparams.n_threads = wanted.cpuparams_batch.n_threads = 1
    with TemporaryDirectory() as scratch:
        wanted.hostnames = [f"{scratch}/llama.sock"]  # it listens, though nobody calls
        server = xllamacpp.Server(wanted)
        text = prompts[0][-1]
        return [
            np.stack([_next(server, ids[:end], text) for end in range(1, len(ids) + 1)])
            for ids in prompts
        ]


def _next(server: Any, ids: list[int], text: int) -> Any:
    """[vocab] log-probabilities after a prompt."""
    said = server.handle_completions(
        {
            "prompt": ids,
            "n_predict": 1,
            "n_probs": 1 << 20,
            "logprobs": 1 << 20,
            "temperature": 0.0,
            "cache_prompt": True,
            # What is taken has to be text, or nothing is told; probabilities are before that.
            "logit_bias": [[text, 1e6]],
            "post_sampling_probs": False,
        }
    )
    if "choices" not in said:
        raise RuntimeError(str(said)[:200])
    (place,) = said["choices"][0]["logprobs"]["content"]
    found = [
        (int(top["id"]), np.nan if top["logprob"] is None else top["logprob"])
        for top in place["top_logprobs"]
    ]
    logits = np.full(1 + max(token for token, _ in found), -np.inf, np.float32)
    logits[[token for token, _ in found]] = [value for _, value in found]
    return logits


CLIENT = Client("llama.cpp", ("xllamacpp",), tuple(Way("gguf", of) for of in TYPES), say)
