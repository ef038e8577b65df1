"""Sentences about figures; and a report with every kind of evidence, made up for all its views."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from tests.reports import PARITY, full_evidence
from verify.compare.loss_split import LossPart
from verify.report.findings import (
    Items,
    VerifyReport,
)
from verify.report.intervals import McNemar
from verify.report.measures import (
    Share,
)
from verify.report.reading import read_report
from verify.report.wording import (
    answers_of,
    change_text,
    compared,
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
    asked = "5 questions to be forgotten, 7 to be kept, each in chat and plain form"
    assert shown_text(replace(report, items=Items(5, 7, 0))) == asked
    assert shown_text(replace(report, items=Items(5, 7, 9))) == f"{asked}, and 9 tokens of text"


def test_tokens_are_told_out_of_how_many() -> None:
    assert compared(PARITY) == "640 tokens"
    assert compared(replace(PARITY, of_tokens=12_345)) == "640 of 12,345 tokens"
