"""`bakeout bake`: recipe → plan → card → checkpoint folder."""

from __future__ import annotations

from pathlib import Path

from bake.clamp import sae_name
from bake.recipe import Recipe
from bakeout.showing import progress
from export.checkpoint import CheckpointPlan, plan_checkpoint, write_checkpoint
from export.new_folder import check_output
from model_cards.render import render_card


def planned(recipe_file: Path, *, cache: Path | None = None) -> CheckpointPlan:
    """What a recipe file asks for, found and checked. Features are selected where it says so;
    the numbers stand in the plan's recipe.
    """
    recipe = Recipe.load(recipe_file)
    if recipe.selects:
        from bakeout.selecting import selected_recipe  # torch and transformers

        with progress("select") as advance:
            recipe, _ = selected_recipe(recipe, cache=cache, progress=advance)
    return plan_checkpoint(recipe)


def bake_recipe(
    recipe_file: Path, out: Path, *, force: bool, cache: Path | None = None
) -> CheckpointPlan:
    """Bake a recipe file into a folder, with a progress bar; returns what was written."""
    recipe = Recipe.load(recipe_file)
    check_output(out, inputs=recipe.local_sources, size=0, force=force)
    plan = planned(recipe_file, cache=cache)
    check_output(out, inputs=plan.inputs, size=plan.size, force=force)
    card = render_card(plan.recipe, plan.base, plan.clamps)
    with progress("bake") as advance:
        done = 0

        def copied(n: int) -> None:
            nonlocal done
            done += n
            advance(f"copying {plan.base.name}", done / plan.size)

        write_checkpoint(plan, out, card=card, force=force, advance=copied)
    return plan


def describe_plan(plan: CheckpointPlan) -> str:
    """A few lines: base, clamps, size."""
    lines = [f"base   {plan.base.name} ({plan.base.n_layers} layers, d_in {plan.base.d_in})"]
    for clamp in plan.clamps:
        count = len(clamp.clamp.features)
        lines.append(
            f"clamp  {clamp.hook_point}: {clamp.clamp.method} on {count} "
            f"feature{'s' * (count != 1)} of {sae_name(clamp.clamp)}"
        )
    lines.append(
        f"size   {plan.size / 1e6:,.1f} MB, of which the clamp is {plan.clamp_size / 1e3:,.1f} kB"
    )
    return "\n".join(lines)
