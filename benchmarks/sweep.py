"""One sweep point after the first, against `bakeout bake` and `bakeout verify` from scratch.

On the miniature. A round bakes and verifies one setting in two processes, as one would without a
sweep, then measures the same setting and its neighbours within a running sweep. The sweep measures
the validation questions in the leading prompt form; verify measures the test questions in both.

    python benchmarks/sweep.py [--rounds 3]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from bake.recipe import Recipe
from bake.search.grid import Point
from bake.search.sweep import Sweep
from bakeout.verbs.demo import MINIATURE


def from_scratch(recipe: Path, out: Path) -> float:
    begun = time.perf_counter()
    bakeout = [sys.executable, "-m", "bakeout"]
    for command in (
        ["bake", str(recipe), "--out", str(out)],
        ["verify", str(out), "--recipe", str(recipe)],
    ):
        subprocess.run([*bakeout, *command], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def seconds(sweep: Sweep, point: Point) -> float:
    begun = time.perf_counter()
    sweep.measure(sweep.at(point), "validation")
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        cache = Path(name) / "cache"
        sweep = Sweep(Recipe.load(MINIATURE / "recipe.toml"), None, cache=cache)
        first = seconds(sweep, Point((("value", -40.0),)))
        print(f"first point {first:.2f} s: the questions' activations are cached on the way")
        numbers = Path(name) / "numbers.toml"
        ratios = []
        for round_number in range(1, options.rounds + 1):
            point = Point((("n_features", 100 - round_number), ("value", -40.0)))
            numbers.write_text(sweep.at(point).at(numbers.parent).to_toml(), encoding="utf-8")
            scratch = from_scratch(numbers, Path(name) / f"out-{round_number}")
            later = [seconds(sweep, point) for _ in range(3)]
            ratios.append(scratch / statistics.median(later))
            print(
                f"round {round_number}: bake and verify {scratch:.1f} s, a later point "
                f"{statistics.median(later):.2f} s, ratio {ratios[-1]:.1f}"
            )
        print(f"median ratio {statistics.median(ratios):.1f}")


if __name__ == "__main__":
    main()
