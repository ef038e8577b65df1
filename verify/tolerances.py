"""What is out of tolerance. Suite, page, terminal and card ask here.

An engine that claims to compute the clamp, or to do so but for rounding, is held to what rounding
explains: `BAR` roundings at any token, `TYPICAL_BAR` on the average. What a rounding is worth is
measured on the reference itself (`verify.compare.sensitivity`), so that the same file passes on
every processor, and a fault fails on every one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from math import inf

from bake.rounding import BAR, EPSILON, MIN_EFFECT
from export.carriers.carriers import CARRIERS
from verify.engines.engine_names import engine_of
from verify.report.findings import (
    EngineReport,
    Failure,
    Parity,
    Rounding,
    VerifyReport,
    Witnessed,
)

TYPICAL_BAR = 3.0
"""How many roundings an engine may be away on the average: the root of its mean KL over the mean KL
of one rounding, for a KL grows with the square of what moves it."""
EDGE_SHARE = 0.5
"""Most of the compared tokens that may be edge tokens, or follow one."""
MORE_REMEMBERED = 0.05
"""How far forget accuracy may be above the reference's where weights are rounded; but always by one
answer."""


CHANCE = 0.05
"""Largest p of McNemar's test by which a folder forgets, where nothing but its own word says that
its features are the topic's."""


def unit_of(engine: str, dtype: str) -> float:
    """Relative size of one rounding of an engine.

    Args:
        engine: its name.
        dtype: what its weights are stored in and it computes in, where its name does not say it.
    """
    return EPSILON[engine_of(engine).rounding or dtype]


def kl_bar(rounding: Rounding) -> float:
    """Largest mean KL that rounding explains, in nats per token."""
    return TYPICAL_BAR**2 * rounding.sensitivity_kl


def parity_failures(engine: str, parity: Parity, n_answers: int) -> Iterator[Failure]:
    """What rounding does not explain, of an engine that claims to compute the clamp.

    Args:
        engine: its name.
        parity: its comparison with the reference.
        n_answers: how many answers were compared.
    """
    if (rounding := parity.rounding) is None:
        return
    yield from _rounding_failures(engine, rounding, parity)
    if (exact := parity.float32) is not None:
        for failure in _rounding_failures(engine, exact, parity):
            yield replace(failure, what=f"{failure.what}, in float32")
    elif rounding.unit == EPSILON["float32"] and _too_many(rounding):
        compared = rounding.tokens + rounding.edge_tokens
        what = "tokens within rounding of a gate's edge, or after one"
        bar = int(EDGE_SHARE * compared)
        yield Failure("parity", engine, what, rounding.edge_tokens, bar)
    elif rounding.unit == EPSILON["float32"] and parity.tokens_fired and not rounding.tokens_fired:
        yield Failure("parity", engine, "tokens_fired away from a gate's edge", 0, "at least 1")
    if rounding.flips:
        yield Failure("parity", engine, "answer_flips", rounding.flips, 0, _first_flip(parity))
    # Layers that compare in 16 bits have edges of their own, which the reference does not know.
    share = engine_of(engine).edge_flips
    most = max(1, int(share * n_answers))
    if share and len(parity.flips) > most and not rounding.flips:
        measured = len(parity.flips)
        yield Failure("parity", engine, "answer_flips", measured, most, _first_flip(parity))


def _rounding_failures(engine: str, rounding: Rounding, parity: Parity) -> Iterator[Failure]:
    if not rounding.worst <= BAR:
        at = rounding.at
        measured = inf if at is None else at.abs_logit
        bar = BAR * (measured / rounding.worst if measured < inf else rounding.sensitivity)
        where = None if at is None else f"{at}, {rounding.worst:.3g} roundings"
        yield Failure("parity", engine, "max_abs_logit", measured, bar, where)
    # Where in 16 bits hardly a token is away from an edge, all of them are averaged: a rounding's
    # own effect was measured with its edges too.
    rough = rounding.unit > EPSILON["float32"] and _too_many(rounding)
    mean_kl = parity.mean_kl if rough else rounding.mean_kl
    if not mean_kl <= kl_bar(rounding):
        yield Failure("parity", engine, "mean_kl", mean_kl, kl_bar(rounding))


def _too_many(rounding: Rounding) -> bool:
    """Whether most tokens are edge tokens, or follow one."""
    return rounding.edge_tokens > EDGE_SHARE * (rounding.tokens + rounding.edge_tokens)


def _first_flip(parity: Parity) -> str | None:
    if not parity.flips:
        return None
    flip = parity.flips[0]
    return f"{flip.source} row {flip.row} ({flip.form})"


def unlearning_failures(engine: EngineReport, reference: EngineReport, n: int) -> list[Failure]:
    """What is out of tolerance for an engine whose weights are rounded: it may answer otherwise,
    but it may not remember what was to be forgotten.

    Args:
        engine: its report.
        reference: what it is compared with.
        n: forget questions.
    """
    if engine.forget is None or reference.forget is None or not n:
        return []
    more = max(MORE_REMEMBERED, 1 / n) + 1e-9  # one answer is one answer, however it is divided
    return [
        Failure("choices", engine.name, f"forget accuracy ({form})", measured, bar)
        for form, measured in engine.forget.measured.items()
        if not measured <= (bar := reference.forget.measured[form] + more)
    ]


def forgetting_failures(engine: EngineReport, form: str) -> Iterator[Failure]:
    """Whether an engine forgets at all, where only the folder says which features do: of the forget
    questions, more were lost than gained, and chance alone would hardly do that (McNemar's test).

    Args:
        engine: of the folder.
        form: the prompt form that leads.
    """
    for answers in engine.answers:
        change = answers.change
        if (answers.source, answers.form) != ("forget", form) or change is None:
            continue
        if change.lost <= change.gained or change.p_value > CHANCE:
            what = f"forget questions lost less gained ({form}, p = {change.p_value:.2g})"
            bar = f"more than 0, p at most {CHANCE}"
            yield Failure("forgetting", engine.name, what, change.lost - change.gained, bar)


def remembering_failures(report: VerifyReport, *, trained: bool, claimed: bool) -> list[Failure]:
    """Engines of a folder that do not forget.

    Args:
        report: with answers.
        trained: the folder's weights were trained. They have to forget where the hook itself does:
            where its answers are chance's, theirs say nothing.
        claimed: only the folder says which features are the topic's.
    """
    form, reference = report.prompt or "chat", report.engine("reference")
    forgets = reference is not None and not [*forgetting_failures(reference, form)]
    if not claimed and not (trained and forgets):
        return []
    own = [engine for engine in report.engines if engine_of(engine.name).own]
    return [failure for engine in own for failure in forgetting_failures(engine, form)]


def loss_bar(sensitivity: float) -> float:
    """How far rounding may move one token's loss, in nats: a loss is a difference of two terms,
    each of which may move by as much as a logit.

    Args:
        sensitivity: how far one rounding moves the most sensitive token's logits.
    """
    return 2 * BAR * sensitivity


def loss_failures(engine: EngineReport) -> Iterator[Failure]:
    """Before a clamp has fired nothing has changed: where the base's own arithmetic is used, no
    token's loss may move by more than rounding explains.
    """
    if (detail := engine.loss_detail) is None:
        return
    worst, bar = detail.split.before.max_abs, detail.rounding
    if not worst <= bar:
        yield Failure("loss", engine.name, "largest loss added before any firing", worst, bar)


def witness_bar(engine: str, witnessed: Witnessed, carrier: str) -> float | None:
    """The largest |Δlogit| to a folder's witnesses that rounding explains; None where an engine is
    not held to it, because it has not the weights that wrote them.

    Args:
        engine: its name.
        witnessed: what it said.
        carrier: of the folder.
    """
    own = carrier in CARRIERS and CARRIERS[carrier].own_code
    if not own or not engine_of(engine).held or witnessed.sensitivity is None:
        return None
    return BAR * witnessed.sensitivity


def witness_failures(engine: str, witnessed: Witnessed, carrier: str) -> Iterator[Failure]:
    """What is out of tolerance for an engine that was shown a folder's witnesses; for the arguments
    see `witness_bar`.
    """
    bar = witness_bar(engine, witnessed, carrier)
    if bar is not None and not witnessed.max_abs_logit <= bar:
        yield Failure("witnesses", engine, "max_abs_logit", witnessed.max_abs_logit, bar)
    if not witnessed.effect >= MIN_EFFECT:
        what = "share of the clamp's effect"
        yield Failure("witnesses", engine, what, witnessed.effect, MIN_EFFECT)


def silent_clamps(fired_by_layer: Iterable[tuple[int, int]]) -> list[Failure]:
    """A clamp that fired on no token was not compared at all: one failure for each."""
    return [
        Failure("parity", "reference", f"tokens_fired at layer {layer}", fired, "at least 1")
        for layer, fired in fired_by_layer
        if fired == 0
    ]
