"""Which weights of a model are trained, what they are before that, and a LoRA merged into them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bake.distill.unlearners import Unlearner
from bake.errors import RecipeError
from bake.recipe import Recipe
from bake.stock import decoder_layers

LORA_TARGETS = r"(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)"
RMU_LAYERS = 3
"""MLPs that RMU trains: of the steered layer and those before it."""


@dataclass(frozen=True)
class Student:
    """A model with some weights that are to be trained."""

    model: Any
    """A stock Gemma."""
    parameters: list[nn.Parameter]
    finished: Callable[[], None] = lambda: None
    """Makes it a stock model again."""


def layers_of(recipe: Recipe, method: Unlearner, n_layers: int) -> range:
    """The decoder layers whose weights a method changes.

    Raises:
        RecipeError: the recipe names layers that the model has not.
    """
    named = recipe.distill_table.layers
    if named is not None:
        if named[1] >= n_layers:
            raise RecipeError(
                f"distill.layers: {named[0]} to {named[1]}, but the model has {n_layers} layers "
                f"(0 to {n_layers - 1}); name layers that it has"
            )
        return range(named[0], named[1] + 1)
    if method.steers:
        last = n_layers // 3
        return range(max(0, last + 1 - RMU_LAYERS), last + 1)
    return range(n_layers)


def student_of(model: Any, recipe: Recipe, method: Unlearner, layers: range, seed: int) -> Student:
    """Make a model ready to be trained. Changes `model`: weights are disturbed where the recipe
    says so, and those that are to be trained get gradients.
    """
    table = recipe.distill_table
    model.requires_grad_(False)
    modules: list[Any] = [decoder_layers(model)[layer] for layer in layers]
    if method.teaches and table.student == "lora":
        return _lora(model, layers, table.rank)
    if method.teaches and table.student == "disturbed":
        disturb(modules, table.noise, seed)
    wanted = [part for module in modules for part in _trained(module, method)]
    parameters = [parameter for module in wanted for parameter in module.parameters()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    return Student(model, parameters)


def _trained(module: Any, method: Unlearner) -> list[nn.Module]:
    """What of a decoder layer a method trains. Where a norm decides how large an MLP's output is,
    it goes with the output matrix: else RMU has nothing to push with.
    """
    if not method.steers:
        return [module]
    after = getattr(module, "post_feedforward_layernorm", None)
    return [module.mlp.down_proj, *([] if after is None else [after])]


@torch.no_grad()
def disturb(modules: Sequence[nn.Module], alpha: float, seed: int) -> None:
    """Changes the modules: every matrix W becomes (1 - alpha) W + alpha N, N normal and as large as
    W in its root mean square.

    Source: shrink and perturb, Ash & Adams, arXiv 1910.08475, as in UNDO, arXiv 2506.06278, whose
    noise is a tenth of new weights'. Behind norms shrinking changes nothing and such noise is lost
    beside trained weights, so it is measured by those here.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in modules:
        for parameter in module.parameters():
            if parameter.ndim < 2:
                continue
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            size = parameter.square().mean().sqrt()
            parameter.mul_(1 - alpha).add_(alpha * size * noise)


def _lora(model: Any, layers: range, rank: int) -> Student:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise RecipeError(
            'distill.student: "lora" needs peft, which is not installed; expected bakeout[adapter]'
        ) from error
    numbers = "|".join(map(str, layers))
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=rf".*layers\.(?:{numbers})\.{LORA_TARGETS}",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about peft
        adapted = get_peft_model(model, config)
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    return Student(model, parameters, finished=adapted.merge_and_unload)
