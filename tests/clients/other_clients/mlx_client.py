"""mlx-lm, on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.clients.cells import Client, Said, Way, rows
from tests.clients.torch_clients.transformers_client import CARRIERS, DTYPES


def say(way: Way, folders: Mapping[str, Path], prompts: Sequence[list[int]]) -> Sequence[Said]:
    """See `Client.say`."""
    import mlx.core as mx
    import mlx.nn as nn
    import numpy as np
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    model, _ = load_model(folders[way.carrier])
    if way.dtype.endswith("bits"):
        nn.quantize(model, group_size=32, bits=int(way.dtype.split()[0]))
    else:
        model.set_dtype(getattr(mx, way.dtype))
    said = [model(mx.array([ids]))[0].astype(mx.float32) for ids in prompts]
    return rows([np.array(one) for one in said])


CLIENT = Client(
    "mlx-lm",
    ("mlx-lm", "mlx", "mlx-cpu"),
    tuple(Way(carrier, kind) for carrier in CARRIERS for kind in (*DTYPES, "8 bits", "4 bits")),
    say,
    note="multiplies a Gemma 3's embeddings by a root rounded to bfloat16, whatever the dtype",
)
