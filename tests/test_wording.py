"""Sentences about figures; and a report with every kind of evidence, made up for all its views."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from test_report import FLIP, PARITY

from verify.intervals import Interval, McNemar
from verify.loss_split import EDGES, LossHistogram, LossPart, LossSplit
from verify.measures import (
    AnswerSet,
    Attack,
    Calibration,
    Completion,
    Completions,
    Continuation,
    Control,
    HarnessScore,
    KnownSet,
    LossAdded,
    Robustness,
    Share,
    SubjectShare,
    Tally,
    TokenShift,
    Trivia,
)
from verify.reading import read_report
from verify.report import (
    Accuracy,
    EngineReport,
    FiredText,
    Items,
    Parity,
    VerifyReport,
    Witnessed,
)
from verify.wording import (
    answers_of,
    change_text,
    letters_text,
    loss_text,
    measured_engine,
    nats,
    one_letter_lines,
    one_letter_text,
    percent,
    share_of,
    share_text,
    shown_text,
    was_attacked,
)

N = {"forget": 120, "retain": 160}
KNOWN = {"forget": 96, "retain": 128}
SUBJECTS = {
    "forget": ("spells", "potions", "houses"),
    "retain": ("astronomy", "anatomy", "chess openings", "rivers of the north", ""),
}
RIGHT = {  # of N, chat form; plain form has two fewer
    "base": {"forget": 114, "retain": 152},
    "reference": {"forget": 36, "retain": 150},
    "checkpoint": {"forget": 36, "retain": 150},
    "onnx": {"forget": 36, "retain": 150},
    "onnx-int4": {"forget": 31, "retain": 42},
}
VARIANTS = ("base", "reconstruction", "unlearned", "prompted")
STRUCTURE = frozenset(
    {"source", "form", "name", "engine", "variant", "only_letter", "carrier", "scope"}
)
"""Fields whose text is looked up rather than shown alone."""


def full_evidence(**changes: Any) -> VerifyReport:
    """A report in which every field is filled."""
    report = VerifyReport(
        folder="checkpoint",
        carrier="layer",
        exact=True,
        scope="full",
        failures=(),
        engines=tuple(_engine(name) for name in RIGHT),
        dtype="float32",
        prompt="chat",
        items=Items(N["forget"], N["retain"], 8192),
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


def _engine(name: str) -> EngineReport:
    base, right = name == "base", RIGHT[name]
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
        answers=tuple(_answers(name, source, form) for source in N for form in ("chat", "plain")),
        loss_detail=None if base else _loss(name),
        alignment=None if base else 0.8312,
        unlearning_score=None if base else 0.7188,
        harness=(
            HarnessScore("wmdp_bio", right["forget"] / 120, 0.0138, 1273),
            HarnessScore("mmlu", right["retain"] / 160, None, None),
        ),
    )


def _answers(name: str, source: str, form: str) -> AnswerSet:
    n, right = N[source], RIGHT[name][source] - (2 if form == "plain" else 0)
    subjects = SUBJECTS[source]
    constant = name == "onnx-int4"
    lost = RIGHT["base"][source] - right
    return AnswerSet(
        source,
        form,
        share=Share(right, n),
        known=Share(KNOWN[source] if name == "base" else right * KNOWN[source] // n, KNOWN[source]),
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
    leading = {"prompt"} if isinstance(found, VerifyReport) else set()  # chat | plain
    return replace(
        found,
        **{
            of.name: every_text(getattr(found, of.name), change, keep)
            for of in fields(found)
            if of.name not in keep | leading
        },
    )


def test_a_report_with_everything_is_read_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps(full_evidence().to_dict(), allow_nan=False))
    assert read_report(tmp_path / "r.json") == full_evidence()


# --------------------------------------------------------------------------- sentences


def test_the_folders_own_engine_stands_for_it() -> None:
    report = full_evidence()
    found = measured_engine(report)
    assert found is not None and found.name == "checkpoint"
    alone = replace(report, engines=report.engines[:2])
    found = measured_engine(alone)
    assert found is not None and found.name == "reference"
    assert measured_engine(replace(report, engines=())) is None


def test_a_share_is_what_was_answered_or_else_the_accuracy() -> None:
    report = full_evidence()
    base = report.engine("base")
    assert share_of(report, base, "forget") == Share(114, 120)
    assert share_of(replace(report, prompt="plain"), base, "forget") == Share(112, 120)
    assert base is not None
    bare = replace(base, answers=())
    assert share_of(report, bare, "retain") == Share(152, 160)
    assert share_of(report, replace(bare, retain=None), "retain") is None
    assert share_of(replace(report, items=None), bare, "retain") is None
    assert answers_of(bare, "forget", "chat") is None


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0, "0 %"), (0.001, "under 1 %"), (0.97, "97 %"), (0.999, "over 99 %"), (1.0, "100 %")],
)
def test_percent_is_all_or_nothing_only_where_it_is(share: float, text: str) -> None:
    assert percent(share) == text


def test_shares_and_letters() -> None:
    assert share_text(Share(2, 4)) == "0.500 (0.15 to 0.85)"
    assert share_text(Share(0, 0)) == share_text(None) == "–"
    assert letters_text((97, 1, 1, 1)) == "A 97 %, B 1 %, C 1 %, D 1 %"
    assert letters_text((0, 0, 0, 0)) == "–"


def test_a_change_is_said_with_its_p_value() -> None:
    assert change_text(McNemar(92, 0, 4.04e-28)) == "92 lost, 0 gained, p = 4e-28"
    assert change_text(McNemar(1, 2, 1.0)) == "1 lost, 2 gained, p = 1"
    assert change_text(McNemar(900, 0, 0.0)) == "900 lost, 0 gained, p < 1e-99"


def test_a_model_that_says_one_letter_is_named() -> None:
    report = full_evidence()
    assert one_letter_lines(report) == (
        "onnx-int4 says A to at least 97 % of the questions (to be forgotten, chat and plain form; "
        "to be kept, chat and plain form): it has lost the format, not the facts",
    )
    engine = report.engines[-1]
    assert one_letter_text(replace(engine, answers=engine.answers[:1])) == (
        "onnx-int4 says A to 97 % of the questions (to be forgotten, chat form): it has lost the "
        "format, not the facts"
    )
    assert one_letter_text(report.engines[0]) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (-0.0, "0"),
        (0.41234, "+0.4123"),
        (-3e-7, "-3e-07"),
        (math.nan, "not finite"),
        (math.inf, "not finite"),
        (None, "–"),
    ],
)
def test_nothing_added_is_told_from_almost_nothing(value: float | None, text: str) -> None:
    assert nats(value) == text


def test_loss_on_a_part_of_the_tokens() -> None:
    assert loss_text(LossPart(5370, 0.0, 0.0)) == "0 nats/token on 5,370 tokens"
    assert loss_text(LossPart(100, 5.0, 1.0)) == "+0.0500 nats/token on 100 tokens"
    assert loss_text(LossPart(0, 0.0, 0.0)) == "no tokens"


def test_an_attack_that_was_not_measured_is_none() -> None:
    robustness = full_evidence().robustness
    assert was_attacked(robustness, "reworded") and was_attacked(robustness, "hints")
    assert not was_attacked(robustness, "suffix") and not was_attacked(None, "hints")


def test_what_engines_were_not_shown_is_not_said() -> None:
    report = VerifyReport("folder", "layer", True, "known", ())
    assert shown_text(report) is None
    assert shown_text(replace(report, items=Items(0, 0, 0))) is None
    assert shown_text(replace(report, items=Items(0, 0, 1024))) == "1,024 tokens of text"
    asked = "5 questions to be forgotten, 7 to be kept, each in two prompt forms"
    assert shown_text(replace(report, items=Items(5, 7, 0))) == asked
    assert shown_text(replace(report, items=Items(5, 7, 9))) == f"{asked}, and 9 tokens of text"
