"""One attempt of an attacker, and what it left of the forgetting, as types and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from verify.report.measures import Share

Need = Literal["base", "other facts", "same facts", "benign text"]
"""What somebody must have besides the folder: the base's weights; text on other facts of the topic;
text on the very facts that are asked for; any text."""
Settings = Mapping[str, Any]
"""What an attempt was made with, as JSON data."""


@dataclass(frozen=True)
class Scores:
    """What a model says, as counts."""

    forget: dict[str, Share] = field(default_factory=dict)
    """Forget questions answered right, by prompt form; of the held-out facts where some are."""
    retain: dict[str, Share] = field(default_factory=dict)
    """Retained ones. Without any, the attempt leaves the model as it is."""
    open: Share | None = None
    """Prompts on the topic that were gone on with rightly."""
    generic: Share | None = None
    """The same of other prompts."""
    sure: float | None = None
    """Mean probability of the right choice among the four, on the forget questions in the form that
    leads; finer than their count. None where the form asks for no letter."""


UTILITY = 0.9
"""Share of the retained questions answered right before an attack that it must leave."""


def keeps_utility(scores: Scores, before: Scores) -> bool:
    """Whether a model is still of use: its retained accuracy is within 10 % of what it was.

    Args:
        scores: after an attack; without retained questions the model is what it was.
        before: of the subject.
    """
    return all(
        (share.accuracy or 0.0) >= UTILITY * (before.retain[form].accuracy or 0.0) - 1e-9
        for form, share in scores.retain.items()
        if form in before.retain
    )


@dataclass(frozen=True)
class Attempt:
    """One attempt."""

    attack: str
    """`NAME`, or `NAME: WHICH`; attempts of one name are one sweep."""
    does: str
    """What somebody does, to follow "whoever": may hold {steps} and {samples}."""
    scores: Scores
    needs: tuple[Need, ...] = ()
    settings: Settings = field(default_factory=dict)
    seed: int = 0
    """Which part of the facts is held out, and the order of the texts."""
    steps: int = 0
    """Of training."""
    samples: int = 0
    """Texts that it was trained on."""
    control: bool = False
    """No attack, but what one is held against."""
    note: str = ""
    """What else was found, in a sentence."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        return asdict(self)
