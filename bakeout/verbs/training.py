"""`bakeout distill` and `bakeout export merged`: recipe → trained weights → card → folder; and
`bakeout train-sae`: an SAE for a model that has no public one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from bake.distill.distill_table import Distill
from bake.distill.unlearners import UNLEARNERS, unlearner_of
from bake.errors import RecipeError
from bake.new_folder import check_output
from bake.recipe import Recipe
from bake.sources import one_line
from bakeout.terminal import progress
from bakeout.verbs.arguments import Device
from bakeout.verbs.baking import planned
from export.carriers.checkpoint import CheckpointPlan
from export.carriers.merged import (
    TrainedPlan,
    check_same,
    describe_training,
    manifest_of_trained,
    size_of_base,
    write_trained,
)
from export.clamped import open_clamped, read_config
from export.manifest import DistilledEntry
from model_cards.facts import facts_of_manifest
from model_cards.render import render
from verify.clamped_folder import fitted_recipe, own_recipe


def distill_into(
    source: Path,
    out: Path,
    *,
    recipe: Path | None = None,
    method: str = "merged",
    seed: int = 0,
    device: str = "cpu",
    force: bool = False,
    cache: Path | None = None,
    **table: Any,
) -> DistilledEntry:
    """Distil a recipe, or a clamped folder, into a folder of stock weights.

    Args:
        source: a recipe, or a folder that `bakeout bake` wrote.
        out: the folder to write.
        recipe: of a folder, where its own names local sources.
        method: of `UNLEARNERS`.
        seed: of everything that is drawn.
        device: as torch names it.
        force: replace a folder that bakeout wrote.
        cache: where teachers' outputs and unfinished runs are kept.
        table: fields of [distill] that stand before the recipe's.
    """
    unlearner = unlearner_of(method)
    plan = _planned(source, recipe, table, cache, device)
    check_output(out, inputs=[*plan.inputs, source], size=size_of_base(plan), force=force)
    from bake.distill.distilling import distill  # torch and transformers
    from bake.distill.trainer import processes

    with progress("distill") as advance:
        distilled = distill(
            plan.recipe,
            plan.base,
            plan.clamps,
            method=method,
            seed=seed,
            device=device,
            cache=cache,
            progress=advance,
        )
        entry = describe_training(distilled, taught=unlearner.teaches)
        facts = facts_of_manifest(manifest_of_trained(plan, method, entry), plan.recipe)
        if not processes().is_main_process:
            return entry
        trained = TrainedPlan(plan, distilled)
        done = 0

        def written(n: int) -> None:
            nonlocal done
            done += n
            advance(f"writing {out.name}", done / trained.size)

        write_trained(trained, out, card=render(facts), entry=entry, force=force, advance=written)
    return entry


def _planned(
    source: Path, recipe: Path | None, table: dict[str, Any], cache: Path | None, device: str
) -> CheckpointPlan:
    """What a bake of the same would write, with the features named.

    Raises:
        BakeoutError: recipe or folder cannot be used, or they do not belong together.
    """
    if not source.is_dir():
        if recipe is not None:
            raise RecipeError("--recipe goes with a folder; the recipe is given already")
        return planned(_with(Recipe.load(source), table), cache=cache, device=device)
    manifest = open_clamped(source).manifest
    given = own_recipe(source) if recipe is None else Recipe.load(recipe)
    if given is None:
        raise RecipeError(
            f"the recipe of {source.name} names local sources, or no texts; give the recipe with "
            "--recipe"
        )
    fitted = fitted_recipe(given, source, read_config(source), shown=False)
    # The folder says how its SAEs fit.
    plan = planned(_with(fitted, table), cache=cache, unfit=True, device=device)
    check_same(plan, manifest, source)
    return plan


def _with(recipe: Recipe, table: dict[str, Any]) -> Recipe:
    """A recipe with some fields of [distill] set.

    Raises:
        RecipeError: one is wrong.
    """
    try:
        distill = recipe.distill_table.with_options(**table)
    except ValidationError as error:
        raise RecipeError(f"distill.{one_line(error, Distill)}") from error
    return recipe.model_copy(update={"distill": distill})


def said(entry: DistilledEntry) -> str:
    """What came of a training, in a line for each side."""
    found = entry.held_out
    return (
        f"retain text  {found.retain_kl:.4f} nats per token from the base, on "
        f"{found.retain_tokens:,} tokens that were not trained on\n"
        f"forget text  {found.forget_kl:.4f} from {entry.teacher}, on {found.forget_tokens:,}"
    )


Out = Annotated[Path, typer.Option(help="Folder to write.")]
OfFolder = Annotated[
    Path | None, typer.Option(help="Recipe of a folder whose own names local sources.")
]
Seed = Annotated[int, typer.Option(help="Of everything that is drawn.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what bakeout wrote.")]


def distill(
    source: Annotated[
        Path, typer.Argument(metavar="RECIPE|FOLDER", help="What is to be distilled.")
    ],
    out: Out,
    method: Annotated[
        str, typer.Option(help="; ".join(f"{name}: {of.what}" for name, of in UNLEARNERS.items()))
    ] = "merged",
    recipe: OfFolder = None,
    steps: Annotated[int | None, typer.Option(help="Of training; else the recipe's.")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    force: Force = False,
) -> None:
    """Train a stock checkpoint to forget by itself: no part to delete, and nothing exact."""
    entry = distill_into(
        source,
        out,
        recipe=recipe,
        method=method,
        seed=seed,
        device=device,
        force=force,
        steps=steps,
    )
    typer.echo(f"{said(entry)}\nwritten to {out}")


def train_sae(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="What to train (TOML).")],
    out: Annotated[Path, typer.Option(help="Folder to write the SAE to; it may not exist.")],
    device: Device = "cpu",
) -> None:
    """Train an SAE with sae_lens, for a model that has no public one.

    A run that was interrupted goes on.
    """
    from bake.training.train_sae import train_config  # sae_lens

    with progress("train-sae") as advance:
        found = train_config(config, out, advance, device)
    fit = found.fit
    explained = "not finite" if fit.variance_explained is None else f"{fit.variance_explained:.1%}"
    standardised = "not finite" if fit.standardised is None else f"{fit.standardised:.1%}"
    typer.echo(
        f"written to {out}\non {fit.tokens:,} tokens that it was not trained on: L0 {fit.l0:.1f}, "
        f"{explained} of the variance explained, {standardised} per standardised dimension, "
        f"{found.dead:,} features never active"
    )
