"""Attack: round the weights, or drop the smallest: what was changed little may round away.

Every matrix of every decoder layer is changed, as quantisers do it; embedding, head and norms stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from bake.rounding import coarsen, rounded_to_integers
from bake.stock import decoder_layers
from verify.audit.attempts import Attempt, Settings
from verify.audit.target import Target
from verify.audit.work_order import Work

PRUNED = (0.1, 0.3, 0.5)
"""Shares of each matrix's weights that are dropped."""


def rounded_to_float16(weight: Tensor) -> Tensor:
    """To the nearest number of float16."""
    return weight.half().to(weight.dtype)


def pruned(weight: Tensor, share: float) -> Tensor:
    """Without its smallest numbers.

    Args:
        weight: [out, in].
        share: of the numbers that become 0.
    """
    sizes = weight.float().abs().flatten()
    n = round(share * len(sizes))
    kept = torch.ones_like(sizes)
    kept[sizes.argsort(stable=True)[:n]] = 0
    return weight * kept.view_as(weight).to(weight.dtype)


ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "fp16": rounded_to_float16,
    "int8": partial(rounded_to_integers, bits=8),
    "int4": partial(rounded_to_integers, bits=4),
    **{f"{share:.0%} pruned": partial(pruned, share=share) for share in PRUNED},
}
"""What is done to a matrix, by name."""
QUICK = ("int4", "30% pruned")
"""What is tried where there is little time."""


# --------------------------------------------------------------------------- in an audit


def rounding(work: Work) -> Iterator[Attempt]:
    """Every entry of `ROUNDINGS`."""
    names = [name for name in ROUNDINGS if not work.level.quick or name in QUICK]
    for found in work.each(coarse, [{"to": n, "brief": work.level.quick} for n in names]):
        yield from found


def coarse(target: Target, settings: Settings) -> list[Attempt]:
    """One of them."""
    name = settings["to"]
    model = target.subject.model()
    coarsen(decoder_layers(model), ROUNDINGS[name])
    is_pruned = name.endswith("pruned")
    does = f"drops the smallest {name.split()[0]} of every matrix" if is_pruned else ""
    return [
        Attempt(
            "rounding: pruning" if is_pruned else "rounding: fewer bits",
            does or f"rounds the weights to {name}",
            target.score(model, brief=settings["brief"]),
            settings={"to": name},
        )
    ]
