"""Where the base's layers and the new ones stand in a compiled folder.

Two layers follow every clamped one. Some runtimes do not read `layer_types` but count: every p-th
layer sees all, the others a window, with another rotary base in Gemma 3. So each of the base's
layers has to stand where a layer of its kind is counted, and layers that do nothing are put in
before it until it does: none for Gemma 2 (p = 2), four a clamp for Gemma 3 (p = 6), fewer where two
clamps have no layer between them that sees all. Nobody counts a Gemma 4's: a new layer is of the
kind of the base's next one, or of the last, whose heads it has, and which has to see all.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bake.families import layer_period, own_heads
from export.clamped import Clamped

PER_SITE = 2
"""Decoder layers that a clamp becomes."""
WINDOW, ALL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Layout:
    """Numbers in the compiled folder."""

    base: tuple[int, ...]
    """Of the base's layers."""
    sites: tuple[tuple[int, int], ...]
    """Of the two layers of every clamp, by layer."""
    idle: tuple[int, ...]
    """Of those that do nothing."""
    types: tuple[str, ...]
    """Kinds of attention, by number; none where the family has one kind."""
    period: int | None
    """p, which the kinds follow; None where they follow none."""

    @property
    def n_layers(self) -> int:
        """All of them."""
        return len(self.base) + PER_SITE * len(self.sites) + len(self.idle)

    @property
    def added(self) -> int:
        """How many the base does not have."""
        return self.n_layers - len(self.base)

    def like(self, number: int) -> int:
        """The base's layer that a layer is shaped like: itself, the next, or the last."""
        return min(bisect_left(self.base, number), len(self.base) - 1)


def layout_of(source: Clamped) -> Layout:
    """The layout of what a checkpoint is compiled into."""
    config = source.base_config
    types = list(config.get("layer_types") or ())
    counted = bool(types) and not source.family.scaled
    period = layer_period(types, source.family) if counted else None
    sites = [site.layer for site in source.sites]
    return place_layers(int(config["num_hidden_layers"]), sites, types, period)


def place_layers(
    n_layers: int, clamped: Sequence[int], types: Sequence[str], period: int | None
) -> Layout:
    """Place layers one after another.

    Args:
        n_layers: of the base.
        clamped: those with a clamp, ascending.
        types: kinds of the base's layers; empty where it has one kind.
        period: p; None where the kinds follow none, or nobody counts, and are kept as listed.
    """

    def counted(place: int) -> str:
        return ALL if period is not None and place % period == period - 1 else WINDOW

    base: list[int] = []
    sites: list[tuple[int, int]] = []
    idle: list[int] = []
    kinds: list[str] = []
    for layer in range(n_layers):
        kind = types[layer] if types else WINDOW
        while period is not None and counted(len(kinds)) != kind:
            idle.append(len(kinds))
            kinds.append(counted(len(kinds)))
        base.append(len(kinds))
        kinds.append(kind)
        if layer in clamped:
            sites.append((len(kinds), len(kinds) + 1))
            new = [counted(len(kinds)), counted(len(kinds) + 1)]
            kinds += [types[min(layer + 1, n_layers - 1)]] * 2 if types and not period else new
    return Layout(tuple(base), tuple(sites), tuple(idle), tuple(kinds if types else ()), period)


def heads_by_layer(config: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """What a Gemma 4's config.json states of the heads of single layers, by where these stand now;
    nothing where it states none.
    """
    if not config.get("per_layer_config"):
        return {}
    each = {number: own_heads(config, layout.like(number)) for number in range(layout.n_layers)}
    return {"per_layer_config": {str(number): own for number, own in each.items() if own}}
