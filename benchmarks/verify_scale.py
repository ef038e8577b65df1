"""What a verification costs over what its engines' bare forward passes cost.

On the shipped miniature, or a folder and its recipe, in one run: the CPU time of a verification of
all kinds but attacks; then that of every engine of it reading the same prompts once, every token's
logits formed and thrown away. The ratio is the price of all that is compared, looked at and asked.
Memory is that of this process and all that it starts, shared pages counted once (Linux).

    python benchmarks/verify_scale.py [--folder FOLDER --recipe RECIPE] [--only KIND…]
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil
import torch

sys.path[0] = str(Path(__file__).resolve().parents[1])

from bake.questions.prompts import Batch
from bake.recipe import Recipe
from bakeout.verbs.baking import bake_recipe
from bakeout.verbs.demo import MINIATURE
from export.carriers.carriers import CARRIERS
from export.carriers.onnx.onnx_folder import export_onnx
from export.clamped import read_config
from export.manifest import Manifest
from verify.clamped_folder import fitted_recipe
from verify.engines.engines import Engines, open_engines
from verify.engines.onnx_files import find_graphs
from verify.engines.runners import Runner
from verify.evidence.kinds import KINDS, shown_for
from verify.hooked import load_hooked
from verify.run import verify_folder


def cpu_seconds() -> float:
    """Of this process and of the ended ones that it started."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


class Memory:
    """The most bytes that this process and those below it take together."""

    def __init__(self) -> None:
        self.peak, self._ended = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        own = psutil.Process()
        while not self._ended.wait(0.5):
            total = 0
            for process in (own, *own.children(recursive=True)):
                with suppress(psutil.Error, AttributeError):  # it ended, or this is no Linux
                    total += process.memory_full_info().pss
            self.peak = max(self.peak, total)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def read_all(runner: Runner, batches: Sequence[Batch]) -> None:
    for batch in batches:
        runner.logits(batch.input_ids, batch.attention_mask, batch.attention_mask.bool())


def bare(folder: Path, recipe: Recipe, kinds: frozenset[str]) -> tuple[int, int, int]:
    """(engines, tokens of one, bytes of weights), after each of them read all prompts once."""
    carrier = Manifest.read(folder).carrier
    graphs = [] if CARRIERS[carrier].over_base else find_graphs(folder)
    with open_engines(folder, carrier, graphs, "cpu") as engines:
        return _read_by_all(engines, folder, recipe, kinds)


def _read_by_all(
    engines: Engines, folder: Path, recipe: Recipe, kinds: frozenset[str]
) -> tuple[int, int, int]:
    hooked = load_hooked(folder, recipe, engines, lambda *_: None)
    prompts = hooked.material.prompts(shown_for(kinds), compared="parity" in kinds)
    batches = list(hooked.material.batches(prompts))
    one = sum(parameter.nbytes for parameter in hooked.model.parameters())
    n, weights = 0, one
    for runner in (hooked.base, *hooked.references):
        read_all(runner, batches)
        n += 1
    if engines.torch is not None:
        engines.load_torch(recipe, hooked.dtype, engines.threads)
        read_all(engines.torch, batches)
        n, weights = n + 1, weights + one
    for graph in engines.graphs:
        with engines.open(graph) as session:
            read_all(session, batches)
            n, data = n + 1, graph.path.with_name(f"{graph.path.name}_data")
            weights += data.stat().st_size if data.is_file() else one
    return n, sum(len(prompt.ids) for prompt in prompts), weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--recipe", type=Path, default=MINIATURE / "recipe.toml")
    parser.add_argument("--only", nargs="+", default=[k for k in KINDS if k != "robustness"])
    arguments = parser.parse_args()
    kinds = frozenset(arguments.only)
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder
        if folder is None:
            folder = Path(scratch) / "checkpoint"
            bake_recipe(arguments.recipe, folder, cache=Path(scratch), force=False)
            export_onnx(folder)
        recipe = fitted_recipe(Recipe.load(arguments.recipe), folder, read_config(folder))
        began, clock = cpu_seconds(), time.perf_counter()
        with Memory() as memory:
            report = verify_folder(folder, recipe, kinds)
        whole, wall = cpu_seconds() - began, time.perf_counter() - clock
        began, clock = cpu_seconds(), time.perf_counter()
        n_engines, n_tokens, weights = bare(folder, recipe, kinds)
        once, once_wall = cpu_seconds() - began, time.perf_counter() - clock
    print(f"{report.verdict}: {', '.join(sorted(kinds))}; {torch.get_num_threads()} threads")
    print(f"verification      {whole:8.1f} s of CPU, {wall:8.1f} s on the clock")
    print(
        f"bare passes       {once:8.1f} s of CPU, {once_wall:8.1f} s on the clock: {n_engines} "
        f"engines, {n_tokens:,} tokens each ({n_engines * n_tokens / once_wall:.0f} tokens/s)"
    )
    print(f"ratio             {whole / once:8.2f} of CPU, {wall / once_wall:8.2f} on the clock")
    print(f"memory            {memory.peak / 1e9:8.2f} GB at most in all processes")
    print(f"weights           {weights / 1e9:8.2f} GB of base and engines")


if __name__ == "__main__":
    main()
