"""torchao: weights of 8 and 4 bits, activations of 8."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.clients.cells import Client, Said, Way
from tests.clients.torch_clients.transformers_client import CARRIERS, load, logits

_KINDS = ("int8 weights", "int8 weights and activations", "int4 weights", "float8 weights")


def say(way: Way, folders: Mapping[str, Path], prompts: Sequence[list[int]]) -> Sequence[Said]:
    """See `Client.say`."""
    from torchao import quantization as ao

    model = load(folders[way.carrier], "float32")
    if way.dtype == "int8 weights":
        ao.quantize_(model, ao.Int8WeightOnlyConfig())
    elif way.dtype == "int8 weights and activations":
        ao.quantize_(model, ao.Int8DynamicActivationInt8WeightConfig())
    elif way.dtype == "int4 weights":
        import torch

        ao.quantize_(model, ao.IntxWeightOnlyConfig(weight_dtype=torch.int4))
    else:
        ao.quantize_(model, ao.Float8WeightOnlyConfig())
    return logits(model, prompts)


CLIENT = Client(
    "torchao",
    ("torchao", "torch"),
    tuple(Way(carrier, kind) for carrier in CARRIERS for kind in _KINDS),
    say,
)
