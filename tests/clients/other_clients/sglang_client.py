"""SGLang: what it serves, with bakeout installed beside it and without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.clients.cells import Client, Said, Way
from tests.clients.other_clients.vllm_client import sequences


def say(way: Way, folders: Mapping[str, Path], prompts: Sequence[list[int]]) -> Sequence[Said]:
    """By SGLang's own arguments, registry, loader and layers."""
    from tests.serving.sglang_here import logits_of

    dtype, _, trusted = way.dtype.partition(", ")
    said = logits_of(str(folders[way.carrier]), dtype, prompts, trust_remote_code=bool(trusted))
    return sequences(said.numpy(), prompts)


_NOTE = "its layers on a CPU, attention written out in torch; its GPU kernels were not run"
_DTYPES = ("float32", "bfloat16", "float16", "auto")
CLIENTS = (
    Client(
        "SGLang, bakeout beside it",
        ("sglang",),
        tuple(Way("layer", dtype) for dtype in _DTYPES),
        say,
        note=_NOTE,
        knows_bakeout=True,
    ),
    Client(
        "SGLang",
        ("sglang",),
        (
            Way("layer", "float32"),
            *(Way("layer", f"{dtype}, its code trusted") for dtype in ("float32", "bfloat16")),
            *(Way(of, dtype) for of in ("compiled", "compiled bfloat16") for dtype in _DTYPES),
        ),
        say,
        note=_NOTE,
    ),
)
