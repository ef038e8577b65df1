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

_CHUNK_BYTES = 2 << 20
"""How much of the logits is looked at at once: so much that every step finds it in the processor's
cache, which is worth more than all else."""
_CLOSE = 0.05
"""Logits of which none differs by more, but for what all of them share, are compared in float32."""


def kl_nats(reference: Tensor, engine: Tensor) -> Tensor:
    """KL(reference ‖ engine) of next-token distributions.

    Where the two are close, by the series of what it is, the mean of exp(c) - 1 - c for the centred
    differences c: exact to some digits however small it is, and several times as fast as the
    difference of two logarithms in float64, which is taken elsewhere.

    Args:
        reference: [n, vocab] logits.
        engine: [n, vocab] logits.

    Returns:
        [n] float64, nats.
    """
    import torch

    p = reference.float().softmax(dim=-1)
    c = engine.float() - reference.float()
    c -= (p * c).sum(dim=-1, keepdim=True)
    close = torch.maximum(c.amax(dim=-1), -c.amin(dim=-1)) < _CLOSE  # false where one is NaN
    c = c if bool(close.all()) else c.masked_fill(~close[:, None], 0.0)
    terms = c * (1 / 24) + 1 / 6
    terms = terms.mul_(c).add_(1 / 2).mul_(c).mul_(c)
    kl = terms.mul_(p).sum(dim=-1).double().log1p()
    if not bool(close.all()):
        log_p = reference[~close].double().log_softmax(dim=-1)
        log_q = engine[~close].double().log_softmax(dim=-1)
        kl[~close] = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    return kl


def max_abs_difference(reference: Tensor, engine: Tensor) -> Tensor:
    """Largest |Δlogit| of every token: [n, vocab] twice → [n]; infinite where not finite."""
    largest = (engine - reference).abs_().amax(dim=-1)
    return largest.nan_to_num(nan=math.inf, posinf=math.inf)


@dataclass(frozen=True)
class Compared:
    """Two engines' logits at some tokens: [n] each."""

    places: Tensor
    """[n, 2]: row and column in the logits."""
    kl: Tensor
    """float64, nats."""
    distance: Tensor
    """Largest |Δlogit|."""
    same_top1: Tensor
    """bool: both put the same token first."""
    largest: Tensor
    """Largest |logit| of the first."""


def compare_logits(reference: Tensor, engine: Tensor, counted: Tensor) -> Compared:
    """Two engines' logits, a few tokens at a time.

    Args:
        reference: [batch, seq, vocab].
        engine: [batch, seq, vocab].
        counted: [batch, seq], not 0 at the tokens that are compared.
    """
    import torch

    if reference.shape != engine.shape:
        raise ValueError(
            f"logits have shape {list(engine.shape)}; the reference's have {list(reference.shape)}"
        )
    places = counted.nonzero()
    at_once = max(1, _CHUNK_BYTES // (4 * reference.shape[-1]))
    parts = []
    for start in range(0, len(places), at_once):
        rows, columns = places[start : start + at_once].unbind(-1)
        ours, theirs = reference[rows, columns], engine[rows, columns]
        same = ours.argmax(-1) == theirs.argmax(-1)
        distance = max_abs_difference(ours, theirs)
        parts.append((kl_nats(ours, theirs), distance, same, ours.abs().amax(-1)))
    return Compared(places, *(torch.cat(part) for part in zip(*parts, strict=True)))


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
    ) -> list[Any]:
        """What `add` would take in, as JSON data; changes nothing."""
        last = batch.attention_mask[:, -1:] if batch.last_only else batch.attention_mask
        tokens = compare_logits(reference, engine, last)
        places, differences = tokens.places, tokens.distance
        if batch.last_only:
            places = places + places.new_tensor([0, batch.input_ids.shape[1] - 1])
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
        n_tokens, kl, same_top1, largest_logit, worst, errors, distances = found
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
