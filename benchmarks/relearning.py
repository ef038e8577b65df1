"""What comes back of weights that forget by themselves, when they are trained on other facts.

Distils the shipped miniature by every method named, or takes folders of one recipe, trains each on
texts that state no held-out fact: every rate, all weights and LoRA, every seed to the end. A line
is the worst point of a sweep that leaves the model of use, with its interval over the seeds; beside
it the folder as it is, and the clamp taken out.

    python benchmarks/relearning.py [--methods merged,undisturbed,rmu,npo] [--seeds 9] [--steps 150]
    python benchmarks/relearning.py --recipe R FOLDER…
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from bake.recipe import Recipe
from bakeout.verbs.demo import MINIATURE
from bakeout.verbs.training import distill_into
from verify.attacks.relearn import QUICK_RATES, fine_tune
from verify.audit.outcome import Point, Sweep, sweeps_of
from verify.audit.subject import open_subject
from verify.audit.target import Target

PARTS = 3
"""Of the facts, of which a seed holds out one."""
UNDISTURBED = "undisturbed"
"""`merged`, its student the base as it is, embeddings too."""


def line(name: str, how: str, sweep: Sweep) -> str:
    if sweep.worst is None:
        return f"{name:<16}{how:<14}no model of use"
    return f"{name:<16}{how:<14}{shown(sweep.worst)}"


def shown(point: Point) -> str:
    low, high = point.interval
    kept = "" if point.retained is None else f", retained {point.retained.accuracy:.3f}"
    at = f"{point.steps} steps at {point.settings['rate']:g}"
    right = f"{point.right.right} of {point.right.n} ({low:.2f} to {high:.2f})"
    return f"{right:<28}{at}{kept}, {point.seeds} seeds"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--recipe", type=Path, default=MINIATURE / "recipe.toml")
    parser.add_argument("--methods", default=f"merged,{UNDISTURBED},rmu,npo")
    parser.add_argument("--seeds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    recipe = Recipe.load(options.recipe)
    with tempfile.TemporaryDirectory() as name:
        out = options.keep or Path(name)
        folders = options.folders or [
            made(options.recipe, method, out) for method in options.methods.split(",")
        ]
        for number, folder in enumerate(folders):
            target = Target(open_subject(folder, recipe), PARTS)
            before = target.score(target.subject.model(), brief=True)
            if number == 0:
                base = target.score(target.subject.base(), brief=True).forget[target.form]
                print(f"base, and any clamp taken out: {base.right} of {base.n}", flush=True)
            was, kept = before.forget[target.form], before.retain[target.form]
            print(
                f"{folder.name:<16}{'as it is':<14}{was.right} of {was.n}, "
                f"retained {kept.accuracy:.3f}",
                flush=True,
            )
            for how, lora in (("all weights", False), ("LoRA", True)):
                asked = {"texts": "other", "lora": lora, "size": options.texts, "brief": True}
                tried = [
                    attempt
                    for rate in QUICK_RATES
                    for seed in range(options.seeds)
                    for attempt in fine_tune(
                        target, {**asked, "rate": rate, "steps": options.steps, "seed": seed}
                    )
                ]
                (sweep,) = sweeps_of(tried, before, target.form)
                print(line(folder.name, how, sweep), flush=True)
                for point in sweep.curve:
                    print(f"{'':<30}{shown(point)}", flush=True)


def made(recipe: Path, method: str, out: Path) -> Path:
    """The folder of a method, distilled."""
    folder = out / method
    if not folder.exists():
        if method == UNDISTURBED:
            distill_into(recipe, folder, cache=out / "cache", token_noise=0.0)
        else:
            distill_into(recipe, folder, method=method, cache=out / "cache")
    return folder


if __name__ == "__main__":
    main()
