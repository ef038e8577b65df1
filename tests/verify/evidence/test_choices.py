from __future__ import annotations

import numpy as np
import pytest

from bake.questions.answers import Answers, LetterTokens
from bake.questions.multiple_choice import Question
from verify.evidence.choices import (
    Setting,
    accuracy,
    answer_set,
    by_subject,
    calibration,
    constant_letter,
    letter_shares,
    unlearning_score,
)
from verify.report.intervals import wilson
from verify.report.measures import Share, TextShares


def question(answer: int, row: int, topic: str | None = None) -> Question:
    return Question("?", ("w", "x", "y", "z"), answer, topic, row=row)


QUESTIONS = [
    question(0, 1, "bells"),
    question(1, 3, "kites"),
    question(2, 4, "bells"),
    question(3, 9, None),
]
CHOSEN = [0, 1, 1, 3]


def test_accuracy_over_all_and_over_known_questions() -> None:
    assert accuracy(QUESTIONS, CHOSEN) == Share(3, 4)
    assert accuracy(QUESTIONS, CHOSEN, rows={3, 4}) == Share(1, 2)
    nothing = accuracy(QUESTIONS, CHOSEN, rows=())
    assert (nothing.accuracy, nothing.interval) == (None, None)
    found = Share(3, 4)
    assert (found.accuracy, found.interval) == (0.75, wilson(3, 4))
    with pytest.raises(ValueError, match="shorter"):
        accuracy(QUESTIONS, CHOSEN[:2])


def test_subjects_in_order() -> None:
    found = by_subject(QUESTIONS, CHOSEN)
    assert list(found.items()) == [
        ("", Share(1, 1)),
        ("bells", Share(1, 2)),
        ("kites", Share(1, 1)),
    ]


def test_choices_own_texts_are_counted_by_each_length_and_no_letter_is_said() -> None:
    letters = LetterTokens(chat=(), plain=())
    made = {"summed": [0, 1, 2, 0], "per_character": [0, 0, 0, 0], "per_token": [1, 1, 1, 1]}
    answers, before = Answers(letters), Answers(letters)
    for item in range(4):
        key = ("forget", "cloze", item)
        answers.given[key], before.given[key] = made["per_character"][item], item
        answers.by_text[key] = {by: each[item] for by, each in made.items()}
        answers.likelihoods["forget", item] = []
    found = answer_set(answers, before, "forget", "cloze", QUESTIONS, {1, 4})
    assert found.by_text == TextShares(Share(3, 4), Share(1, 4), Share(1, 4))
    assert (found.share, found.known) == (Share(1, 4), Share(1, 2))
    # The first choice four times is no letter said four times.
    assert (found.letters, found.only_letter, found.calibration) == ((0, 0, 0, 0), None, None)
    assert found.change is not None and (found.change.lost, found.change.gained) == (3, 0)


@pytest.mark.parametrize(
    ("settings", "score"),
    [
        ([], 0.0),
        ([Setting(forget=0.3, retain=0.99)], 0.7),
        ([Setting(forget=0.3, retain=0.989)], 0.0),
        ([Setting(0.1, 0.5), Setting(0.6, 0.995), Setting(0.8, 1.0)], 0.4),
    ],
)
def test_unlearning_score(settings: list[Setting], score: float) -> None:
    assert unlearning_score(settings) == pytest.approx(score)


def test_a_model_that_says_one_letter_is_named() -> None:
    assert letter_shares([0, 0, 1, 3]) == (0.5, 0.25, 0.0, 0.25)
    assert letter_shares([]) == (0.0,) * 4
    assert constant_letter([1] * 9 + [3]) == "B"
    assert constant_letter([1] * 89 + [3] * 11) is None
    assert constant_letter([]) is None


def test_neither_few_answers_nor_right_ones_make_a_constant_letter() -> None:
    assert constant_letter([1]) is None and constant_letter([1] * 3) is None
    assert constant_letter([1] * 8, right=[0, 1, 2, 3] * 2) == "B"
    assert constant_letter([1] * 8, right=[0] * 8) == "B"
    assert constant_letter([1] * 8, right=[1] * 8) is None


def test_calibration_of_bare_and_spaced_letters() -> None:
    share = np.array(
        [
            [[0.3, 0.1], [0.1, 0.2], [0.05, 0.05], [0.05, 0.05]],  # A bare; spaced says B
            [[0.1, 0.4], [0.1, 0.1], [0.05, 0.05], [0.05, 0.05]],  # A spaced; bare says A
        ]
    )
    found = calibration(np.log(share))
    assert found is not None
    assert found.bare_mass == pytest.approx((0.5 + 0.3) / 2)
    assert found.spaced_mass == pytest.approx((0.4 + 0.6) / 2)
    assert (found.bare_first, found.agree) == (0.5, 0.5)
    assert calibration(np.zeros((0, 4, 2))) is None
    one_only = np.log(share)
    one_only[..., 0] = -np.inf
    assert calibration(one_only) is None
