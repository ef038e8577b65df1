"""How far a verification is, and how much of it fits into a number of minutes.

What there is to do is counted in token passes: one engine, or a hooked model, reading one token.
The counts are rough; a verification that does not know its machine can say no more.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bake.questions.prompts import Batch
from verify.engines.runners import Runner
from verify.journal import Progress

LOOKED_AT = 0.3
"""Passes of what rounding does, for each token that is compared."""
QUESTION_TOKENS = 100
"""Of a question in one prompt form."""
OPEN_TOKENS = 30
"""Of a prompt that is gone on with, read and written."""
MOST_PARTS = 64
"""A budget leaves at least one in so many."""


@dataclass(frozen=True)
class Amounts:
    """What is shown to whom."""

    shown: int
    """Tokens of everything that all engines are shown."""
    questions: int
    """Tokens of the questions in one prompt form."""
    open_tokens: int
    """Tokens that are read and written where prompts are gone on with, by one engine."""
    engines: int
    """The folder's own, the base and the references."""
    controls: int = 3


class Pace:
    """Progress over all stages: each is given with the share of everything that is done.

    Args:
        tell: called with the stage and that share, 0 to 1, which never falls.
        passes: per stage, in order, how many token passes it takes.
    """

    def __init__(self, tell: Progress, passes: Mapping[str, float]) -> None:
        self._tell, self._passes = tell, passes
        self._reached = 0.0

    def __call__(self, stage: str, share: float) -> None:
        """See `verify.journal.Progress`; a stage without passes is shown where the last one was."""
        if stage in self._passes:
            names = list(self._passes)
            before = sum(self._passes[name] for name in names[: names.index(stage)])
            done = before + share * self._passes[stage]
            self._reached = max(self._reached, done / max(1.0, sum(self._passes.values())))
        self._tell(stage, self._reached)


def tokens_per_second(runner: Runner, batches: Sequence[Batch]) -> float:
    """How fast an engine reads a batch, logits of every token included; 0 without batches."""
    for batch in batches[:1]:
        took = []
        for _ in range(2):  # the first time costs more than reading
            start = time.perf_counter()
            runner.logits(batch.input_ids, batch.attention_mask, batch.attention_mask.bool())
            took.append(time.perf_counter() - start)
        return int(batch.attention_mask.sum()) / max(min(took), 1e-9)
    return 0.0


def parts_within(minutes: float, passes: float, rate: float) -> int:
    """Of everything, one in so many is asked within a budget: a power of two.

    Args:
        minutes: the budget.
        passes: of everything.
        rate: token passes a second.
    """
    parts = 1
    while passes / parts > 60 * minutes * rate and parts < MOST_PARTS:
        parts *= 2
    return parts
