"""vLLM: what it serves, with bakeout installed beside it and without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from tests.clients.cells import Client, Said, Way


def say(way: Way, folders: Mapping[str, Path], prompts: Sequence[list[int]]) -> Sequence[Said]:
    """By vLLM's own config, registry, loader and layers."""
    from tests.serving.vllm_here import logits_of

    dtype, _, trusted = way.dtype.partition(", ")
    engine = {"trust_remote_code": bool(trusted)}
    said = logits_of(str(folders[way.carrier]), dtype, prompts, **engine)
    return sequences(said.numpy(), prompts)


def sequences(said: np.ndarray, prompts: Sequence[list[int]]) -> Sequence[Said]:
    """[tokens of all, vocab] -> those of each, [tokens, vocab]."""
    ends = [sum(map(len, prompts[: n + 1])) for n in range(len(prompts))]
    return [said[end - len(ids) : end] for end, ids in zip(ends, prompts, strict=True)]


_NOTE = "its layers on a CPU, attention's kernel written out in torch; its GPU kernels were not run"
_DTYPES = ("float32", "bfloat16", "float16", "auto")
CLIENTS = (
    Client(
        "vLLM, bakeout beside it",
        ("vllm",),
        tuple(Way("layer", dtype) for dtype in _DTYPES),
        say,
        note=_NOTE,
        knows_bakeout=True,
    ),
    Client(
        "vLLM",
        ("vllm",),
        (
            Way("layer", "float32"),
            *(Way("layer", f"{dtype}, its code trusted") for dtype in ("float32", "bfloat16")),
            *(Way(of, dtype) for of in ("compiled", "compiled bfloat16") for dtype in _DTYPES),
        ),
        say,
        note=_NOTE,
    ),
)
