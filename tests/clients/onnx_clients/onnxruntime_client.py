"""ONNX Runtime in Python, with nothing of bakeout's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.clients.cells import Client, NotHereError, Said, Way, rows

GRAPHS = {
    "float32": "model.onnx",
    "fp16": "onnx/model_fp16.onnx",
    "int8": "onnx/model_int8.onnx",
    "int4": "onnx/model_q4.onnx",
}
"""By the row that they make."""
WAYS = tuple(Way("onnx", name) for name in GRAPHS)


def graph_of(way: Way, folders: Mapping[str, Path]) -> Path:
    """Where a way's graph lies; `NotHereError` where there is none."""
    path = folders["onnx"] / GRAPHS[way.dtype.partition(",")[0]]
    if not path.is_file():
        raise NotHereError(f"the folder has no {path.name}")
    return path


def feed(ids: list[int], past: Mapping[str, tuple[Sequence[Any], bool]]) -> dict[str, Any]:
    """A prompt, and a cache of nothing.

    Args:
        ids: the prompt.
        past: of each input that caches, its shape, and whether it is float16.
    """
    prompt = np.array([ids], dtype=np.int64)
    given = {
        "input_ids": prompt,
        "attention_mask": np.ones_like(prompt),
        "position_ids": np.arange(len(ids), dtype=np.int64)[None],
    }
    for name, (shape, halves) in past.items():
        given[name] = np.zeros((1, shape[1], 0, shape[3]), "f2" if halves else "f4")
    return given


def say(way: Way, folders: Mapping[str, Path], prompts: Sequence[list[int]]) -> Sequence[Said]:
    """See `Client.say`."""
    import onnxruntime as ort

    session = ort.InferenceSession(graph_of(way, folders), providers=["CPUExecutionProvider"])
    past = {
        one.name: (one.shape, one.type == "tensor(float16)")
        for one in session.get_inputs()
        if one.name.startswith("past_key_values")
    }
    return rows([session.run(["logits"], feed(ids, past))[0][0] for ids in prompts])


CLIENT = Client("ONNX Runtime (Python)", ("onnxruntime",), WAYS, say)
