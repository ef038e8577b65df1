"""Parity: does an engine give the logits that the hooked reference gives?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from verify.choices import Answers
from verify.distances import Distances, Nearby, place_in_prompt, worst_item
from verify.prompts import Batch, Prompt
from verify.questions import LETTERS, Question
from verify.report import ERROR_EDGES, Flip, Parity, Rounding

if TYPE_CHECKING:
    from torch import Tensor

_CHUNK_BYTES = 64 << 20
"""How much of the logits is held as float64 at once."""


def kl_nats(reference: Tensor, engine: Tensor) -> Tensor:
    """KL(reference ‖ engine) of next-token distributions.

    Args:
        reference: [n, vocab] logits.
        engine: [n, vocab] logits.

    Returns:
        [n] float64, nats.
    """
    log_p = reference.double().log_softmax(dim=-1)
    log_q = engine.double().log_softmax(dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def max_abs_difference(reference: Tensor, engine: Tensor) -> Tensor:
    """Largest |Δlogit| of every token: [n, vocab] twice → [n]; infinite where not finite."""
    largest = (engine - reference).abs().amax(dim=-1)
    return largest.nan_to_num(nan=math.inf, posinf=math.inf)


@dataclass
class ParitySum:
    """An engine against the reference, collected batch by batch."""

    n_tokens: int = 0
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
    """The same against the reference's own sensitivity to rounding."""

    def add(
        self, batch: Batch, reference: Tensor, engine: Tensor, nearby: Nearby | None = None
    ) -> None:
        """Take in both sides' logits of a batch: [batch, seq or 1, vocab] each."""
        self.take(batch, self.found(batch, reference, engine, nearby))

    def found(
        self, batch: Batch, reference: Tensor, engine: Tensor, nearby: Nearby | None = None
    ) -> list[list[Any]]:
        """What `add` would take in, part by part, as JSON data; changes nothing."""
        if reference.shape != engine.shape:
            raise ValueError(
                f"logits have shape {list(engine.shape)}; the reference's have "
                f"{list(reference.shape)}"
            )
        last = batch.attention_mask[:, -1:] if batch.last_only else batch.attention_mask
        places = last.nonzero()  # [n, 2]: row, column
        chunk = max(1, _CHUNK_BYTES // (8 * reference.shape[-1]))
        parts = []
        for start in range(0, len(places), chunk):
            part = places[start : start + chunk]
            rows, columns = part.unbind(-1)
            sides = reference[rows, columns], engine[rows, columns]
            if batch.last_only:
                part = part + part.new_tensor([0, batch.input_ids.shape[1] - 1])
            parts.append(self._found_tokens(batch, part, *sides, nearby))
        return parts

    def take(self, batch: Batch, found: Sequence[Sequence[Any]]) -> None:
        """Take in what `found` gave for a batch."""
        for n_tokens, kl, same_top1, largest_logit, worst, errors, distances in found:
            self.n_tokens += n_tokens
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

    def _found_tokens(
        self,
        batch: Batch,
        places: Tensor,
        reference: Tensor,
        engine: Tensor,
        nearby: Nearby | None,
    ) -> list[Any]:
        """The same of some tokens: [n, 2] (row, column) in the batch, [n, vocab] twice."""
        kl = kl_nats(reference, engine)
        differences = max_abs_difference(reference, engine)
        bins = np.searchsorted(ERROR_EDGES, differences.cpu().numpy(), side="right")
        at = int(differences.argmax())
        distances = None
        if self.distances is not None and nearby is not None:
            distances = self.distances.found(batch, places, differences, kl, nearby)
        return [
            len(places),
            float(kl.sum()),
            int((reference.argmax(-1) == engine.argmax(-1)).sum()),
            float(reference.abs().max()),
            [*place_in_prompt(batch, *places[at].tolist()), float(differences[at])],
            np.bincount(bins, minlength=len(ERROR_EDGES) + 1).tolist(),
            distances,
        ]

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
