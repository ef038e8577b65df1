from __future__ import annotations

import json
import math

import pytest

from tests.reports import FAILURE, WORST, cloze_evidence, full_evidence, full_report
from verify.report.findings import (
    Failure,
    Parity,
    VerifyReport,
    WorstItem,
)


def test_json_is_the_contract() -> None:
    found = json.loads(json.dumps(full_report(FAILURE).to_dict(), allow_nan=False))
    assert (found["schema"], found["verdict"], found["scope"]) == (1, "fail", "full")
    (failure,) = found["failures"]
    contract = {"kind": "parity", "engine": "checkpoint", "what": "max_abs_logit"}
    assert failure == {**contract, "measured": 2e-4, "bar": 1e-4, "where": str(WORST)}
    checkpoint = found["engines"]["checkpoint"]
    assert checkpoint["forget"] == {"plain": 0.25, "chat": 0.5}
    assert checkpoint["retain"] == {"plain": 0.75, "chat": 1.0}
    assert checkpoint["loss_added"] == 0.25
    parity = checkpoint["parity"]
    assert (parity["max_abs_logit"], parity["mean_kl"]) == (2e-4, 3e-9)
    assert (parity["top1_agreement"], parity["answer_flips"]) == (0.99, 1)
    assert (parity["tokens_fired"], parity["tokens_compared"]) == (51, 640)
    assert parity["worst"] == {
        "source": "retain",
        "form": "plain",
        "row": 7,
        "position": 12,
        "token": "▁the",
        "abs_logit": 2e-4,
    }
    assert parity["flips"][0]["right"] == "C"
    assert "parity" not in found["engines"]["base"]
    assert found["prompt"] == "chat"
    assert found["items"] == {
        "forget_questions": 4,
        "retain_questions": 8,
        "text_tokens": 100,
        "one_in": 1,
    }
    assert found["tokens_fired_by_layer"] == {"0": 51}
    assert found["warnings"] == ["something"]


def test_a_form_that_was_not_measured_is_not_in_the_json() -> None:
    found = cloze_evidence().to_dict()["engines"]["checkpoint"]
    assert found["forget"] == {"chat": 0.3, "plain": pytest.approx(34 / 120), "cloze": 0.35}
    by_text = [of["by_text"] for of in found["answers"] if of["form"] == "cloze"]
    assert by_text[0] == {
        "summed": {"right": 39, "n": 120},
        "per_character": {"right": 42, "n": 120},
        "per_token": {"right": 37, "n": 120},
    }
    assert set(full_evidence().to_dict()["engines"]["checkpoint"]["forget"]) == {"chat", "plain"}


def test_verdict_and_exit_code_follow_the_failures() -> None:
    assert (full_report().verdict, full_report().exit_code) == ("pass", 0)
    assert (full_report(FAILURE).verdict, full_report(FAILURE).exit_code) == ("fail", 1)
    assert full_report().engine("base") is not None
    assert full_report().engine("onnx") is None


def test_numbers_that_json_does_not_know_become_null() -> None:
    worst = WorstItem("retain", "plain", 7, 12, "x", math.inf)
    broken = Parity(math.inf, 30.0, math.nan, 0.0, 1, 1, worst, ())
    failure = Failure("parity", "checkpoint", "max_abs_logit", math.inf, 1e-4)
    found = full_report(failure, parity=broken).to_dict()
    json.dumps(found, allow_nan=False)
    assert found["failures"][0]["measured"] is None
    parity = found["engines"]["checkpoint"]["parity"]
    assert parity["max_abs_logit"] is parity["mean_kl"] is parity["worst"]["abs_logit"] is None


def test_integrity_alone_says_so() -> None:
    failure = Failure("integrity", "checkpoint", "config.json: changed", "12", "34")
    report = VerifyReport("folder", "layer", True, "integrity", (failure,))
    found = report.to_dict()
    assert (found["scope"], found["engines"], found["verdict"]) == ("integrity", {}, "fail")
    assert str(failure) == "integrity: config.json: changed"


def test_a_failure_shows_the_worst_item() -> None:
    assert str(FAILURE) == (
        "parity: checkpoint: max_abs_logit is 0.0002, expected 0.0001; "
        'worst at retain row 7 (plain), token 12 "▁the"'
    )
