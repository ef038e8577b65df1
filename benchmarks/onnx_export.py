"""Exporting a checkpoint of gemma-2-2b's shape to ONNX: time, peak memory, size, and loading it.

Random bf16 weights (5.2 GB) and a random 16k Gemma Scope SAE are written to a temporary folder and
baked; then each step is a whole process. The export's peak includes the process in which the
graph is checked. Loading runs the graph as a user would, with all of ONNX Runtime's optimisations.

    python benchmarks/onnx_export.py [--dir DIR] [--no-load]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
LOAD = """
import sys, time, resource
import numpy as np, onnxruntime as ort
start = time.monotonic()
session = ort.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
loaded = time.monotonic()
ids = np.array([[2, *range(1000, 1015)]])
feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(16)[None]}
for value in session.get_inputs()[3:]:
    feed[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
logits = session.run(["logits"], feed)[0]
assert np.isfinite(logits).all() and logits.shape == (1, 16, 256000)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(f"load {loaded - start:.0f} s, first forward of 16 tokens {time.monotonic() - loaded:.1f} s, "
      f"memory now {int(status['VmRSS'].split()[0]) / 1e6:.1f} GB "
      f"(anonymous {int(status['RssAnon'].split()[0]) / 1e6:.1f}), "
      f"peak {int(status['VmHWM'].split()[0]) / 1e6:.1f} GB")
"""


def run(command: list[str]) -> tuple[float, float]:
    """(seconds, peak memory in MB of the process or of any it waited for)."""
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        sys.exit(f"{' '.join(command[:4])} failed")
    return time.monotonic() - start, usage.ru_maxrss / 1024


def write_inputs(folder: Path) -> None:
    """The same base, SAE and recipe as the bake is measured on."""
    spec = importlib.util.spec_from_file_location("bake_benchmark", HERE / "bake.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.write_inputs(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, default=None, help="where the 11 GB go")
    parser.add_argument("--no-load", action="store_true", help="do not load the result (13 GB)")
    options = parser.parse_args()
    bakeout = [sys.executable, "-m", "bakeout"]
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        folder = Path(name)
        # In a process of its own: a child's peak memory starts from its parent's.
        writer = multiprocessing.get_context("spawn").Process(target=write_inputs, args=(folder,))
        writer.start()
        writer.join()
        out = folder / "out"
        run([*bakeout, "bake", str(folder / "recipe.toml"), "--out", str(out)])
        before = sum(path.stat().st_size for path in out.rglob("*"))
        seconds, peak = run([*bakeout, "export", "onnx", str(out)])
        after = sum(path.stat().st_size for path in out.rglob("*"))
        listed = json.loads((out / "manifest.json").read_text())["files"]
        assert "model.onnx" in listed
        print(
            f"export: {seconds:.0f} s, peak {peak / 1e3:.2f} GB, folder {before / 1e9:.2f} GB "
            f"+ {(after - before) / 1e6:.1f} MB"
        )
        if not options.no_load:
            subprocess.run([sys.executable, "-c", LOAD, str(out / "model.onnx")], check=True)


if __name__ == "__main__":
    main()
