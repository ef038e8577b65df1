"""The terminal's lines about the forgetting, and that text from files is only text there."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bakeout.terminal import show_report
from tests.reports import HOSTILE, STRUCTURE, cloze_evidence, every_text, full_evidence, rich_report
from verify.evidence.kinds import lines_of
from verify.report.findings import VerifyReport
from verify.report.lines import SHOWN_ATTACKS, SHOWN_TASKS
from verify.report.measures import HarnessScore


def test_one_line_a_figure() -> None:
    assert lines_of(full_evidence()) == [
        "witnesses  reference: 16 tokens, max |Δlogit| 1.0e-06 to what was seen "
        "at export, 100% of the clamp's effect",
        "witnesses  checkpoint: 16 tokens, max |Δlogit| 1.0e-06 (rounding explains 8.0e-06) to "
        "what was seen at export, 100% of the clamp's effect",
        "witnesses  onnx: 16 tokens, max |Δlogit| 1.0e-06 (rounding explains 8.0e-06) to "
        "what was seen at export, 100% of the clamp's effect",
        "witnesses  onnx-int4: 16 tokens, max |Δlogit| 1.0e-06 to what was seen "
        "at export, 100% of the clamp's effect",
        "guessing   forget: at random 0.250, the longest choice 0.312, the base without the "
        "question 0.275",
        "guessing   retain: at random 0.250, the longest choice 0.250, the base without the "
        "question 0.263",
        "changed    checkpoint: forget 79 lost, 1 gained, p = 4.1e-23; retain 3 lost, 1 gained, "
        "p = 4.1e-23",
        "score      checkpoint: alignment 0.831, unlearning score 0.719",
        "letters    onnx-int4 says A to at least 97 % of the questions (to be forgotten, chat and "
        "plain form; to be kept, chat and plain form): it has lost the format, not the facts",
        "loss       checkpoint: before any firing 0 nats/token on 5,370 tokens, from the first "
        "firing on +0.1254 nats/token on 2,822 tokens",
        "known      forget: base 96 of 120 in all 24 orders; checkpoint 3 of those, 0.307 of their "
        "single orders",
        "known      retain: base 128 of 160 in all 24 orders; checkpoint 125 of those, 0.990 of "
        "their single orders",
        "control    reconstruction: forget 0.908, retained 0.912, loss added +0.1434",
        "control    zero: forget 0.925, retained 0.950, loss added +0.0021",
        "control    random_decoder: forget 0.817, retained 0.731, loss added +0.9876",
        "said       topic: base 17/18 right, 18/18 on topic; reconstruction 15/18 right, 16/18 on "
        "topic, 11/18 as base; unlearned 2/18 right, 4/18 on topic, 0/18 as base; prompted 8/18 "
        "right, 9/18 on topic, 3/18 as base",
        "said       generic: base 0/9 on topic; reconstruction 0/9 on topic, 7/9 as base; "
        "unlearned 0/9 on topic, 8/9 as base; prompted 0/9 on topic, 5/9 as base",
        "trivia     base 93/100 (A 52, B 48); unlearned 51/100 (A 98, B 2)",
        "attack     as asked: forget 0.950 → 0.300, n = 120",
        "attack     reworded: letters home: forget 0.917 → 0.342, n = 120",
        "attack     hints: forget 0.975 → 0.525, n = 120",
        "attack     padding: forget 0.933 → 0.292, n = 120",
        "attack     suffix: not measured: needs a budget, and none was given",
        "attack     weights: onnx-int4: forget 0.950 → 0.258, n = 120",
        "harness    wmdp_bio: base 0.950, checkpoint 0.300 (its own prompt form); guessing at "
        "random 0.250, the longest choice 0.461",
        "harness    mmlu: base 0.950, checkpoint 0.938 (its own prompt form)",
    ]


def test_a_form_that_asks_for_no_letter_says_by_which_length() -> None:
    lines = lines_of(cloze_evidence())
    for line in (
        "cloze      checkpoint: forget 0.325 summed, 0.350 per character, 0.308 per token",
        "cloze      checkpoint: retain 0.956 summed, 0.975 per character, 0.944 per token",
        "known      forget: base 96 of 120 in cloze form; checkpoint 3 of those",
        "known      retain: base 128 of 160 in cloze form; checkpoint 125 of those",
    ):
        assert line in lines, line
    assert not any("orders" in line for line in lines)
    assert [line for line in lines if line not in lines_of(full_evidence())] == [
        line for line in lines if line.startswith(("cloze ", "known "))
    ]


def test_nothing_found_is_no_line() -> None:
    assert lines_of(VerifyReport("folder", "layer", True, "integrity", ())) == []
    witnessed, only = lines_of(rich_report())
    assert witnessed.startswith("witnesses  checkpoint: 16 tokens, ")
    assert only.startswith("rounding   checkpoint: worst token 2 of at most 8 roundings, 1 of 3 ")
    assert only.endswith("; 100 of 1,000 tokens, at a gate's edge or after one, are left out")


def test_long_lists_are_cut() -> None:
    report = full_evidence()
    robustness, engine = report.robustness, report.engines[2]
    assert robustness is not None
    attacks = robustness.attacks[:1] * (SHOWN_ATTACKS + 3)
    scores = tuple(HarnessScore(f"task_{i}", 0.5, None, 10) for i in range(SHOWN_TASKS + 2))
    report = replace(
        report,
        robustness=replace(robustness, attacks=attacks),
        engines=(replace(engine, harness=scores),),
    )
    lines = lines_of(report)
    assert "attack     … and 3 more" in lines and "harness    … and 2 more tasks" in lines
    assert sum(line.startswith("attack") for line in lines) == SHOWN_ATTACKS + 1


@pytest.mark.parametrize("keep", [STRUCTURE, frozenset[str]()])
def test_hostile_text_is_inert_in_the_terminal(
    keep: frozenset[str], capsys: pytest.CaptureFixture[str]
) -> None:
    show_report(every_text(full_evidence(), lambda text: f"[bold]{text}\n{HOSTILE}", keep))
    said = capsys.readouterr().out
    assert "\x1b" not in said and "\x07" not in said and "\u202e" not in said
    assert "[bold]suffix" in said if not keep else "suffix: not measured: [bold]needs" in said


def test_the_verdict_is_told_with_the_lines(capsys: pytest.CaptureFixture[str]) -> None:
    show_report(full_evidence())
    said = capsys.readouterr().out
    assert said.index("hooked reference") < said.index("known ") < said.index("attack ")
    assert said.splitlines()[-1].startswith("pass  checkpoint: layer, exact")
