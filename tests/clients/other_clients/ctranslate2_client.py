"""CTranslate2: converted by its own converter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.clients.cells import Client, Said, Way, rows

_KINDS = ("float32", "bfloat16", "float16", "int8")


def say(way: Way, folders: Mapping[str, Path], prompts: Sequence[list[int]]) -> Sequence[Said]:
    """See `Client.say`."""
    import ctranslate2
    import numpy as np
    from transformers import AutoTokenizer

    folder = folders[way.carrier]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = [tokenizer.convert_ids_to_tokens(ids) for ids in prompts]
    with TemporaryDirectory() as scratch:
        converter = ctranslate2.converters.TransformersConverter(
            str(folder), trust_remote_code=True
        )
        out = converter.convert(f"{scratch}/model", quantization=way.dtype)
        generator = ctranslate2.Generator(out, compute_type=way.dtype)
        found = [generator.forward_batch([one], return_log_probs=True) for one in tokens]
        return rows([np.array(one.to_device(ctranslate2.Device.cpu))[0] for one in found])


CLIENT = Client(
    "CTranslate2",
    ("ctranslate2", "transformers"),
    tuple(
        Way(carrier, kind)
        for carrier in ("layer", "compiled", "compiled bfloat16")
        for kind in _KINDS
    ),
    say,
    note="reads neither soft caps nor window of a Gemma 2: there the base is another model, too",
)
