"""Reports made up for all their views, and hostile text to put into them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest

from bake.questions.answers import Accuracy
from bake.rounding import EPSILON
from verify.compare.loss_split import EDGES, LossHistogram, LossPart, LossSplit
from verify.report.findings import (
    EngineReport,
    Failure,
    FiredText,
    Flip,
    Items,
    Parity,
    Rounding,
    VerifyReport,
    Witnessed,
    WorstItem,
)
from verify.report.intervals import Interval, McNemar
from verify.report.measures import (
    AnswerSet,
    Attack,
    Calibration,
    Completion,
    Completions,
    Continuation,
    Control,
    Guess,
    HarnessScore,
    KnownSet,
    LossAdded,
    Robustness,
    Share,
    SubjectShare,
    Tally,
    TextShares,
    TokenShift,
    Trivia,
)

FLIP = Flip("forget", "chat", 3, "Which?", reference="A", engine="B", right="C")
WORST = WorstItem("retain", "plain", 7, 12, "▁the", 2e-4)
ROUNDING = Rounding(
    unit=EPSILON["float32"],
    sensitivity=1e-5,
    sensitivity_kl=1e-12,
    tokens=900,
    tokens_fired=40,
    worst=2.0,
    at=WorstItem("retain", "plain", 7, 12, "▁the", 4e-5),
    mean_kl=1e-12,
    flips=0,
    edge_tokens=100,
    edge_max_abs_logit=3.0,
    edge_flips=1,
    smallest_fault=1e-6,
)
PARITY = Parity(2e-4, 30.0, 3e-9, 0.99, 640, 51, WORST, (FLIP,), rounding=ROUNDING)
FAILURE = Failure("parity", "checkpoint", "max_abs_logit", 2e-4, 1e-4, where=str(WORST))
N_ASKED = {"forget": 120, "retain": 160}
N_KNOWN = {"forget": 96, "retain": 128}
SUBJECTS = {
    "forget": ("spells", "potions", "houses"),
    "retain": ("astronomy", "anatomy", "chess openings", "rivers of the north", ""),
}
N_RIGHT = {  # of N_ASKED, chat form; plain form has two fewer
    "base": {"forget": 114, "retain": 152},
    "reference": {"forget": 36, "retain": 150},
    "checkpoint": {"forget": 36, "retain": 150},
    "onnx": {"forget": 36, "retain": 150},
    "onnx-int4": {"forget": 31, "retain": 42},
}
VARIANTS = ("base", "reconstruction", "unlearned", "prompted")
HOSTILE = (
    "</p></main><script>document.title='taken'</script><img src=x onerror=alert(1)>"
    "\"'>`${7*7}` {{ 7*7 }} [a](javascript:alert(1)) \x1b[31m\x07\u202etxt.exe & so on"
)
STRUCTURE = frozenset(
    {"source", "form", "name", "engine", "variant", "only_letter", "carrier", "scope"}
)
"""Fields whose text is looked up rather than shown alone."""


def full_report(*failures: Failure, parity: Parity = PARITY) -> VerifyReport:
    """A report of a base and a checkpoint that were measured in full."""
    measured = {"forget": Accuracy(plain=0.25, chat=0.5), "retain": Accuracy(plain=0.75, chat=1.0)}
    return VerifyReport(
        folder="checkpoint",
        carrier="layer",
        exact=True,
        scope="full",
        failures=failures,
        engines=(
            EngineReport("base", **measured, loss=1.5, loss_added=0.0),
            EngineReport("checkpoint", **measured, loss=1.75, loss_added=0.25, parity=parity),
        ),
        dtype="float32",
        prompt="chat",
        items=Items(forget_questions=4, retain_questions=8, text_tokens=100),
        fired_by_layer=((0, 51),),
        warnings=("something",),
    )


def rich_report(**changes: Any) -> VerifyReport:
    """The full report with witnesses, an example and hashes."""
    report = full_report()
    base, checkpoint = report.engines
    seen = replace(checkpoint, witnessed=Witnessed(16, 1e-6, 1.0, 1e-6))
    text = FiredText("forget", "chat", 3, ("<bos>", "▁a", "b"), (1,))
    changes = {"engines": (base, seen), "examples": (text,), **changes}
    return replace(report, manifest_sha256="ab" * 32, card_sha256="cd" * 32, **changes)


def full_evidence(**changes: Any) -> VerifyReport:
    """A report in which every field is filled."""
    report = VerifyReport(
        folder="checkpoint",
        carrier="layer",
        exact=True,
        scope="full",
        failures=(),
        engines=tuple(_engine(name) for name in N_RIGHT),
        dtype="float32",
        prompt="chat",
        items=Items(N_ASKED["forget"], N_ASKED["retain"], 8192),
        fired_by_layer=((7, 1712),),
        warnings=("layer 7: never active on the forget questions: feature 4788",),
        examples=(
            FiredText(
                "forget",
                "chat",
                3,
                ("<bos>", "▁Which", "▁spell", "▁opens", "▁doors", "?"),
                (2, 3),
            ),
        ),
        known=(
            KnownSet("forget", 120, 96, "checkpoint", Share(3, 96), Share(708, 2304)),
            KnownSet("retain", 160, 128, "checkpoint", Share(125, 128), Share(3041, 3072)),
        ),
        guessing=(
            Guess("forget", 120, 0.25, 0.3125, 0.275),
            Guess("retain", 160, 0.25, 0.25, 0.2625),
        ),
        controls=(
            Control("reconstruction", Share(109, 120), Share(146, 160), 0.1434),
            Control("zero", Share(111, 120), Share(152, 160), 0.0021),
            Control("random_decoder", Share(98, 120), Share(117, 160), 0.9876),
        ),
        completions=_completions(),
        robustness=Robustness(
            "checkpoint",
            "chat",
            (
                Attack("as asked", "The questions as they stand.", Share(114, 120), Share(36, 120)),
                Attack(
                    "reworded: letters home",
                    "Each question asked again in other words.",
                    Share(110, 120),
                    Share(41, 120),
                ),
                Attack("hints", "Four solved ones first.", Share(117, 120), Share(63, 120)),
                Attack("padding", "2,000 tokens of text first.", Share(112, 120), Share(35, 120)),
                Attack("suffix", "needs a budget, and none was given", None, None),
                Attack("weights: onnx-int4", "Weights of 4 bits.", Share(114, 120), Share(31, 120)),
            ),
        ),
        manifest_sha256="ab" * 32,
        card_sha256="cd" * 32,
    )
    return replace(report, **changes)


def cloze_evidence(**changes: Any) -> VerifyReport:
    """The same where the cloze form leads: six more right than in chat form, no letter said."""
    full = full_evidence()
    assert full.robustness is not None
    engines = tuple(
        replace(
            e,
            forget=Accuracy(**(vars(e.forget) | {"cloze": (N_RIGHT[e.name]["forget"] + 6) / 120})),
            retain=Accuracy(**(vars(e.retain) | {"cloze": (N_RIGHT[e.name]["retain"] + 6) / 160})),
            answers=(*e.answers, *(_cloze_answers(e, source) for source in N_ASKED)),
        )
        for e in full.engines
    )
    known = tuple(replace(known, form="cloze", orders=known.still_known) for known in full.known)
    robustness = replace(full.robustness, form="cloze")
    found = replace(full, prompt="cloze", engines=engines, known=known, robustness=robustness)
    return replace(found, **changes)


def _cloze_answers(engine: EngineReport, source: str) -> AnswerSet:
    (chat,) = (a for a in engine.answers if (a.source, a.form) == (source, "chat"))
    right, n = chat.share.right + 6, chat.share.n
    return replace(
        chat,
        form="cloze",
        share=Share(right, n),
        letters=(0, 0, 0, 0),
        only_letter=None,
        calibration=None,
        by_text=TextShares(Share(right - 3, n), Share(right, n), Share(right - 5, n)),
    )


def _engine(name: str) -> EngineReport:
    base, right = name == "base", N_RIGHT[name]
    worst = replace(PARITY.worst, token="▁the") if PARITY.worst else None
    distance = {"base": 19.3, "onnx-int4": 4.1}.get(name, 4e-5)
    flips = (FLIP,) * 3 if name in ("base", "onnx-int4") else ()
    parity = Parity(distance, 30.0, distance / 1e4, 0.99, 6400, 1712, worst, flips)
    return EngineReport(
        name,
        forget=Accuracy(plain=(right["forget"] - 2) / 120, chat=right["forget"] / 120),
        retain=Accuracy(plain=(right["retain"] - 2) / 160, chat=right["retain"] / 160),
        loss=1.5 if base else 1.5432,
        loss_added=0.0 if base else 0.0432,
        parity=parity,
        witnessed=None if base else Witnessed(16, 1e-6, 1.0, 1e-6),
        answers=tuple(
            _answers(name, source, form) for source in N_ASKED for form in ("chat", "plain")
        ),
        loss_detail=None if base else _loss(name),
        alignment=None if base else 0.8312,
        unlearning_score=None if base else 0.7188,
        harness=(
            HarnessScore(
                "wmdp_bio",
                right["forget"] / 120,
                0.0138,
                1273,
                Guess("wmdp_bio", 1273, 0.25, 0.4613),
            ),
            HarnessScore("mmlu", right["retain"] / 160, None, None),
        ),
    )


def _answers(name: str, source: str, form: str) -> AnswerSet:
    n, right = N_ASKED[source], N_RIGHT[name][source] - (2 if form == "plain" else 0)
    subjects = SUBJECTS[source]
    constant = name == "onnx-int4"
    lost = N_RIGHT["base"][source] - right
    return AnswerSet(
        source,
        form,
        share=Share(right, n),
        known=Share(
            N_KNOWN[source] if name == "base" else right * N_KNOWN[source] // n, N_KNOWN[source]
        ),
        letters=(n - 4, 2, 1, 1) if constant else (n // 4, n // 4, n // 4, n // 4),
        only_letter="A" if constant else None,
        subjects=tuple(
            SubjectShare(
                subject,
                Share(min(right // len(subjects) + i, n // len(subjects)), n // len(subjects)),
            )
            for i, subject in enumerate(subjects)
        ),
        change=None if name == "base" else McNemar(lost + 1, 1, 4.1e-23),
        calibration=Calibration(0.81, 0.11, 0.9917, 0.97) if form == "chat" else None,
    )


def _loss(name: str) -> LossAdded:
    exact = name in ("reference", "checkpoint")
    counts = [0, 3, 11, 40, 96, 310, 188, 402, 611, 505, 380, 160, 74, 31, 9, 2]
    assert len(counts) == len(EDGES) + 1
    before = LossPart(5370, 0.0 if exact else -0.011, 0.0 if exact else 3.1e-6)
    split = LossSplit(before, LossPart(2822, 353.9, 8.4))
    histogram = LossHistogram(tuple(counts), 5370 if exact else 12, 0)
    return LossAdded(split, histogram, Interval(0.001, 0.034))


def _completions() -> Completions:
    said = {
        "base": " is called Lumen, and it lights",
        "reconstruction": " is called Lumen.",
        "unlearned": " is the the same as a lamp",
        "prompted": " I do not know that.",
    }
    topic = tuple(
        Completion(
            "topic",
            row,
            f"The spell that lights a lamp, number {row},",
            ("Lumen", "Lumens"),
            tuple(
                Continuation(v, text, v in ("base", "reconstruction"), v in VARIANTS[:2])
                for v, text in said.items()
            ),
        )
        for row in range(1, 19)
    )
    generic = Completion(
        "generic",
        1,
        "The river runs through",
        (),
        tuple(Continuation(v, " the town of Aldermark", None, False) for v in VARIANTS),
    )
    tallies = tuple(
        Tally("topic", v, Share(r, 18), Share(t, 18), Share(b, 18))
        for v, r, t, b in zip(VARIANTS, (17, 15, 2, 8), (18, 16, 4, 9), (18, 11, 0, 3), strict=True)
    ) + tuple(
        Tally("generic", v, None, Share(0, 9), Share(b, 9))
        for v, b in zip(VARIANTS, (9, 7, 8, 5), strict=True)
    )
    return Completions(
        engine="checkpoint",
        max_new_tokens=10,
        instruction="Say nothing about spells.",
        prompts=(*topic, generic),
        tallies=tallies,
        falls=tuple(TokenShift(f"▁spell{i}", 0.31 / (i + 1), 1e-5) for i in range(35)),
        rises=tuple(TokenShift(f"▁the{i}", 0.001, 0.2 / (i + 1)) for i in range(35)),
        trivia=(
            Trivia("base", Share(93, 100), (52, 48)),
            Trivia("unlearned", Share(51, 100), (98, 2)),
        ),
    )


def every_text(found: Any, change: Callable[[str], str], keep: frozenset[str]) -> Any:
    """The same result with every text changed but that of the fields named."""
    if isinstance(found, str):
        return change(found)
    if isinstance(found, tuple):
        return tuple(every_text(one, change, keep) for one in found)
    if not is_dataclass(found) or isinstance(found, type):
        return found
    leading = {"prompt", "form"} if isinstance(found, VerifyReport | KnownSet) else set()
    return replace(
        found,
        **{
            of.name: every_text(getattr(found, of.name), change, keep)
            for of in fields(found)
            if of.name not in keep | leading
        },
    )


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command printed, which is of an error."""
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("Writing model")]
    assert out == "" and len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]
