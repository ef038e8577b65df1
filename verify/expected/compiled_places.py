"""Where the layers of a compiled folder stand: the base's, those of clamps, and idle ones.

Each of the base's layers stands where runtimes that count layers find one of its kind: every p-th
sees all. What is missing until then are layers that do nothing. A Gemma 4's are not counted: what
is new is of the kind of the base's layer behind it. Derived here anew, without `export`'s own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bake.base import BaseModel
from bake.errors import ModelError, printable, short
from bake.families import Family

_ALL, _WINDOW = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Places:
    """Numbers of layers in the folder."""

    base: list[int]
    """By the base's own numbers."""
    clamps: list[tuple[int, int]]
    """The two layers of every clamp, ascending."""
    idle: list[int]
    types: list[str]
    """Kinds of attention of all; empty where the family has one kind."""
    period: int | None = None
    """p; None where the base's kinds follow none."""

    @property
    def clamping(self) -> list[int]:
        """All layers of clamps."""
        return [layer for pair in self.clamps for layer in pair]

    @property
    def n_layers(self) -> int:
        """Of the folder."""
        return len(self.base) + len(self.clamping) + len(self.idle)

    def like(self, number: int) -> int:
        """Which of the base's layers one is shaped like: itself, the next, or the last."""
        return min(sum(place < number for place in self.base), len(self.base) - 1)


def stock_config(base: BaseModel) -> Any:
    """A base's config as stock transformers reads it, whatever code it names.

    Raises:
        ModelError: it cannot read it.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            base.folder, trust_remote_code=False, local_files_only=True
        )
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise ModelError(
            f"base model {base.name}: transformers cannot read its config.json "
            f"({printable(short(' '.join(str(error).split())))}); expected a Gemma's"
        ) from error


def compiled_places(base: BaseModel, clamped: Sequence[int]) -> Places:
    """What follows from a base and which of its layers are clamped, ascending."""
    stock = stock_config(base)
    types = list(getattr(stock, "layer_types", None) or ())
    period = _period(types, base.family)
    places = Places([], [], [], [], period)
    left = deque(range(int(stock.num_hidden_layers)))
    place = 0
    while left:
        layer = left[0]
        if period is not None and _counted(place, period) != types[layer]:
            places.idle.append(place)
            place += 1
            continue
        left.popleft()
        places.base.append(place)
        place += 1
        if layer in clamped:
            places.clamps.append((place, place + 1))
            place += 2
    if types and period is not None:
        places.types.extend(_counted(number, period) for number in range(place))
    elif types:
        places.types.extend(types[places.like(number)] for number in range(place))
    return places


def _counted(place: int, period: int) -> str:
    return _WINDOW if (place + 1) % period else _ALL


def _period(types: Sequence[str], family: Family) -> int | None:
    """The family's own p where the kinds follow it, else the least that they follow."""
    if family.scaled:
        return None
    see_all = [place for place, kind in enumerate(types) if kind == _ALL]
    tried = [p for p in (family.period, *range(1, len(types) + 1)) if p]
    found = (p for p in tried if see_all == list(range(p - 1, len(types), p)))
    return next(found, None) if types else None
