"""peft: the adapter over its base, and a new LoRA over clamped weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.clients.cells import Client, Said, Way
from tests.clients.torch_clients.transformers_client import DTYPES, load, logits


def say(way: Way, folders: Mapping[str, Path], prompts: Sequence[list[int]]) -> Sequence[Said]:
    """See `Client.say`."""
    from peft import LoraConfig, PeftModel, get_peft_model

    dtype = way.dtype.partition(", ")[0]
    if way.carrier == "adapter":
        base = load(folders["base"], dtype)
        return logits(PeftModel.from_pretrained(base, folders["adapter"]), prompts)
    model = load(folders[way.carrier], dtype)
    return logits(get_peft_model(model, LoraConfig(target_modules="all-linear", r=2)), prompts)


def say_beside(
    way: Way, folders: Mapping[str, Path], prompts: Sequence[list[int]]
) -> Sequence[Said]:
    """See `Client.say`."""
    import bakeout  # noqa: F401  (registers the adapter's kind)

    return say(way, folders, prompts)


CLIENTS = (
    Client(
        "peft, bakeout imported",
        ("peft", "transformers"),
        tuple(Way("adapter", dtype) for dtype in DTYPES),
        say_beside,
        knows_bakeout=True,
    ),
    Client(
        "peft",
        ("peft", "transformers"),
        (
            Way("adapter", "float32"),
            *(Way(carrier, "float32, under a new LoRA") for carrier in ("layer", "compiled")),
        ),
        say,
    ),
)
