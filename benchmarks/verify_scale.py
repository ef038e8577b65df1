"""What a verification costs over what its engines' bare forward passes cost.

On the shipped miniature, or a folder and its recipe, in one run: the CPU time of a verification of
all kinds but attacks; then that of every engine of it reading the same prompts once, every token's
logits formed and thrown away. The ratio is the price of all that is compared, looked at and asked.

    python benchmarks/verify_scale.py [--folder FOLDER --recipe RECIPE] [--only KIND…]
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

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


def read_all(runner: Runner, batches: Sequence[Batch]) -> None:
    for batch in batches:
        runner.logits(batch.input_ids, batch.attention_mask, batch.attention_mask.bool())


def bare(folder: Path, recipe: Recipe, kinds: frozenset[str]) -> tuple[int, int]:
    """(engines, tokens of one), after each of them read all prompts once."""
    carrier = Manifest.read(folder).carrier
    graphs = [] if CARRIERS[carrier].over_base else find_graphs(folder)
    with open_engines(folder, carrier, graphs, "cpu") as engines:
        return _read_by_all(engines, folder, recipe, kinds)


def _read_by_all(
    engines: Engines, folder: Path, recipe: Recipe, kinds: frozenset[str]
) -> tuple[int, int]:
    hooked = load_hooked(folder, recipe, engines, lambda *_: None)
    prompts = hooked.material.prompts(shown_for(kinds), compared="parity" in kinds)
    batches = list(hooked.material.batches(prompts))
    n = 0
    for runner in (hooked.base, *hooked.references):
        read_all(runner, batches)
        n += 1
    if engines.torch is not None:
        engines.load_torch(recipe, hooked.dtype, engines.threads)
        read_all(engines.torch, batches)
        n += 1
    for graph in engines.graphs:
        with engines.open(graph) as session:
            read_all(session, batches)
            n += 1
    return n, sum(len(prompt.ids) for prompt in prompts)


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
        report = verify_folder(folder, recipe, kinds)
        whole, wall = cpu_seconds() - began, time.perf_counter() - clock
        began, clock = cpu_seconds(), time.perf_counter()
        n_engines, n_tokens = bare(folder, recipe, kinds)
        once, once_wall = cpu_seconds() - began, time.perf_counter() - clock
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF,))
    print(f"{report.verdict}: {', '.join(sorted(kinds))}; {torch.get_num_threads()} threads")
    print(f"verification      {whole:8.1f} s of CPU, {wall:8.1f} s on the clock")
    print(
        f"bare passes       {once:8.1f} s of CPU, {once_wall:8.1f} s on the clock: {n_engines} "
        f"engines, {n_tokens:,} tokens each ({n_engines * n_tokens / once_wall:.0f} tokens/s)"
    )
    print(f"ratio             {whole / once:8.2f} of CPU, {wall / once_wall:8.2f} on the clock")
    print(f"memory            {peak / 1e6:8.2f} GB at most in this process")


if __name__ == "__main__":
    main()
