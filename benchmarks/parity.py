"""What it costs to tell rounding from a fault.

On the shipped miniature, or a folder and its recipe: a forward of the reference with its SAE in
float64 over one in float32, in pairs; then a whole parity, and the share of its CPU time that goes
into measuring what one rounding does.

    python benchmarks/parity.py [--folder FOLDER --recipe RECIPE] [--rounds 20] [--threads 1]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path[0] = str(Path(__file__).resolve().parents[1])

from bake.recipe import Recipe
from bake.stock import load_base, load_tokenizer
from bakeout.verbs.baking import bake_recipe
from bakeout.verbs.demo import MINIATURE
from export.clamped import read_config
from verify.clamped_folder import fitted_recipe
from verify.compare.sensitivity import Sensitivity
from verify.engines.runners import HookedRunner
from verify.evidence.kinds import shown_for
from verify.material import load_material
from verify.reference.editing import edit_code
from verify.reference.oracle import Edited, Oracle
from verify.reference.whole_sae import Site, load_sites
from verify.run import verify_folder

PARITY = frozenset({"parity"})


def edit_in_float32(h: Tensor, site: Site, exempt: Tensor) -> Edited:
    """The hook as it would be without care: everything in float32."""
    x = h.reshape(-1, h.shape[-1]).float()
    acts = site.sae.encode(x)
    edited = edit_code(acts, site.clamp)
    touched = (edited != acts).any(dim=-1) & ~exempt.reshape(-1)
    out = h.reshape(-1, h.shape[-1]).clone()
    if touched.any():
        error = x[touched] - site.sae.decode(acts[touched])
        out[touched] = (site.sae.decode(edited[touched]) + error).to(h.dtype)
    active = (acts[:, list(site.features)] > site.clamp.trigger).reshape(*h.shape[:-1], -1)
    return Edited(out.reshape(h.shape), touched.reshape(h.shape[:-1]), active)


def pairs(recipe: Recipe, rounds: int) -> list[float]:
    """CPU time of the reference over that of the careless one, batch by batch."""
    model, material = load_base(recipe), load_material(recipe, load_tokenizer(recipe))
    careful, careless = Oracle(model, load_sites(recipe)), Oracle(model, load_sites(recipe))
    for site in careless.sites:
        site.sae.to(torch.float32)
    careless._edit_residual = edit_in_float32
    runners = [HookedRunner("reference", model, oracle) for oracle in (careful, careless)]
    ratios = []
    prompts = material.prompts(shown_for(PARITY), compared=True)
    for batch in list(material.batches(prompts))[:rounds]:
        times = []
        for runner in runners:
            start = time.process_time()
            runner.logits(batch.input_ids, batch.attention_mask, batch.wanted)
            times.append(time.process_time() - start)
        ratios.append(times[0] / times[1])
    return ratios


def share(folder: Path, recipe: Recipe) -> tuple[float, float]:
    """(CPU seconds of a parity, of these how many measure what one rounding does)."""
    measured = 0.0
    look: Callable[..., Any] = Sensitivity._look

    def timed(self: Sensitivity, places: Any) -> Any:
        nonlocal measured
        start = time.process_time()
        found = look(self, places)
        measured += time.process_time() - start
        return found

    Sensitivity._look = timed  # type: ignore[method-assign]
    start = sum(time_of_all())
    report = verify_folder(folder, recipe, PARITY)
    if report.verdict != "pass":
        sys.exit(f"parity fails: {report.failures[0]}")
    for engine in report.engines:
        if engine.parity is not None and engine.parity.rounding is not None:
            rounding = engine.parity.rounding
            print(f"{engine.name}: worst {rounding.worst:.3g}, on average {rounding.typical:.3g}")
    return sum(time_of_all()) - start, measured


def time_of_all() -> tuple[float, float]:
    """CPU seconds of this process and of the ended ones that it started."""
    import resource

    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return tuple(usage.ru_utime + usage.ru_stime for usage in usages)  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--recipe", type=Path, default=MINIATURE / "recipe.toml")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder
        if folder is None:
            folder = Path(scratch) / "checkpoint"
            bake_recipe(arguments.recipe, folder, cache=Path(scratch), force=False)
        recipe = fitted_recipe(Recipe.load(arguments.recipe), folder, read_config(folder))
        ratios = pairs(recipe, arguments.rounds)
        quartiles = statistics.quantiles(ratios, n=4)
        print(
            f"reference, SAE in float64 over float32: {quartiles[1]:.3f} × "
            f"(quartiles {quartiles[0]:.3f} to {quartiles[2]:.3f}, {len(ratios)} pairs)"
        )
        whole, measured = share(folder, recipe)
        print(
            f"parity: {whole:.1f} s of CPU, {measured / whole:.1%} of it to disturb the reference"
        )


if __name__ == "__main__":
    main()
