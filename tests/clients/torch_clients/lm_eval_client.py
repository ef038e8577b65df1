"""lm-evaluation-harness: what its own loader makes of a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.clients.cells import Client, Said, Way, rows
from tests.clients.torch_clients.transformers_client import CARRIERS, DTYPES


def say(way: Way, folders: Mapping[str, Path], prompts: Sequence[list[int]]) -> Sequence[Said]:
    """See `Client.say`."""
    import torch
    from lm_eval.models.huggingface import HFLM

    model = HFLM(
        pretrained=str(folders[way.carrier]),
        dtype=way.dtype,
        trust_remote_code=True,
        device="cpu",
        batch_size=1,
    )
    return rows([model._model_call(torch.tensor([ids]))[0].float() for ids in prompts])


CLIENT = Client(
    "lm-eval",
    ("lm-eval", "transformers"),
    tuple(Way(carrier, dtype) for carrier in CARRIERS for dtype in DTYPES),
    say,
)
