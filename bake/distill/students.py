"""Which weights of a model are trained, what they are before that, and a LoRA merged into them."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from bake.distill.distill_texts import SIDES, Texts
from bake.distill.objectives import Head
from bake.distill.teachers import head_of
from bake.distill.unlearners import Unlearner
from bake.errors import DataError, RecipeError
from bake.recipe import Recipe
from bake.stock import decoder_layers

LORA_TARGETS = r"(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)"
RMU_LAYERS = 3
"""MLPs that RMU trains: of the steered layer and those before it."""
TOKEN_SEEN = 3
"""Times that a token of the topic has to be in the forget texts, to be learned anew."""
TOKEN_ELSEWHERE = 0.05
"""How frequent it may be in retain texts, as a share of that."""


@dataclass(frozen=True)
class Student:
    """A model with some weights that are to be trained."""

    model: Any
    """A stock Gemma."""
    parameters: list[nn.Parameter]
    head: Callable[[], Head]
    """Its output matrix as it is now."""
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


def student_of(
    model: Any,
    recipe: Recipe,
    method: Unlearner,
    layers: range,
    seed: int,
    topic: Sequence[int] = (),
) -> Student:
    """Make a model ready to be trained. Changes `model`: weights are disturbed where the recipe
    says so, and those that are to be trained get gradients.

    Args:
        model: the base, in float32.
        recipe: says what is trained, and how it begins.
        method: of `UNLEARNERS`.
        layers: whose weights are trained.
        seed: of everything that is drawn.
        topic: ids of tokens whose embeddings are learned anew.
    """
    table = recipe.distill_table
    model.requires_grad_(False)
    modules: list[Any] = [decoder_layers(model)[layer] for layer in layers]
    if method.teaches and table.student == "lora":
        student = _lora(model, layers, table.rank)
    else:
        if method.teaches and table.student == "disturbed":
            disturb(modules, table.noise, seed)
        wanted = [part for module in modules for part in _trained(module, method)]
        parameters = [parameter for module in wanted for parameter in module.parameters()]
        for parameter in parameters:
            parameter.requires_grad_(True)
        student = Student(model, parameters, partial(head_of, model))
    return _with_tokens(student, topic, table.token_noise, seed) if topic else student


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
            parameter.copy_(disturbed(parameter, alpha, generator))


def disturbed(weight: Tensor, alpha: float, generator: torch.Generator) -> Tensor:
    """(1 - alpha) W + alpha N, N normal and as large as W in its root mean square."""
    noise = torch.randn(weight.shape, generator=generator).to(weight)
    return (1 - alpha) * weight + alpha * weight.square().mean().sqrt() * noise


def topic_tokens(sides: Mapping[str, Texts]) -> list[int]:
    """Ids of the tokens that forget texts have, and retain texts hardly: what embeddings say of
    them, nothing but the topic needs.

    Raises:
        DataError: there is none.
    """
    counts, shares = {}, {}
    for side in SIDES:
        counts[side] = Counter(chain.from_iterable(sides[side].trained.ids))
        shares[side] = 1 / counts[side].total()
    found = sorted(
        token
        for token, n in counts["forget"].items()
        if n >= TOKEN_SEEN
        and counts["retain"][token] * shares["retain"] <= TOKEN_ELSEWHERE * n * shares["forget"]
    )
    if not found:
        forget, retain = (sides[side].name for side in SIDES)
        raise DataError(
            f"distill.token_noise: every token of {forget} is in {retain} too; expected some that "
            f"are {round(1 / TOKEN_ELSEWHERE)} times as frequent there; leave it out"
        )
    return found


def _with_tokens(student: Student, topic: Sequence[int], alpha: float, seed: int) -> Student:
    """A student that learns some rows of its embedding anew besides, and keeps the rest."""
    model = student.model
    embedding = model.get_input_embeddings()
    was = embedding.weight.detach()
    tokens = torch.tensor(topic, device=was.device)
    generator = torch.Generator().manual_seed(seed + 1)
    mean = was[tokens].mean(0)  # what makes them tokens of the topic, and of no other text
    rows = nn.Parameter(mean + disturbed(was[tokens] - mean, alpha, generator))
    place = torch.full((len(was),), -1, device=was.device)
    place[tokens] = torch.arange(len(tokens), device=was.device)

    def own(module: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        at = place[inputs[0]]
        scale = getattr(module, "embed_scale", 1.0)
        # The gradient of `rows[at]` is summed in another order each time, on several threads.
        new = nn.functional.embedding(at.clamp(min=0), rows)
        return torch.where((at >= 0)[..., None], new * scale, output)

    hook = embedding.register_forward_hook(own)
    tied = model.get_output_embeddings().weight is embedding.weight

    def head() -> Head:
        plain = student.head()
        return replace(plain, tokens=tokens, rows=rows) if tied else plain

    def finished() -> None:
        student.finished()
        hook.remove()
        embedding.weight = nn.Parameter(was.index_copy(0, tokens, rows.detach()))
        if tied:  # teachers keep the old one
            model.get_output_embeddings().weight = embedding.weight

    return Student(model, [*student.parameters, rows], head, finished)


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
    return Student(model, parameters, partial(head_of, model), adapted.merge_and_unload)
