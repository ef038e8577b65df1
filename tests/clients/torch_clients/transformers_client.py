"""transformers: dtypes, a static cache, a compiled forward, assisted generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.clients.cells import Client, Generated, Said, Way, rows

_NEW = 12
"""Tokens that are generated where a client generates."""


def load(folder: Path, dtype: str, **more: Any) -> Any:
    """As its documentation has it."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), trust_remote_code=True, **more
    )
    return model.eval()


def logits(model: Any, prompts: Sequence[list[int]]) -> Sequence[Said]:
    """[seq, vocab] each, by whole prompts."""
    import torch

    with torch.no_grad():
        return rows([model(torch.tensor([ids])).logits[0].float() for ids in prompts])


def say(way: Way, folders: Mapping[str, Path], prompts: Sequence[list[int]]) -> Sequence[Said]:
    """See `Client.say`."""
    dtype, _, how = way.dtype.partition(", ")
    model = load(folders[way.carrier], dtype)
    if how == "torch.compile":
        import torch

        return logits(torch.compile(model, fullgraph=True), prompts)
    if how == "static cache":
        return [_step_by_step(model, ids) for ids in prompts]
    if how == "assisted by its base":
        return [_assisted(model, load(folders["base"], dtype), ids) for ids in prompts]
    return logits(model, prompts)


def _step_by_step(model: Any, ids: list[int]) -> Said:
    """Token by token, from a cache of fixed size."""
    import torch
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=len(ids))
    found = []
    with torch.no_grad():
        for place, token in enumerate(ids):
            output = model(
                torch.tensor([[token]]),
                past_key_values=cache,
                cache_position=torch.tensor([place]),
                position_ids=torch.tensor([[place]]),
                use_cache=True,
            )
            found.append(output.logits[0, 0].float().numpy())
    return np.stack(found)


def _assisted(model: Any, assistant: Any, ids: list[int]) -> Said:
    import torch

    found = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        assistant_model=assistant,
        max_new_tokens=_NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    said = np.stack([step[0].float().numpy() for step in found.logits])
    return Generated(found.sequences[0].tolist(), said)


DTYPES = ("float32", "bfloat16", "float16")
CARRIERS = ("layer", "compiled", "compiled bfloat16")

CLIENT = Client(
    "transformers",
    ("transformers", "torch"),
    (
        *(Way(carrier, dtype) for carrier in CARRIERS for dtype in DTYPES),
        *(
            Way(carrier, f"float32, {how}", slow=how != "static cache")
            for carrier in CARRIERS[:2]
            for how in ("static cache", "torch.compile", "assisted by its base")
        ),
    ),
    say,
)
