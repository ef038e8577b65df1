"""Plots of the forgetting: where marks stand, what is cut, what is left out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.reports import full_evidence, full_report
from verify.page.forgetting_plots import (
    SHOWN_SUBJECTS,
    attack_plot,
    control_plots,
    known_plots,
    letter_plots,
    order_plots,
    subject_plots,
)
from verify.report.findings import VerifyReport
from verify.report.intervals import wilson
from verify.report.measures import Attack, Robustness, Share, SubjectShare


def test_known_questions_are_a_plot_of_their_own() -> None:
    forget, retain = known_plots(full_evidence())
    names = ["base", "hooked reference", "checkpoint", "onnx", "onnx-int4"]
    assert [row.label for row in forget.rows] == names
    assert [row.at for row in forget.rows] == [1.0, 28 / 96, 28 / 96, 28 / 96, 24 / 96]
    assert (forget.rows[1].low, forget.rows[1].high) == wilson(28, 96)
    assert "the 96 questions" in forget.note and "the 128 questions" in retain.note


def test_orders_of_one_question_have_no_interval() -> None:
    forget, _ = order_plots(full_evidence())
    base, every, single = forget.rows
    assert (base.at, every.at, single.at) == (96 / 120, 3 / 96, 708 / 2304)
    assert (every.low, every.high) == wilson(3, 96)
    assert single.low is None and single.value == "0.307, 708 of 2,304"


def test_subjects_stand_beside_the_base_the_largest_fall_first() -> None:
    forget, retain = subject_plots(full_evidence())
    assert [row.label for row in forget.rows] == ["houses", "spells", "potions"]
    row = forget.rows[0]
    assert row.before is not None
    assert (row.before.at, row.at) == (40 / 40, 14 / 40)
    assert (row.before.low, row.before.high) == wilson(40, 40)
    assert retain.rows[-1].label == "no subject named"


def test_many_subjects_are_cut_and_none_named_is_no_plot() -> None:
    def with_subjects(*names: str) -> VerifyReport:
        subjects = tuple(SubjectShare(name, Share(1, 2)) for name in names)
        engines = tuple(
            replace(e, answers=tuple(replace(a, subjects=subjects) for a in e.answers))
            for e in full_evidence().engines
        )
        return full_evidence(engines=engines)

    assert subject_plots(with_subjects("")) == ()
    forget, _ = subject_plots(with_subjects(*map(str, range(SHOWN_SUBJECTS + 7))))
    assert len(forget.rows) == SHOWN_SUBJECTS and "7 more subjects" in forget.note


def test_letters_fill_the_width() -> None:
    forget, _ = letter_plots(full_evidence())
    even, constant = forget.rows[0], forget.rows[-1]
    assert [s.start for s in even.segments] == [0, 0.25, 0.5, 0.75]
    assert (constant.value, constant.said) == ("A 97 %", "A 97 %, B 2 %, C 1 %, D 1 %")
    for row in forget.rows:
        assert sum(s.width for s in row.segments) == pytest.approx(1)


def test_controls_stand_between_base_and_unlearned() -> None:
    forget, retain = control_plots(full_evidence())
    labels = ["base", "reconstruction", "zero", "random_decoder", "unlearned: checkpoint"]
    assert [row.label for row in forget.rows] == labels
    assert [row.at for row in retain.rows] == [
        152 / 160,
        146 / 160,
        152 / 160,
        117 / 160,
        150 / 160,
    ]


def test_attacks_that_were_not_measured_are_no_rows() -> None:
    plot = attack_plot(full_evidence())
    assert plot is not None and "suffix" not in [row.label for row in plot.rows]
    hints = plot.rows[2]
    assert hints.before is not None
    assert (hints.label, hints.before.at, hints.at) == ("hints", 117 / 120, 63 / 120)
    assert hints.note == "Four solved ones first."
    none = Robustness("checkpoint", "chat", (Attack("suffix", "no budget", None, None),))
    assert attack_plot(full_evidence(robustness=none)) is None
    alone = Robustness("checkpoint", "chat", (Attack("x", "y", None, Share(1, 4)),))
    found = attack_plot(full_evidence(robustness=alone))
    assert found is not None and found.rows[0].before is None


def test_nothing_measured_is_no_plot() -> None:
    for report in (full_report(), VerifyReport("folder", "layer", True, "integrity", ())):
        assert known_plots(report) == order_plots(report) == subject_plots(report) == ()
        assert letter_plots(report) == control_plots(report) == ()
        assert attack_plot(report) is None
