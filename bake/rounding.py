"""One rounding: how large it is in each format, and a tensor of which every number is rounded
once more.

Two sound computations of the same model differ by how their processors, thread counts and kernels
round. How far that may move a logit is no constant but a property of model and prompt, so it is
measured: the model's own numbers are disturbed by one rounding, and what that does to its logits
is the scale by which everything else is judged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

EPSILON = {
    "float32": 2.0**-24,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
    "int8": 2.0**-8,
    "int4": 2.0**-4,
}
"""Largest relative error of one rounding. Of blocks of integers: half a step, against the largest
number of the block."""
DRAWS = 4
"""How often a model is disturbed at random; the largest effect of them counts."""
BAR = 8.0
"""How many times the effect of one rounding a sound computation's distance may be, at any token.
Sound ones were measured at up to 4, whatever the processor; faults are hundreds of times larger."""

MIN_EFFECT = 0.5
"""How much of the clamp's effect on the witnesses an engine must show, 1 being all of it."""

LOADS: dict[str, tuple[str, int | None]] = {
    "float32": ("float32", None),
    "bfloat16": ("bfloat16", None),
    "float16": ("float16", None),
    "8-bit weights": ("float32", 8),
    "4-bit weights": ("float32", 4),
}
"""Ways in which loaders take a folder, whatever it is stored in: dtype, and to how many bits they
round the matrices of decoder layers."""
WORDS = SAME, ROUNDS, LOUD, BASE_LIKE = "same", "rounds", "breaks loudly", "silently base-like"
REFUSES, UNTRIED = "refuses", "not measured"
"""Of what does not load so, or does not run; and of what memory or time ran out for."""
_SAME, _LOUD = 1e-5, 1.0
"""How far from the hook is no distance, and how far from hook and base is neither; in nats per
token, or of the length of a residual stream."""


def load_word(to_hook: float, to_base: float, effect: float) -> str:
    """What became of a clamp as a folder was loaded: one of the four words.

    Args:
        to_hook: distance to the hooked reference.
        to_base: distance to the base.
        effect: share of the clamp's effect that is shown, 1 being all of it.
    """
    if not (math.isfinite(to_hook) and math.isfinite(to_base)) or min(to_hook, to_base) >= _LOUD:
        return LOUD
    if to_base < to_hook and not effect >= MIN_EFFECT:
        return BASE_LIKE
    return SAME if to_hook <= _SAME else ROUNDS


def rounded_to_integers(weight: Tensor, bits: int) -> Tensor:
    """To the nearest of 2^bits - 1 evenly spaced numbers for each row: symmetric, round to nearest.

    Args:
        weight: [out, in].
        bits: 2 at least.
    """
    import torch

    most = 2 ** (bits - 1) - 1
    wide = weight.float()
    step = wide.abs().amax(dim=1, keepdim=True) / most
    whole = (wide / step.clamp(min=torch.finfo(torch.float32).tiny)).round()
    rounded: Tensor = (whole * step).to(weight.dtype)
    return rounded


def coarsen(layers: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Change every matrix of some decoder layers in place, those of experts among them; buffers, as
    a clamp's are, are none.
    """
    import torch

    with torch.no_grad():
        for weight in layers.parameters():
            if weight.ndim >= 2:
                weight.copy_(change(weight.flatten(0, -2)).view_as(weight))


def disturbed(h: Tensor, generator: Generator, epsilon: float) -> Tensor:
    """A tensor of which every number is off by one rounding, up or down at random.

    Args:
        h: any shape, float32, bfloat16 or float16.
        generator: of the CPU, so that a seed gives the same on every device.
        epsilon: the relative size of the rounding; of `EPSILON`, not less than the dtype's own.
    """
    import torch

    # A random bit of every byte; in float32 each product is exact, so that all is rounded once.
    words = torch.empty(-(-h.numel() // 8), dtype=torch.int64).random_(generator=generator)
    bits = words.view(torch.int8)[: h.numel()].bitwise_and_(1).view(h.shape)
    steps = bits.to(h.device).float().mul_(2 * epsilon).sub_(epsilon)
    wide = h.float()
    return torch.addcmul(wide, wide, steps).to(h.dtype)


def disturbed_part(
    part: nn.Module, x: Tensor, y: Tensor, generator: Generator, epsilon: float
) -> Tensor:
    """What one of `rounding_parts` gives, off by one rounding.

    An activation is computed as x/2 (1 + tanh …): where x is far below 0, all that is left of the
    sum is how it was rounded, and a norm behind it makes that as large as anything.

    Args:
        part: of a decoder layer.
        x: what it is given.
        y: what it gives.
        generator: as `disturbed` has it, like epsilon.
        epsilon: the relative size of the rounding.
    """
    moved = disturbed(y, generator, epsilon)
    if type(part).__module__ != "transformers.activations":
        return moved
    wide = x.float()
    return (moved + (disturbed(wide, generator, EPSILON["float32"]) - wide) / 2).to(y.dtype)


def rounding_parts(layer: nn.Module) -> list[nn.Module]:
    """The parts of a decoder layer whose outputs every computation rounds: its matrices, its norms,
    the layer itself, and of a Gemma 4 the activation of its per-layer input, which is normed.
    """
    from torch import nn

    return [
        part
        for part in layer.modules()
        if part is layer
        or isinstance(part, nn.Linear)
        or type(part).__name__.endswith("RMSNorm")
        or part is getattr(layer, "act_fn", None)
    ]


def epsilon_of(dtype: object) -> float:
    """The relative size of one rounding in a torch dtype, or one by name."""
    return EPSILON[str(dtype).removeprefix("torch.")]
