"""How far a student is from its teachers, on texts that it was not trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bake.distill.distill_texts import Rows
from bake.distill.objectives import Head, mean_kl
from bake.distill.teachers import ROWS_AT_ONCE, Teacher, head_of, read
from bake.files.halving import in_halves

MOST_ROWS = 128
"""Pieces of held-out texts of each side that are looked at, at most."""


@dataclass(frozen=True)
class HeldOut:
    """How far a student is from its teachers."""

    forget_kl: float
    """From the clamped model on forget texts, in nats per token; from the base where the clamped
    model did not teach."""
    retain_kl: float
    """From the base on retain texts, likewise."""
    forget_tokens: int
    retain_tokens: int


@dataclass(frozen=True)
class Judge:
    """A side's held-out texts, and what the teacher says to them."""

    rows: Rows
    teacher: Teacher
    head: Head
    """The teacher's."""

    @torch.no_grad()
    def distance(self, model: Any) -> tuple[float, int]:
        """(mean KL of a model from the teacher in nats per token, tokens)."""
        numbers = judged(self.rows)

        def apart(rows: slice) -> tuple[float, int]:
            some = numbers[rows]
            final = read(model, *self.rows.batch(some).padded(model.device), []).final
            wanted = self.teacher.seen(some, model.device).final
            return float(mean_kl(wanted, self.head, final, head_of(model))) * len(final), len(final)

        found = in_halves(model, "judging", apart, len(numbers), most=ROWS_AT_ONCE)
        n = sum(of for _, of in found)
        return sum(kl for kl, _ in found) / n, n


def judged(rows: Rows) -> range:
    """The rows that are looked at."""
    return range(min(MOST_ROWS, len(rows.ids)))


def held_out(model: Any, judges: Mapping[str, Judge]) -> HeldOut:
    """A model's distance from the teachers of both sides."""
    (forget, n_forget), (retain, n_retain) = (
        judges[side].distance(model) for side in ("forget", "retain")
    )
    return HeldOut(forget, retain, n_forget, n_retain)
