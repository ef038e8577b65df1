"""bitsandbytes, through transformers: 8 and 4 bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.clients.cells import Client, Said, Way
from tests.clients.torch_clients.transformers_client import CARRIERS, load, logits

_KINDS: dict[str, dict[str, Any]] = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
}


def say(way: Way, folders: Mapping[str, Path], prompts: Sequence[list[int]]) -> Sequence[Said]:
    """See `Client.say`."""
    import bitsandbytes  # noqa: F401  (says itself that it is not installed)
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(**_KINDS[way.dtype])
    return logits(load(folders[way.carrier], "float32", quantization_config=config), prompts)


CLIENT = Client(
    "bitsandbytes",
    ("bitsandbytes", "transformers"),
    tuple(Way(carrier, kind) for carrier in CARRIERS for kind in _KINDS),
    say,
)
