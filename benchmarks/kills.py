"""Verbs that write, killed at random moments: is the folder whole, and can the verb be run again?

A tiny random model is baked; each verb is a process that gets SIGKILL after a random share of the
time that it takes. Afterwards the folder that it wrote into must pass `bakeout verify --only
integrity` with an exit code of 0, and the same verb must succeed. Exit code 1 where that fails.

    python benchmarks/kills.py [--n 100] [--seed 0]
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.folders import baked_world

VERBS = {
    "export onnx": ["export", "onnx", "checkpoint", "--force"],
    "export onnx int8": ["export", "onnx", "checkpoint", "--precision", "int8", "--force"],
    "export onnx --out": [
        *("export", "onnx", "checkpoint", "--precision", "int8", "--out", "out", "--force"),
    ],
    "export adapter": ["export", "adapter", "checkpoint", "--out", "out", "--force"],
    "card": ["card", "checkpoint"],
    "bake": ["bake", "recipe.toml", "--out", "checkpoint", "--force"],
}


def start(root: Path, verb: list[str]) -> subprocess.Popen[bytes]:
    """A verb as a process of its own."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, "-m", "bakeout", *verb], cwd=root, **quiet)


def whole(root: Path, name: str) -> bool:
    """Whether a folder passes, or is not there."""
    verify = ["verify", name, "--only", "integrity"]
    return not (root / name).exists() or start(root, verify).wait() == 0


def main() -> None:
    """Kill, look, run again."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    draw, bad, killed = random.Random(given.seed), 0, 0
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        baked_world(root, [1, 5, 9])
        took = {}
        for verb, command in VERBS.items():
            begun = time.monotonic()
            assert start(root, command).wait() == 0, verb
            took[verb] = time.monotonic() - begun
        for number in range(given.n):
            verb = list(VERBS)[number % len(VERBS)]
            process = start(root, VERBS[verb])
            time.sleep(took[verb] * draw.uniform(0.3, 1.0))  # before, it imports
            process.send_signal(signal.SIGKILL)
            killed += process.wait() == -signal.SIGKILL
            after = [folder for folder in ("checkpoint", "out") if not whole(root, folder)]
            again = start(root, VERBS[verb]).wait() == 0
            told = "good"
            if after or not again:
                bad, told = bad + 1, f"not whole {after}, run again {again}"
                shutil.rmtree(root / "out", ignore_errors=True)
            print(f"{number} {verb}: {told}", flush=True)
    print(f"{given.n} runs, {killed} killed before their end, {bad} bad")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
