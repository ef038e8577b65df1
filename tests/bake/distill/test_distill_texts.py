"""Texts for training: how they are split, cut and gone through."""

from __future__ import annotations

from collections import Counter
from itertools import permutations
from pathlib import Path

import pytest
import torch

from bake.distill.distill_texts import Rows, batches_of, load_sides
from bake.errors import DataError, RecipeError
from bake.questions.forms import chat_form
from bake.questions.multiple_choice import Question, load_questions
from bake.recipe import Recipe
from bake.stock import load_tokenizer
from tests.worlds import (
    RecipeWriter,
    tiny_base,
    tiny_tokenizer,
    tiny_words,
    write_jsonl,
    write_questions,
)

CLAMP = {"sae": {"path": "sae"}, "method": "clamp", "features": [1], "value": -6.0}
TABLE = {"forget": {"path": "forget.jsonl"}, "retain": {"path": "retain.jsonl"}, "seq_len": 24}


@pytest.fixture
def world(tmp_path: Path) -> Path:
    tiny_tokenizer(tiny_base(tmp_path / "base"))
    for seed, side in enumerate(("forget", "retain")):
        texts = [{"text": tiny_words(14 + n % 5, 100 * seed + n)} for n in range(40)]
        write_jsonl(tmp_path / f"{side}.jsonl", texts)
    return tmp_path


def test_texts_are_split_whole_and_cut(world: Path, write_recipe: RecipeWriter) -> None:
    recipe = Recipe.load(write_recipe(CLAMP, distill=TABLE))
    tokenizer = load_tokenizer(recipe)
    sides = load_sides(recipe, tokenizer, seed=3)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for side, texts in sides.items():
        pieces = texts.trained.ids + texts.held_out.ids
        assert all(piece[0] == bos and len(piece) <= 24 for piece in pieces)
        ends = {
            part: sum(piece[-1] == eos for piece in getattr(texts, part).ids)
            for part in ("trained", "held_out")
        }
        assert ends == {"trained": 36, "held_out": 4}, side
        whole = [
            {ids for ids in part.ids if len(ids) == 24} for part in (texts.trained, texts.held_out)
        ]
        assert all(whole) and not whole[0] & whole[1]
    again = load_sides(recipe, tokenizer, seed=3)
    assert again["forget"].trained.sha256 == sides["forget"].trained.sha256
    other = load_sides(recipe, tokenizer, seed=4)
    assert other["forget"].held_out != sides["forget"].held_out


def solved_in_any_order(question: Question) -> list[str]:
    """The question in chat form with its answer."""
    found = []
    for order in permutations(range(4)):
        choices = [question.choices[i] for i in order]
        right = "ABCD"[order.index(question.answer)]
        found.append(
            chat_form(question.question, choices, question.topic) + f"{right})<end_of_turn>"
        )
    return found


def test_questions_to_select_by_are_texts_too(world: Path, write_recipe: RecipeWriter) -> None:
    sides = ("forget", "retain")
    for seed, side in enumerate(sides):
        write_questions(world / f"{side}_picking.jsonl", 12, seed=seed)
        write_questions(world / f"{side}_questions.jsonl", 12, seed=10 + seed)
    verify = {f"{side}_questions": {"path": f"{side}_questions.jsonl"} for side in sides}
    verify |= {"text": {"path": "retain.jsonl"}}
    corpora = {side: TABLE[side] for side in sides}
    picking = {f"{side}_questions": {"path": f"{side}_picking.jsonl"} for side in sides}
    table = {"seq_len": 256}
    alone = Recipe.load(write_recipe(CLAMP, distill=table, select=corpora, verify=verify))
    asked = Recipe.load(write_recipe(CLAMP, distill=table, select=corpora | picking, verify=verify))
    tokenizer = load_tokenizer(asked)
    without = load_sides(alone, tokenizer, seed=0)["forget"]
    texts = load_sides(asked, tokenizer, seed=0)["forget"]
    # Those alone come first, and a tenth of the questions, in whatever order, is held out.
    assert texts.trained.ids[: len(without.trained.ids)] == without.trained.ids
    more = {
        part: getattr(texts, part).ids[len(getattr(without, part).ids) :]
        for part in ("trained", "held_out")
    }
    assert asked.select is not None and asked.select.forget_questions is not None
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    written = {
        (bos, *tokenizer(of, add_special_tokens=False)["input_ids"], eos): question.row
        for question in load_questions(asked.select.forget_questions, asked)
        for of in solved_in_any_order(question)
    }
    of_part = {part: Counter(written[row] for row in rows) for part, rows in more.items()}
    assert {part: (len(of), set(of.values())) for part, of in of_part.items()} == {
        "trained": (10, {8}),
        "held_out": (2, {8}),
    }
    assert not of_part["trained"].keys() & of_part["held_out"].keys()
    write_questions(world / "forget_picking.jsonl", 12, seed=10)
    with pytest.raises(DataError, match=r"\[select\] and \[verify\] share 12"):
        load_sides(asked, tokenizer, seed=0)


def test_a_corpus_too_small_to_split(world: Path, write_recipe: RecipeWriter) -> None:
    write_jsonl(world / "forget.jsonl", [{"text": tiny_words(14, n)} for n in range(9)])
    recipe = Recipe.load(write_recipe(CLAMP, distill=TABLE))
    with pytest.raises(DataError, match=r"forget.jsonl: has 9 texts .* expected at least 10"):
        load_sides(recipe, load_tokenizer(recipe), seed=0)


def test_no_texts_are_named(world: Path, write_recipe: RecipeWriter) -> None:
    recipe = Recipe.load(write_recipe(CLAMP))
    with pytest.raises(RecipeError, match="names no texts to train on; expected a \\[distill\\]"):
        load_sides(recipe, load_tokenizer(recipe), seed=0)


def test_every_row_is_gone_through_before_any_again() -> None:
    rows = Rows(tuple(tuple(range(2 + n % 7)) for n in range(50)))
    plan = batches_of(rows, size=4, n_steps=30, seed="x")
    assert len(plan) == 30
    first, second = ([n for batch in plan[at : at + 13] for n in batch] for at in (0, 13))
    assert sorted(first) == sorted(second) == list(range(50)) and first != second
    assert plan == batches_of(rows, size=4, n_steps=30, seed="x")
    assert plan[:20] == batches_of(rows, size=4, n_steps=20, seed="x")
    assert batches_of(rows, size=4, n_steps=0, seed="x") == []


def test_padding() -> None:
    ids, real = Rows(((2, 5, 6), (2, 7))).padded()
    assert ids.tolist() == [[2, 5, 6], [2, 7, 0]]
    assert torch.equal(real, torch.tensor([[True, True, True], [True, True, False]]))
