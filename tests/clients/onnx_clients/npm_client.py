"""What is installed by npm: ONNX Runtime in Node and as WebAssembly, and transformers.js."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from shutil import which
from tempfile import TemporaryDirectory

import numpy as np

from tests.clients.cells import Client, NotHereError, Said, Way, rows
from tests.clients.onnx_clients.onnxruntime_client import GRAPHS, WAYS, graph_of

ROOT = Path(__file__).parents[3]
_SCRIPTS = Path(__file__).parents[1] / "js"


def node_modules() -> Path:
    """Where npm has installed: $BAKEOUT_NODE_MODULES, or `node_modules` in the checkout."""
    return Path(os.environ.get("BAKEOUT_NODE_MODULES", ROOT / "node_modules"))


def needs(*packages: str) -> None:
    """Raise `NotHereError` where node or a package is missing."""
    if which("node") is None:
        raise NotHereError("node is not installed")
    missing = [name for name in packages if not (node_modules() / name).is_dir()]
    if missing:
        raise NotHereError(f"not installed: npm install {' '.join(missing)}")


def runs(script: str, package: str, exact: str | None = None) -> Callable[..., Sequence[Said]]:
    """A `Client.say` that a script in `js/` answers for.

    Args:
        script: its name.
        package: of npm, that it needs.
        exact: the float32 graph that it takes, where that is not the shared one.
    """

    def say(way: Way, folders: Mapping[str, Path], prompts: Sequence[list[int]]) -> Sequence[Said]:
        needs(package)
        graph = graph_of(way, folders)
        if way.dtype == "float32" and exact is not None:
            graph = folders["onnx"] / exact
            if not graph.is_file():
                raise NotHereError(f"the folder has no {exact}")
        with TemporaryDirectory() as scratch:
            request = {
                "folder": str(folders["onnx"]),
                "graph": str(graph),
                "dtype": way.dtype,
                "prompts": prompts,
                "modules": f"{node_modules()}/",
                "out": f"{scratch}/logits",
            }
            (Path(scratch) / "request.json").write_text(json.dumps(request))
            done = subprocess.run(
                ["node", str(_SCRIPTS / script), f"{scratch}/request.json"],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                lines = [one for one in done.stderr.splitlines() if re.match(r"\w*Error", one)]
                raise RuntimeError((lines or done.stderr.strip().splitlines() or ["?"])[0])
            flat = np.fromfile(f"{scratch}/logits", dtype=np.float32)
        vocab = len(flat) // sum(map(len, prompts))
        ends = np.cumsum([len(ids) for ids in prompts])[:-1]
        return rows(np.split(flat.reshape(-1, vocab), ends))

    return say


CLIENTS = (
    Client(
        "ONNX Runtime (Node)",
        ("npm:onnxruntime-node",),
        WAYS,
        runs("ort_node.mjs", "onnxruntime-node"),
    ),
    Client(
        "ONNX Runtime (WebAssembly)",
        ("npm:onnxruntime-web",),
        WAYS,
        runs("ort_web.mjs", "onnxruntime-web"),
    ),
    Client(
        "transformers.js",
        ("npm:@huggingface/transformers",),
        tuple(Way("onnx", name) for name in GRAPHS),
        runs("transformers_js.mjs", "@huggingface/transformers", "onnx/model.onnx"),
    ),
)
