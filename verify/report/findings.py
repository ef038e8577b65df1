"""What a verification found, as types, and as the JSON that `--json` writes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

from bake.questions.answers import Accuracy
from bake.recipe import PromptForm
from verify.report.measures import (
    AnswerSet,
    Completions,
    Control,
    FiredText,
    Guess,
    HarnessScore,
    Items,
    KnownSet,
    LossAdded,
    Robustness,
)

SCHEMA = 1
"""Version of the JSON."""
CLAIMED = ", features as the folder claims"
"""The end of a scope where the user's recipe leaves its features to be selected, and they were
not."""
ERROR_EDGES = tuple(10.0**exponent for exponent in range(-7, 2))
"""Bounds between the bins of `Parity.errors`; the first and the last bin are open."""


@dataclass(frozen=True)
class Failure:
    """One thing that is out of tolerance."""

    kind: str
    """integrity | witnesses | fit | parity | choices | loss | forgetting."""
    engine: str
    """Which engine it concerns."""
    what: str
    """The measure, or the file."""
    measured: float | int | str | None
    """What came; None where nothing did."""
    bar: float | int | str | None
    """What was expected."""
    where: str | None = None
    """The worst item, where there is one."""

    def __str__(self) -> str:
        """One line for a person."""
        if self.kind == "integrity":
            return f"{self.kind}: {self.what}"
        where = f"; worst at {self.where}" if self.where else ""
        return (
            f"{self.kind}: {self.engine}: {self.what} is {_short(self.measured)}, "
            f"expected {_short(self.bar)}{where}"
        )


@dataclass(frozen=True)
class WorstItem:
    """The place where an engine is furthest from the reference."""

    source: str
    """forget | retain | text."""
    form: str
    """A key of `FORMS`, or text."""
    row: int
    """Row of the source, from 1."""
    position: int
    """Token of the prompt, from 0 (BOS)."""
    token: str
    """The token at that position."""
    abs_logit: float
    """|Δlogit| there."""

    def __str__(self) -> str:
        """One line for a person."""
        form = "" if self.form == "text" else f" ({self.form})"
        return f'{self.source} row {self.row}{form}, token {self.position} "{self.token}"'


@dataclass(frozen=True)
class Flip:
    """A question that an engine answers otherwise than the reference."""

    source: str
    form: str
    row: int
    """Row of the source, from 1."""
    question: str
    reference: str
    """The reference's letter."""
    engine: str
    """The engine's letter."""
    right: str
    """The right letter."""


@dataclass(frozen=True)
class Rounding:
    """An engine's distance to the reference, in roundings: how far the reference's own logits move
    when what every matrix, norm and layer gives is rounded once more.

    Edge tokens, at which a gate lies within rounding of its threshold, and what follows them in
    their sequence say nothing about the engine. They are known from the reference alone, and
    counted apart.
    """

    unit: float
    """Relative size of one rounding of the engine: 2⁻²⁴ in float32."""
    sensitivity: float
    """How far one rounding moves a token's logits; one token in ten is moved further."""
    sensitivity_kl: float
    """KL(reference ‖ reference with one rounding), in nats per token."""
    tokens: int
    """Over how many tokens this is; edge tokens and what follows them are not among them."""
    tokens_fired: int
    """On how many of these the clamp fired."""
    worst: float
    """Largest |Δlogit| at any of them, over the token's own sensitivity."""
    at: WorstItem | None
    """Where that is."""
    mean_kl: float
    """KL(reference ‖ engine) over them, in nats per token."""
    flips: int
    """Answers that differ though their token is judged and further out than rounding explains."""
    edge_tokens: int
    """Edge tokens, and what follows them."""
    edge_max_abs_logit: float
    """Largest |Δlogit| there."""
    edge_flips: int
    """Answers that differ there."""
    smallest_fault: float | None
    """The share of the clamp's effect on the logits that would be out of tolerance if it were
    missing: the median over tokens on which it fired. None where it fired on none."""

    @property
    def typical(self) -> float:
        """How many roundings the engine is away on the average: a KL grows with the square."""
        return math.sqrt(self.mean_kl / self.sensitivity_kl) if self.sensitivity_kl else 0.0


@dataclass(frozen=True)
class Parity:
    """How far an engine is from the hooked reference on the same tokens."""

    max_abs_logit: float
    """Largest |Δlogit|; infinite where a logit is not finite."""
    largest_logit: float
    """Largest |logit| of the reference on the same tokens."""
    mean_kl: float
    """Mean KL(reference ‖ engine), in nats per token."""
    top1_agreement: float
    """Share of tokens on which both put the same token first, 0 to 1."""
    tokens_compared: int
    """Over how many tokens."""
    tokens_fired: int
    """On how many tokens the clamp fired while the engine's logits were formed."""
    worst: WorstItem | None
    flips: tuple[Flip, ...]
    errors: tuple[int, ...] = ()
    """How many tokens have their largest |Δlogit| in each bin of `ERROR_EDGES`."""
    rounding: Rounding | None = None
    """The same against the reference's own sensitivity to rounding; None of a reference."""
    float32: Rounding | None = None
    """The same again with both sides in float32, on some of the prompts, where they otherwise run
    in 16 bits: the clamp's own numbers are float32, and in 16 bits much cannot be told."""
    of_tokens: int | None = None
    """Out of how many tokens those were that were compared: of a large vocabulary, tokens where a
    clamp fired or had fired come first, and a seeded sample of the others stands beside them. None
    where it was all of them."""


@dataclass(frozen=True)
class Witnessed:
    """How far an engine is from what was seen at export, on the folder's own witnesses."""

    tokens: int
    """Over how many tokens."""
    max_abs_logit: float
    """Largest |Δlogit|; infinite where a logit is not finite."""
    effect: float
    """How much of what the clamp does to the logits the engine shows: 1 all of it, 0 nothing."""
    sensitivity: float | None = None
    """How far one rounding moved the most sensitive of these tokens' logits at export."""


@dataclass(frozen=True)
class EngineReport:
    """One engine; what was not measured is None."""

    name: str
    """base | reference | checkpoint | …"""
    forget: Accuracy | None = None
    retain: Accuracy | None = None
    loss: float | None = None
    """Mean token cross-entropy on text, in nats."""
    loss_added: float | None = None
    """Loss minus the base's, in nats per token."""
    parity: Parity | None = None
    """Against the reference. The base's says how far the clamp moves the model."""
    witnessed: Witnessed | None = None
    answers: tuple[AnswerSet, ...] = ()
    """Both sets of questions in every prompt form."""
    loss_detail: LossAdded | None = None
    alignment: float | None = None
    """How much was forgotten and kept at once, 0 to 1, in the prompt form that leads."""
    unlearning_score: float | None = None
    """1 - accuracy on known forget questions where 0.99 of the known retained ones are kept, else
    0. None where known questions were not asked for, or there are none."""
    harness: tuple[HarnessScore, ...] = ()
    """Tasks of lm-evaluation-harness, as it scores them."""


@dataclass(frozen=True)
class VerifyReport:
    """The result of one verification."""

    folder: str
    """The folder's own name."""
    carrier: str
    """As the manifest has it: one of `CARRIERS`, mostly."""
    exact: bool
    """Whether the carrier computes the clamp itself rather than an approximation."""
    scope: str
    """full, or the kinds of evidence that were gathered, joined by `+`; behind a comma, what was
    taken on the folder's word."""
    failures: tuple[Failure, ...]
    engines: tuple[EngineReport, ...] = ()
    dtype: str | None = None
    """What both sides of the comparison ran in."""
    prompt: PromptForm | None = None
    """The prompt form that leads."""
    items: Items | None = None
    fired_by_layer: tuple[tuple[int, int], ...] = ()
    """(layer, tokens on which its clamp fired)."""
    warnings: tuple[str, ...] = ()
    """What is within tolerance and still worth a look."""
    examples: tuple[FiredText, ...] = ()
    """Of every source, the sequences on which the clamp fired most."""
    known: tuple[KnownSet, ...] = ()
    """Forget and retain questions that the base knows, and what became of them."""
    guessing: tuple[Guess, ...] = ()
    """Of both sets of questions."""
    controls: tuple[Control, ...] = ()
    completions: Completions | None = None
    robustness: Robustness | None = None
    more: Mapping[str, Any] = field(default_factory=dict)
    """What kinds of evidence without a field of their own found, by kind, as JSON data."""
    manifest_sha256: str | None = None
    """Of the folder's `manifest.json` as it was: of another manifest this says nothing."""
    signed_by: str | None = None
    """Whose signature of the folder was asked for, and holds."""
    cannot_know: str | None = None
    """What this verification could not know, in a sentence; None where the user's own recipe says
    everything."""
    card_sha256: str | None = None
    """Of README.md as the manifest listed it. The card is written from this report, and that
    alone does not make the report stale."""

    @property
    def verdict(self) -> Literal["pass", "fail"]:
        """`fail` as soon as anything is out of tolerance."""
        return "fail" if self.failures else "pass"

    @property
    def exit_code(self) -> int:
        """0 on pass, 1 on fail."""
        return 1 if self.failures else 0

    def engine(self, name: str) -> EngineReport | None:
        """The engine of that name, where it was run."""
        return next((engine for engine in self.engines if engine.name == name), None)

    def to_dict(self) -> dict[str, Any]:
        """The JSON contract. Numbers that JSON does not know (infinity, NaN) become null."""
        report: dict[str, Any] = {
            "schema": SCHEMA,
            "verdict": self.verdict,
            "scope": self.scope,
            "folder": self.folder,
            "carrier": self.carrier,
            "exact": self.exact,
            "manifest_sha256": self.manifest_sha256,
            "card_sha256": self.card_sha256,
            "signed_by": self.signed_by,
            "cannot_know": self.cannot_know,
            "failures": self.failures,
            "warnings": self.warnings,
            "engines": {engine.name: _engine_dict(engine) for engine in self.engines},
        }
        if self.items is not None:
            report |= {
                "dtype": self.dtype,
                "prompt": self.prompt,
                "items": self.items,
                "tokens_fired_by_layer": {str(layer): n for layer, n in self.fired_by_layer},
                "examples": self.examples,
            }
        for name in ("known", "guessing", "controls", "completions", "robustness"):
            if found := getattr(self, name):
                report[name] = found
        return dict(_json(report | dict(self.more)))


def _engine_dict(engine: EngineReport) -> dict[str, Any]:
    """What was measured of an engine; a loss that is not finite is there, as null."""
    found: dict[str, Any] = {}
    if engine.loss is not None:
        found |= {"loss": engine.loss, "loss_added": engine.loss_added}
    for name in ("forget", "retain", "alignment", "unlearning_score"):
        if (value := getattr(engine, name)) is not None:
            found[name] = value.measured if isinstance(value, Accuracy) else value
    for name in ("answers", "loss_detail", "harness"):
        if measured := getattr(engine, name):
            found[name] = measured
    if (parity := engine.parity) is not None:
        found["parity"] = {**vars(parity), "answer_flips": len(parity.flips)}
    if engine.witnessed is not None:
        found["witnesses"] = engine.witnessed
    return found


def _json(found: Any) -> Any:
    """Typed results as JSON data; numbers that JSON does not know become null."""
    if is_dataclass(found):
        return {of.name: _json(getattr(found, of.name)) for of in fields(found)}
    if isinstance(found, dict):
        return {key: _json(value) for key, value in found.items()}
    if isinstance(found, tuple | list):
        return [_json(one) for one in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found


def _short(value: float | int | str | None) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
