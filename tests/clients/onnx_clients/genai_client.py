"""onnxruntime-genai: over our graphs, and over what its own builder makes of a folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from tests.clients.cells import Client, Said, Way, rows
from tests.clients.onnx_clients.onnxruntime_client import graph_of

_BUILT = ", by its own builder"
_KEPT = ", the two layers left out"


def say(way: Way, folders: Mapping[str, Path], prompts: Sequence[list[int]]) -> Sequence[Said]:
    """See `Client.say`."""
    import onnxruntime_genai as genai

    with TemporaryDirectory() if _BUILT in way.dtype else nullcontext() as scratch:
        if scratch is not None:
            model = genai.Model(_built(way, folders[way.carrier], Path(scratch)))
        elif way.dtype == "float32":
            model = genai.Model(str(folders["onnx"]))
        else:
            config = genai.Config(str(folders["onnx"]))
            name = str(graph_of(way, folders).relative_to(folders["onnx"]))
            config.overlay(json.dumps({"model": {"decoder": {"filename": name}}}))
            model = genai.Model(config)
        return rows([_logits(genai, model, ids) for ids in prompts])


def _built(way: Way, folder: Path, scratch: Path) -> str:
    options = []
    if _KEPT in way.dtype:
        sites = json.loads((folder / "manifest.json").read_text())["compiled"]["sites"]
        names = [
            f"/model/layers.{layer}/mlp/{name}_proj/MatMul"
            for site in sites
            for layer in site["layers"]
            for name in ("gate", "up", "down")
        ]
        options = ["--extra_options", f"nodes_to_exclude={','.join(names)}"]
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(folder)]
    command += ["-o", str(scratch / "built"), "-p", way.dtype.partition(",")[0], "-e", "cpu"]
    command += ["-c", str(scratch / "cache"), *options]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return str(scratch / "built")


def _logits(genai: Any, model: Any, ids: list[int]) -> Any:
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(ids) + 8)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array(ids, dtype=np.int32))
    return np.array(generator.get_output("logits"))[0]


CLIENT = Client(
    "onnxruntime-genai",
    ("onnxruntime-genai",),
    (
        *(Way("onnx", name) for name in ("float32", "fp16", "int8", "int4")),
        Way("layer", f"fp32{_BUILT}", slow=True),
        *(Way("compiled", f"{name}{_BUILT}", slow=True) for name in ("fp32", "int4")),
        Way("compiled", f"int4{_BUILT}{_KEPT}", slow=True),
    ),
    say,
)
