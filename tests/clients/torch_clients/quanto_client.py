"""quanto (optimum-quanto): weights of 8 and 4 bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.clients.cells import Client, Said, Way
from tests.clients.torch_clients.transformers_client import CARRIERS, load, logits

_KINDS = ("qint8", "qint4", "qfloat8")


def say(way: Way, folders: Mapping[str, Path], prompts: Sequence[list[int]]) -> Sequence[Said]:
    """See `Client.say`."""
    from optimum import quanto

    model = load(folders[way.carrier], "float32")
    quanto.quantize(model, weights=getattr(quanto, way.dtype))
    quanto.freeze(model)
    return logits(model, prompts)


CLIENT = Client(
    "quanto",
    ("optimum-quanto", "torch"),
    tuple(Way(carrier, kind) for carrier in CARRIERS for kind in _KINDS),
    say,
)
