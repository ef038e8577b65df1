"""How fast a folder's engines go on with prompts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from bake.families import GEMMA_BOS
from bake.recipe import Recipe
from export.carriers.carriers import CARRIERS
from export.manifest import Manifest
from verify.engines.engines import open_engines
from verify.engines.onnx_files import find_graphs
from verify.engines.runners import HookedRunner, Runner

SPEAKERS, SPOKEN = 8, 16
"""How many prompts go on at once, and how many tokens each."""


def speeds(folders: Sequence[Path], recipe: Recipe, *, reference: bool = True) -> dict[str, float]:
    """Tokens per second that engines go on with, greedily, from a cache, each alone: `SPOKEN` of
    each of `SPEAKERS` prompts at once.

    Args:
        folders: whose engines are measured, beside the base.
        recipe: names the base; its features are numbers where the reference is measured too.
        reference: whether it is.
    """
    import torch

    from bake.stock import load_base
    from verify.reference.oracle import Oracle
    from verify.reference.whole_sae import load_sites

    ids = (GEMMA_BOS + torch.arange(8)).expand(SPEAKERS, -1)
    found = {}

    def measure(runner: Runner) -> None:
        runner.go_on(ids, torch.ones_like(ids), (), 2)
        start = time.perf_counter()
        runner.go_on(ids, torch.ones_like(ids), (), SPOKEN)
        found[runner.name] = SPEAKERS * SPOKEN / (time.perf_counter() - start)

    model = load_base(recipe)
    dtype = str(model.dtype).removeprefix("torch.")
    measure(HookedRunner("base", model))
    if reference:
        measure(HookedRunner("reference", model, Oracle(model, load_sites(recipe))))
    del model
    for folder in folders:
        carrier = Manifest.read(folder).carrier
        graphs = find_graphs(folder) if not CARRIERS[carrier].over_base else []
        with open_engines(folder, carrier, graphs, "cpu") as engines:
            if engines.torch is not None:
                engines.load_torch(recipe, dtype, engines.threads)
                measure(engines.torch)
            for graph in graphs:
                with engines.open(graph) as runner:
                    measure(runner)
    return found
