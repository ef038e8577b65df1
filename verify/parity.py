"""Parity: does an engine give the logits that the hooked reference gives?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from verify.choices import Answers
from verify.prompts import Batch, Prompt
from verify.questions import LETTERS, Question
from verify.report import ERROR_EDGES, EngineReport, Failure, Flip, Parity, WorstItem

if TYPE_CHECKING:
    from torch import Tensor

MAX_ABS_LOGIT = 1e-4
"""Bar in float32; together with no answer flips."""
ROUNDING = 1e-5
"""The same as a share of the largest |logit|, where that is more. A float32 reference is itself
that far from the same model in float64 (the miniature: 3e-6 of logits up to 30), and no engine
rounds as another does."""
MEAN_KL = 1e-3
"""Bar in bfloat16 and float16, in nats per token; answer flips are listed, not barred."""
MORE_REMEMBERED = 0.05
"""Bar for rounded weights: how far forget accuracy may be above the reference's."""
COMPILED_KL = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-2}
"""Bars for a carrier that is exact but for rounding, by dtype, in nats per token. A 16-bit one
rounds every layer's input once more, and a feature at its threshold falls either way."""
COMPILED_FLIPS = {"float32": 0.0, "bfloat16": 0.02, "float16": 0.02}
"""Share of the questions that it may answer otherwise, by dtype; but always one in 16 bits."""
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

    def add(self, batch: Batch, reference: Tensor, engine: Tensor) -> None:
        """Take in both sides' logits of a batch: [batch, seq or 1, vocab] each."""
        if reference.shape != engine.shape:
            raise ValueError(
                f"logits have shape {list(engine.shape)}; the reference's have "
                f"{list(reference.shape)}"
            )
        last = batch.attention_mask[:, -1:] if batch.last_only else batch.attention_mask
        places = last.nonzero()  # [n, 2]: row, column
        chunk = max(1, _CHUNK_BYTES // (8 * reference.shape[-1]))
        for start in range(0, len(places), chunk):
            part = places[start : start + chunk]
            rows, columns = part.unbind(-1)
            self._add_tokens(batch, part, reference[rows, columns], engine[rows, columns])

    def found(self, batch: Batch, reference: Tensor, engine: Tensor) -> list[Any]:
        """What `add` would take in, as JSON data; changes nothing."""
        part = ParitySum()
        part.add(batch, reference, engine)
        worst = None
        if part.worst is not None:
            worst = [batch.prompts.index(part.worst[0]), part.worst[1]]
        numbers = [part.n_tokens, part.total_kl, part.same_top1]
        return [*numbers, part.max_abs_logit, part.largest_logit, worst, part.errors]

    def take(self, batch: Batch, found: Sequence[Any]) -> None:
        """Take in what `found` gave for a batch."""
        n_tokens, total_kl, same_top1, max_abs_logit, largest_logit, worst, errors = found
        self._count(errors)
        self.n_tokens += n_tokens
        self.total_kl += total_kl
        self.same_top1 += same_top1
        self.largest_logit = max(self.largest_logit, largest_logit)
        if worst is not None and max_abs_logit > self.max_abs_logit:
            self.max_abs_logit = max_abs_logit
            self.worst = (batch.prompts[worst[0]], worst[1])

    def _add_tokens(self, batch: Batch, places: Tensor, reference: Tensor, engine: Tensor) -> None:
        self.n_tokens += len(places)
        self.total_kl += float(kl_nats(reference, engine).sum())
        self.same_top1 += int((reference.argmax(-1) == engine.argmax(-1)).sum())
        self.largest_logit = max(self.largest_logit, float(reference.abs().max()))
        differences = max_abs_difference(reference, engine)
        bins = np.searchsorted(ERROR_EDGES, differences.cpu().numpy(), side="right")
        self._count(np.bincount(bins, minlength=len(ERROR_EDGES) + 1).tolist())
        at = int(differences.argmax())
        if float(differences[at]) > self.max_abs_logit:
            self.max_abs_logit = float(differences[at])
            row, column = (int(index) for index in places[at])
            prompt = batch.prompts[row]
            real = len(prompt.ids)
            position = real - 1 if batch.last_only else column - (batch.input_ids.shape[1] - real)
            self.worst = (prompt, position)

    def _count(self, errors: Sequence[int]) -> None:
        self.errors = [a + b for a, b in zip(self.errors, errors, strict=True)]

    def result(self, *, tokens_fired: int, flips: Sequence[Flip], tokenizer: Any) -> Parity:
        """The finished comparison."""
        if not self.n_tokens:
            raise ValueError("no token was compared")
        worst = None
        if self.worst is not None:
            prompt, position = self.worst
            worst = WorstItem(
                source=prompt.source,
                form=prompt.form,
                row=prompt.row,
                position=position,
                token=tokenizer.convert_ids_to_tokens(prompt.ids[position]),
                abs_logit=self.max_abs_logit,
            )
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


def logit_bar(parity: Parity) -> float:
    """Largest |Δlogit| that an exact engine may show in float32."""
    return max(MAX_ABS_LOGIT, ROUNDING * parity.largest_logit)


def parity_failures(
    engine: str, parity: Parity, dtype: str, *, exact: bool = True, n_answers: int = 0
) -> list[Failure]:
    """What is out of tolerance for an engine.

    Args:
        engine: its name.
        parity: its comparison with the reference.
        dtype: what both ran in: float32, bfloat16 or float16.
        exact: it claims to compute the clamp itself; else, to do so but for rounding.
        n_answers: how many answers were compared.
    """
    bar = logit_bar(parity)
    worst = None if parity.worst is None else str(parity.worst)
    first = None
    if parity.flips:
        flip = parity.flips[0]
        first = f"{flip.source} row {flip.row} ({flip.form})"
    measures: list[tuple[str, float, float, str | None]]
    if not exact:
        share = COMPILED_FLIPS[dtype]
        measures = [
            ("mean_kl", parity.mean_kl, COMPILED_KL[dtype], worst),
            ("answer_flips", len(parity.flips), int(max(share * n_answers, share > 0)), first),
        ]
    elif dtype == "float32":
        measures = [
            ("max_abs_logit", parity.max_abs_logit, bar, worst),
            ("answer_flips", len(parity.flips), 0, first),
        ]
    else:
        measures = [("mean_kl", parity.mean_kl, MEAN_KL, worst)]
    return [
        Failure("parity", engine, what, measured, bar, where)
        for what, measured, bar, where in measures
        if not measured <= bar
    ]


def unlearning_failures(engine: EngineReport, reference: EngineReport) -> list[Failure]:
    """What is out of tolerance for an engine whose weights are rounded: it may answer otherwise,
    but it may not remember what was to be forgotten.
    """
    if engine.forget is None or reference.forget is None:
        return []
    return [
        Failure("choices", engine.name, f"forget accuracy ({form})", measured, bar)
        for form in ("plain", "chat")
        if not (measured := getattr(engine.forget, form))
        <= (bar := getattr(reference.forget, form) + MORE_REMEMBERED)
    ]


def silent_clamps(fired_by_layer: Iterable[tuple[int, int]]) -> list[Failure]:
    """A clamp that fired on no token was not compared at all: one failure for each."""
    return [
        Failure("parity", "reference", f"tokens_fired at layer {layer}", fired, "at least 1")
        for layer, fired in fired_by_layer
        if fired == 0
    ]
