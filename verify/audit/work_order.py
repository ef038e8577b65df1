"""An audit under way: what attacks have at hand to make attempts, once each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from pydantic import TypeAdapter

from verify.audit.attempts import OPEN, Attempt, Lead, Scores, Settings
from verify.audit.levels import Level
from verify.audit.subject import Subject
from verify.audit.workers import Job, Workers
from verify.journal import Journal, Progress

_ATTEMPTS = TypeAdapter(list[Attempt])


@dataclass(frozen=True)
class Work:
    """One subject under attack."""

    subject: Subject
    number: int
    """Of the subject among those of the pool."""
    workers: Workers
    journal: Journal
    tell: Progress
    """Told the share of the attack under way that is done, 0 to 1."""
    seeds: tuple[int, ...]
    """Each holds out another part of the facts."""
    level: Level
    """How much is tried."""
    lead: Lead
    """By what it is told what came back."""
    before: Scores = field(default_factory=Scores)
    """The subject's own."""

    def each(
        self, job: Job, settings: Sequence[Settings], part: tuple[float, float] = (0.0, 1.0)
    ) -> list[list[Attempt]]:
        """The attempts of a job for each of several settings, side by side; what the journal has is
        not made again.

        Args:
            job: a function of a module.
            settings: JSON data; the same settings always mean the same attempts. What takes longest
                should be first.
            part: where the share of the attack begins and ends that this is, for progress.
        """
        begin, end = part

        by = f"{self.lead} " if self.lead == OPEN else ""
        names = [f"{by}{job.__module__}.{job.__name__} {json.dumps(of)}" for of in settings]
        left = [n for n, name in enumerate(names) if not self.journal.has(name)]
        self.tell(job.__name__, end - (end - begin) * len(left) / max(1, len(names)))
        made = self.workers.each(self.number, job, [settings[n] for n in left], self.lead)
        for done, (place, attempts) in enumerate(made, 1 + len(names) - len(left)):
            self.journal.once(names[left[place]], partial(list, attempts))
            self.tell(job.__name__, begin + (end - begin) * done / len(names))
        return [_ATTEMPTS.validate_python(self.journal.once(name, list)) for name in names]
