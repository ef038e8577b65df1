"""What guessing gives, by counting; and what the base says to choices without their question."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bake.questions.multiple_choice import load_questions
from bake.stock import load_base, load_tokenizer
from tests.folders import baked_world, recipe_variant
from verify.evidence.kinds import lines_of
from verify.guessing import guess_of, together
from verify.report.measures import Guess
from verify.report.reading import report_from_dict
from verify.report.wording import guess_text
from verify.run import verify_folder


def test_the_longest_choice_and_chance() -> None:
    choices = [
        ["a", "bbb", "cc", "d"],
        ["aaaa", "b", "cccc", "d"],
        ["a", "b", "c", "d"],
        ["x", "yy"],
    ]
    guess = guess_of("forget", choices, [1, 2, 3, 0])
    assert guess.n == 4
    assert guess.at_random == pytest.approx((0.25 * 3 + 0.5) / 4)
    assert guess.longest == pytest.approx((1 + 0.5 + 0.25 + 0) / 4)


def test_choices_of_one_length_are_chance() -> None:
    rng = np.random.default_rng(0)
    answers = rng.integers(4, size=400).tolist()
    guess = guess_of("t", [["ab", "cd", "ef", "gh"]] * 400, answers)
    assert guess.longest == pytest.approx(guess.at_random) == pytest.approx(0.25)


def test_several_sets_count_by_their_questions() -> None:
    both = together("g", [Guess("a", 1, 0.25, 1.0), Guess("b", 3, 0.5, 0.0)])
    assert (both.source, both.n) == ("g", 4)
    assert (both.at_random, both.longest) == pytest.approx((0.4375, 0.25))


def test_words() -> None:
    assert guess_text(Guess("a", 8, 0.25, 0.5)) == "at random 0.250, the longest choice 0.500"
    said = guess_text(Guess("a", 8, 0.25, 0.5, 0.375))
    assert said.endswith(", the base without the question 0.375")


@pytest.mark.parametrize("form", ["plain", "cloze"])
def test_a_report_says_what_the_base_guesses(tmp_path: Path, form: str) -> None:
    """By the whole way, against one prompt after another; and read back."""
    work = baked_world(tmp_path, [1, 5, 9])
    recipe = recipe_variant(work, "other", lambda data: data["verify"].update(prompt=form))
    found = verify_folder(work / "checkpoint", recipe, frozenset({"choices"}))
    assert [guess.source for guess in found.guessing] == ["forget", "retain"]
    assert report_from_dict(json.loads(json.dumps(found.to_dict()))).guessing == found.guessing
    assert any(line.startswith("guessing   forget: at random 0.250") for line in lines_of(found))
    model, tokenizer = load_base(recipe), load_tokenizer(recipe)
    assert recipe.verify is not None
    questions = load_questions(recipe.verify.forget_questions, recipe)
    right = 0
    for question in questions:
        topic = f" about {question.topic}" if question.topic else ""
        lettered = "\n".join(f"{a}. {c}" for a, c in zip("ABCD", question.choices, strict=True))
        asked = f"The following are multiple choice questions (with answers){topic}.\n\n\n"
        text, endings = f"{asked}{lettered}\nAnswer:", [" A", " B", " C", " D"]
        if form == "cloze":
            text = f"The following are questions (with answers){topic}.\n\nQuestion: \nAnswer:"
            endings = [f" {choice}" for choice in question.choices]
        scores = []
        for ending in endings:
            before, whole = (tokenizer(of)["input_ids"] for of in (text, text + ending))
            with torch.no_grad():
                likely = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
            places = range(len(before), len(whole))
            total = sum(float(likely[at - 1, whole[at]]) for at in places)
            scores.append(total / (len(ending) - 1))
        right += scores.index(max(scores)) == question.answer
    assert found.guessing[0].unasked == pytest.approx(right / len(questions))
