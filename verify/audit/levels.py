"""How much an audit tries."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Level:
    """How much is tried."""

    name: str
    quick: bool
    """Fewer settings."""
    most_steps: int
    """Of training."""


LEVELS = (Level("full", False, 500), Level("short", False, 150), Level("quick", True, 50))
"""From the most to the least."""


def tried(level: str) -> str:
    """What a level of an audit's report means; its name where nobody knows it."""
    known = {of.name: of for of in LEVELS}.get(level)
    if known is None:
        return level
    return f"{'a few settings' if known.quick else 'every setting'}, up to {known.most_steps} steps"
