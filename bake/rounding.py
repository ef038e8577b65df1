"""One rounding: how large it is in each format, and a tensor of which every number is rounded
once more.

Two sound computations of the same model differ by how their processors, thread counts and kernels
round. How far that may move a logit is no constant but a property of model and prompt, so it is
measured: the model's own numbers are disturbed by one rounding, and what that does to its logits
is the scale by which everything else is judged.
"""

from __future__ import annotations

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


def rounding_parts(layer: nn.Module) -> list[nn.Module]:
    """The parts of a decoder layer whose outputs every computation rounds: its matrices, its norms,
    and the layer itself.
    """
    from torch import nn

    return [
        part
        for part in layer.modules()
        if part is layer or isinstance(part, nn.Linear) or type(part).__name__.endswith("RMSNorm")
    ]


def epsilon_of(dtype: object) -> float:
    """The relative size of one rounding in a torch dtype, or one by name."""
    return EPSILON[str(dtype).removeprefix("torch.")]
