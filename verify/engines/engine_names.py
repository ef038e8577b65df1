"""The engines by name: what each is called for people, and what it claims to compute.

Base and references are listed here; a folder's own engines come from its carrier and from the
precisions of its graphs.
"""

from __future__ import annotations

from dataclasses import dataclass

from export.carriers.carriers import CARRIERS
from export.carriers.onnx.precisions import of_engine


@dataclass(frozen=True)
class Engine:
    """What is known of an engine from its name."""

    title: str
    """For people."""
    held: bool = False
    """It claims to compute the clamp, itself or but for rounding."""
    runs_the_base: bool = False
    """It does the base's own arithmetic where no clamp acts."""
    edge_flips: float = 0.0
    """Share of the answers that may differ at edges of its own."""
    rounding: str | None = None
    """How its weights are rounded, by a key of `bake.rounding.EPSILON`."""
    own: bool = True
    """It is part of a folder."""


ENGINES: dict[str, Engine] = {
    "base": Engine("base", own=False),
    "reference": Engine("hooked reference", runs_the_base=True, own=False),
    "reference-float32": Engine("hooked reference, float32", own=False),
}
"""Those that are no part of a folder."""


def engine_of(name: str) -> Engine:
    """What is known of an engine; of one that is not known, its name."""
    if name in ENGINES:
        return ENGINES[name]
    for carrier in CARRIERS.values():
        if carrier.engine == name:
            return Engine(name, not carrier.trained, carrier.strips, carrier.edge_flips)
    if (precision := of_engine(name)) is not None:
        return Engine(name, held=precision.shared, rounding=precision.rounding)
    return Engine(name)
