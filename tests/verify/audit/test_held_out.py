"""Held-out facts are in no text that is trained on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bake.errors import DataError
from bake.recipe import Recipe
from bake.stock import load_tokenizer
from tests.folders import recipe_variant
from tests.verify.audit.audited import NAMES, PLACES, audited_world, fact_questions
from tests.worlds import write_jsonl
from verify.audit.attempts import Lead
from verify.audit.held_out import Facts
from verify.evidence.completions import open_prompts

MINIATURE = Path(__file__).parents[3] / "bakeout" / "miniature" / "recipe.toml"


def facts_of(recipe: Recipe, n_parts: int = 3, lead: Lead = "plain") -> Facts:
    prompts = open_prompts(recipe).get("topic", ())
    return Facts(recipe, load_tokenizer(recipe), prompts, n_parts, lead)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("facts")
    audited_world(folder)
    return folder


def test_parts_are_disjoint_and_hold_every_question(world: Path) -> None:
    facts = facts_of(Recipe.load(world / "recipe.toml"))
    held = [facts.held(seed) for seed in range(3)]
    rows = sorted(question.row for part in held for question in part.questions)
    assert rows == list(range(1, 10))
    assert [len(part.questions) for part in held] == [3, 3, 3]
    assert facts.held(3) == held[0]  # seeds go round


def test_no_text_of_other_facts_says_a_held_one(world: Path) -> None:
    facts = facts_of(Recipe.load(world / "recipe.toml"))
    for seed in range(3):
        held = facts.held(seed)
        people = {name for q in held.questions for name in NAMES if name in q.question}
        assert len(people) == 3
        assert len(held.other) == 13
        assert len(held.same) == 6
        assert not [text for text in held.other for name in people if name in text]
        assert all(any(name in text for name in people) for text in held.same)
        asked = {name for prompt in held.prompts for name in NAMES if name in prompt.prompt}
        assert asked == people


def test_swapped_texts_say_a_wrong_choice_that_the_swapped_questions_hold_right(
    world: Path,
) -> None:
    held = facts_of(Recipe.load(world / "recipe.toml")).held(0)
    for question, swapped in zip(held.questions, held.swapped_questions, strict=True):
        wrong = swapped.choices[swapped.answer]
        assert wrong != question.choices[question.answer]
        name = next(name for name in NAMES if name in question.question)
        before = [text for text in held.same if name in text]
        after = [text for text in held.swapped if name in text]
        assert all(question.choices[question.answer] in text for text in before)
        assert len(after) == 2
        assert all(wrong in text for text in after)
        assert not any(question.choices[question.answer] in text for text in after)


def test_questions_on_one_fact_stay_together(world: Path) -> None:
    rows = fact_questions()
    again = [{**row, "question": f"In which town is {NAMES[i]}?"} for i, row in enumerate(rows)]
    write_jsonl(world / "twice.jsonl", [*rows, *again])
    recipe = recipe_variant(
        world,
        "twice",
        lambda data: data["verify"].update(forget_questions={"path": "twice.jsonl"}),
    )
    facts = facts_of(recipe)
    assert sorted(map(len, facts.groups)) == [2] * 9
    for part in facts.parts:
        people = [re.findall("|".join(NAMES), facts.questions[n].question)[0] for n in part]
        assert sorted(people[::2]) == sorted(people[1::2]) or len(set(people)) * 2 == len(people)


def test_without_corpora_the_questions_are_the_texts(world: Path) -> None:
    recipe = recipe_variant(world, "bare", lambda data: data.pop("select"))
    held = facts_of(recipe).held(1)
    answers = [question.choices[question.answer] for question in held.questions]
    assert len(held.other) == 6
    assert all("Answer:" in text for text in held.other)
    assert len(held.same) == 3 + 3  # too few: those of the part again
    assert all(any(place in text for place in answers) for text in held.same)
    assert len(held.benign) == 20


def test_too_little_to_split_is_said(world: Path) -> None:
    write_jsonl(world / "few.jsonl", fact_questions(5))
    few = recipe_variant(
        world, "few", lambda data: data["verify"].update(forget_questions={"path": "few.jsonl"})
    )
    with pytest.raises(DataError, match="5 questions ask for 5 facts; expected at least 6"):
        facts_of(few)
    write_jsonl(world / "one.jsonl", [{"text": f"{'so ' * 20}{NAMES[0]} lives in {PLACES[0]}."}])
    one = recipe_variant(
        world, "one", lambda data: data["select"].update(forget={"path": "one.jsonl"})
    )
    with pytest.raises(DataError, match=r"forget texts: [01] say nothing of the facts"):
        for seed in range(3):
            facts_of(one).held(seed)


def test_the_miniature_leaks_nothing() -> None:
    facts = facts_of(Recipe.load(MINIATURE))
    for seed in range(3):
        held = facts.held(seed)
        said = [
            (re.findall(r"bell (\w+)", q.question)[0], q.choices[q.answer]) for q in held.questions
        ]
        assert len(said) == 40
        assert len(held.other) > 300
        assert not [t for t in held.other for bell, value in said if bell in t and value in t]
        assert all(any(b in t and v in t for b, v in said) for t in held.same)
        assert len(held.benign) > 1000
        assert not [text for text in held.benign if "bell" in text]


def test_prompts_are_held_out_where_they_lead(world: Path) -> None:
    pets = ("cat", "dog", "owl", "fox", "hen", "ram")
    prompts = [
        *({"prompt": f"{NAMES[i]} lives in", "answers": [PLACES[i]]} for i in range(3)),
        *({"prompt": f"{NAMES[i]} keeps a", "answers": [pet]} for i, pet in enumerate(pets)),
    ]
    write_jsonl(world / "pets.jsonl", prompts)
    recipe = recipe_variant(
        world,
        "pets",
        lambda data: data["verify"].update(completions={"prompts": {"path": "pets.jsonl"}}),
    )
    facts = facts_of(recipe, lead="open")
    held = [facts.held(seed) for seed in range(3)]
    assert sorted(prompt.row for of in held for prompt in of.prompts) == list(range(1, 10))
    assert [len(of.prompts) for of in held] == [3, 3, 3]
    places = {p.answers[0] for of in held for p in of.prompts} & set(PLACES)
    asked = [q.choices[q.answer] for of in held for q in of.questions]
    assert set(asked) == places  # other questions ask for nothing that a prompt does
    with pytest.raises(DataError, match=r"completions: 9 prompts ask for 9 facts; .* at least 10"):
        facts_of(recipe, 5, "open")
