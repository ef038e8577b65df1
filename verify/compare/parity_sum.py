"""An engine against its reference, collected batch by batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from bake.questions.answers import Answers
from bake.questions.multiple_choice import LETTERS, Question
from bake.questions.prompts import Batch, Prompt
from verify.compare.distances import Distances, place_in_prompt, worst_item
from verify.compare.logits import compare_logits
from verify.compare.sensitivity import Nearby
from verify.report.findings import ERROR_EDGES, Flip, Parity, Rounding

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class ParitySum:
    """An engine against the reference, collected batch by batch."""

    n_tokens: int = 0
    of_tokens: int = 0
    """How many it would be, had every token been compared."""
    total_kl: float = 0.0
    same_top1: int = 0
    max_abs_logit: float = -1.0
    largest_logit: float = 0.0
    """Of the reference."""
    worst: tuple[Prompt, int] | None = field(default=None)
    """(prompt, position from BOS)."""
    errors: list[int] = field(default_factory=lambda: [0] * (len(ERROR_EDGES) + 1))
    """Tokens by their largest |Δlogit|, in the bins of `ERROR_EDGES`."""
    distances: Distances | None = None
    """The same against the reference's own sensitivity to rounding, where it is held to that."""

    @property
    def out_of(self) -> int | None:
        """Out of how many tokens those were that were compared; None where it was all of them."""
        return None if self.n_tokens == self.of_tokens else self.of_tokens

    def found(
        self,
        batch: Batch,
        wanted: Tensor,
        reference: Tensor,
        engine: Tensor,
        nearby: Nearby | None = None,
    ) -> list[Any] | None:
        """What two engines' logits say, or of choices their losses, as JSON data; changes nothing.
        None of choices that are not held to rounding.

        Args:
            batch: that they are of.
            wanted: [batch, seq] bool, at which tokens.
            reference: [n, vocab], row by row; of choices [m] nats, of the scored tokens.
            engine: the same.
            nearby: of the batch, where distances are taken.
        """
        if batch.of_choices:
            if self.distances is None or nearby is None:
                return None
            return self.distances.choices_found(batch, reference, engine, nearby)
        tokens = compare_logits(reference, engine)
        places, differences = wanted.nonzero(), tokens.distance
        at = int(differences.argmax())
        bins = np.searchsorted(ERROR_EDGES, differences.numpy(), side="right")
        distances = None
        if self.distances is not None and nearby is not None:
            distances = self.distances.found(batch, places, differences, tokens.kl, nearby)
        return [
            len(places),
            float(tokens.kl.sum()),
            int(tokens.same_top1.sum()),
            float(tokens.largest.max()),
            [*place_in_prompt(batch, *places[at].tolist()), float(differences[at])],
            np.bincount(bins, minlength=len(ERROR_EDGES) + 1).tolist(),
            distances,
        ]

    def take(self, batch: Batch, found: Sequence[Any]) -> None:
        """Take in what `found` gave for a batch."""
        if batch.of_choices:
            assert self.distances is not None
            self.distances.take_choices(batch, found)
            return
        n_tokens, kl, same_top1, largest_logit, worst, errors, distances = found
        self.n_tokens += n_tokens
        self.of_tokens += int(batch.wanted.sum())
        self.total_kl += kl
        self.same_top1 += same_top1
        self.largest_logit = max(self.largest_logit, largest_logit)
        self.errors = [a + b for a, b in zip(self.errors, errors, strict=True)]
        row, position, distance = worst
        if distance > self.max_abs_logit:
            self.max_abs_logit = distance
            self.worst = (batch.prompts[row], position)
        if self.distances is not None:
            self.distances.take(batch, distances)

    def result(
        self,
        *,
        tokens_fired: int,
        flips: Sequence[Flip],
        tokenizer: Any,
        rounding: Rounding | None = None,
    ) -> Parity:
        """The finished comparison."""
        if not self.n_tokens:
            raise ValueError("no token was compared")
        worst = None
        if self.worst is not None:
            worst = worst_item(*self.worst, self.max_abs_logit, tokenizer)
        kl = self.total_kl / self.n_tokens
        return Parity(
            max_abs_logit=self.max_abs_logit,
            largest_logit=self.largest_logit,
            mean_kl=math.inf if math.isnan(kl) else kl,
            top1_agreement=self.same_top1 / self.n_tokens,
            tokens_compared=self.n_tokens,
            of_tokens=self.out_of,
            tokens_fired=tokens_fired,
            worst=worst,
            flips=tuple(flips),
            errors=tuple(self.errors),
            rounding=rounding,
        )


def answer_flips(
    reference: Answers, engine: Answers, questions: Mapping[str, Sequence[Question]]
) -> list[Flip]:
    """Every question that the two answer differently, item by item."""
    return [
        Flip(
            source=source,
            form=form,
            row=questions[source][item].row,
            question=questions[source][item].question,
            reference=LETTERS[letter],
            engine=LETTERS[engine.given[source, form, item]],
            right=LETTERS[questions[source][item].answer],
        )
        for (source, form, item), letter in sorted(reference.given.items())
        if engine.given[source, form, item] != letter
    ]
