"""`bakeout bake`: recipe → plan → card → checkpoint folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from bake.clamp import sae_name
from bake.errors import DataError, ModelError
from bake.new_folder import check_output
from bake.recipe import Recipe
from bake.sae.fit_figures import UNMEASURED
from bake.tensors import n_bytes
from bakeout.terminal import progress
from bakeout.verbs.arguments import Device, RecipePath
from export.carriers.checkpoint import CheckpointPlan, plan_checkpoint, write_checkpoint
from export.passing_by import passing_by, said
from model_cards.render import render_card

WITNESS_BYTES = 1 << 30
"""Up to this size of a base's weights witnesses are written unasked: making them runs the model,
which takes longer than baking a large one."""


def planned(
    recipe: Recipe, *, cache: Path | None = None, unfit: bool = False, device: str = "cpu"
) -> CheckpointPlan:
    """What a recipe asks for, found and checked. Features are selected where it says so, on a
    device as torch names it; the numbers stand in the plan's recipe. An SAE that does not fit is
    refused, unless `unfit`.
    """
    from bake.search.fit import checked_fits

    fits = None
    if recipe.selects:
        from bake.search.selection import selected_recipe  # torch and transformers

        fits = checked_fits(recipe, unfit=unfit)  # before what takes long
        with progress("select") as advance:
            recipe, _ = selected_recipe(recipe, cache=cache, progress=advance, device=device)
    plan = plan_checkpoint(recipe)
    return replace(plan, fits=checked_fits(recipe, unfit=unfit) if fits is None else fits)


def bake_recipe(
    recipe: Recipe | Path,
    out: Path,
    *,
    force: bool,
    cache: Path | None = None,
    witnesses: bool | None = None,
    unfit: bool = False,
    device: str = "cpu",
) -> CheckpointPlan:
    """Bake a recipe into a folder, with a progress bar; returns what was written.

    Args:
        recipe: one that was loaded, or its TOML file.
        out: the folder to write.
        force: replace a folder that bakeout wrote.
        cache: where statistics are kept, where features are to be selected.
        witnesses: whether to write some; None leaves it to the base's size.
        unfit: bake SAEs that do not fit the base too.
        device: as torch names it, where the model runs to select features and find witnesses.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    check_output(out, inputs=recipe.local_sources, size=0, force=force)
    plan = planned(recipe, cache=cache, unfit=unfit, device=device)
    check_output(out, inputs=plan.inputs, size=plan.size, force=force)
    card = render_card(plan.recipe, plan.base, plan.clamps, plan.fits)
    with progress("bake") as advance:
        done = 0

        def copied(n: int) -> None:
            nonlocal done
            done += n
            advance(f"copying {plan.base.name}", done / plan.size)

        if witnesses is None:
            witnesses = plan.size <= WITNESS_BYTES
        prompts = witness_prompts(recipe) if witnesses else None
        write_checkpoint(
            *(plan, out),
            card=card,
            force=force,
            advance=copied,
            witness_prompts=prompts,
            device=device,
        )
    return plan


def notes(plan: CheckpointPlan) -> list[str]:
    """What goes past its clamps by design: of a Gemma 4, and by a gate over the sequence."""
    of = [(clamp.layer, clamp.clamp.tau) for clamp in plan.clamps]
    return [
        line for at, tau in of for line in said(at, **passing_by(plan.base.config, at), tau=tau)
    ]


def witness_prompts(recipe: Recipe) -> list[list[int]]:
    """Token ids of the recipe's forget questions, BOS first: they are likeliest to fire the clamp.

    None where they, or a tokenizer, cannot be had: prompts are then searched for.
    """
    from bake.questions.multiple_choice import load_questions
    from bake.questions.prompts import bos_id
    from bake.stock import load_tokenizer

    if recipe.verify is None:
        return []
    try:
        questions = load_questions(recipe.verify.forget_questions, recipe)
        tokenizer = load_tokenizer(recipe)
        bos = bos_id(tokenizer)
    except (DataError, ModelError):
        return []
    texts = [question.question for question in questions]
    return [[bos, *ids] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def describe_plan(plan: CheckpointPlan) -> str:
    """A few lines: base, clamps and how their SAEs fit, size."""
    lines = [f"base   {plan.base.name} ({plan.base.n_layers} layers, d_in {plan.base.d_in})"]
    for clamp in plan.clamps:
        count = len(clamp.clamp.features)
        lines.append(
            f"clamp  {clamp.hook_point}: {clamp.clamp.method} on {count} "
            f"feature{'s' * (count != 1)} of {sae_name(clamp.clamp)}"
        )
        if (whole := clamp.sae.whole) is not None:
            d_in, d_sae = whole.shape
            part = d_in * d_sae / plan.n_parameters
            lines.append(
                f"topk   the whole encoder, {d_sae:,} features in {clamp.site['dtype']}: "
                f"{n_bytes(whole.shape, whole.dtype) / 1e3:,.1f} kB, and as many multiplications "
                f"at each token, {part:.1%} of the base's"
            )
        fit = plan.fits.get(clamp.layer)
        lines.append(f"fit    {UNMEASURED if fit is None else fit.as_baked}")
    lines.append(
        f"size   {plan.size / 1e6:,.1f} MB, of which the clamp is {plan.clamp_size / 1e3:,.1f} kB"
    )
    return "\n".join(lines)


def bake(
    recipe: RecipePath,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    force: Annotated[bool, typer.Option("--force", help="Replace what bakeout wrote.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, write nothing.")
    ] = False,
    witnesses: Annotated[
        bool | None,
        typer.Option(
            help="Record a few prompts that fire the clamp, with their logits, by running the "
            "model. Default: where the weights are under 1 GB.",
            show_default=False,
        ),
    ] = None,
    unfit: Annotated[
        bool, typer.Option("--unfit", help="Bake SAEs that do not fit; card and verify say so.")
    ] = False,
    device: Device = "cpu",
) -> None:
    """Write a clamped checkpoint: the base's shards byte for byte, and the clamp beside them."""
    if dry_run:
        plan = planned(Recipe.load(recipe), unfit=unfit, device=device)
        check_output(out, inputs=plan.inputs, size=plan.size, force=force)
        for note in notes(plan):
            typer.echo(f"note: {note}", err=True)
        typer.echo(f"{describe_plan(plan)}\nnothing written (--dry-run)")
        return
    plan = bake_recipe(recipe, out, force=force, witnesses=witnesses, unfit=unfit, device=device)
    for note in notes(plan):
        typer.echo(f"note: {note}", err=True)
    typer.echo(f"{describe_plan(plan)}\nwritten to {out}")
