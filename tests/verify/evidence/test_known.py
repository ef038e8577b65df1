from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bake.errors import ModelError, OutputError
from bake.questions.answers import letter_tokens
from bake.questions.forms import chat_text
from bake.questions.multiple_choice import Question, load_questions
from bake.questions.orders import ORDERS, in_order
from bake.recipe import Recipe
from bake.sources import QuestionSource
from bake.stock import load_base, load_tokenizer
from tests.engines import PlainOnly, Speaker
from tests.logits import every_logit
from tests.worlds import save_sae_lens, tiny_base, tiny_sae, tiny_tokenizer, write_questions
from verify.engines.runners import HookedRunner, Reading, Runner
from verify.evidence.known import measure_known, model_digest, order_ids, score_orders
from verify.journal import Journal
from verify.material import Material
from verify.reference.oracle import Oracle
from verify.reference.whole_sae import load_sites
from verify.report.measures import KnownSet, Share

QUESTION = Question("Which?", ("w", "x", "y", "z"), 2, "bells", row=7)


def test_every_order_once_and_the_answer_moves_along() -> None:
    assert len(set(ORDERS)) == 24
    for order in ORDERS:
        moved = in_order(QUESTION, order)
        assert moved.choices[moved.answer] == "y"
        assert [QUESTION.choices[choice] for choice in order] == list(moved.choices)
        assert replace(moved, choices=QUESTION.choices, answer=2) == QUESTION
    assert in_order(QUESTION, ORDERS[0]) == QUESTION


class World:
    """A tiny base and reference, a tokenizer and questions."""

    def __init__(self, folder: Path, write_recipe: Callable[..., Path]) -> None:
        tiny_base(folder / "base")
        tiny_tokenizer(folder / "base")
        save_sae_lens(folder / "sae", tiny_sae())
        table = {"sae": {"path": "sae"}, "method": "clamp", "features": [0, 1], "value": -5.0}
        recipe = Recipe.load(write_recipe(table))
        write_questions(folder / "q.jsonl", 3, subject="bells")
        self.questions = load_questions(QuestionSource(path="q.jsonl"), recipe)
        self.oracle = Oracle(load_base(recipe), load_sites(recipe))
        self.base = HookedRunner("base", self.oracle.model)
        self.reference = HookedRunner("reference", self.oracle.model, self.oracle)
        self.tokenizer: Any = load_tokenizer(recipe)
        letters = letter_tokens(self.tokenizer)
        self.material = Material({"forget": self.questions}, [], letters, self.tokenizer)


@pytest.fixture
def world(tmp_path: Path, write_recipe: Callable[..., Path]) -> World:
    return World(tmp_path, write_recipe)


def separately(runner: Runner, question: Question, world: World) -> np.ndarray:
    """[24, 4, 2], one whole prompt after another, every logit formed."""
    found = []
    for order in itertools.permutations(question.choices):
        shown = replace(question, choices=order)
        text = chat_text(shown)
        ids = torch.tensor([[2, *world.tokenizer(text, add_special_tokens=False)["input_ids"]]])
        logits = every_logit(runner, ids, torch.ones_like(ids))[0, -1]
        likelihoods = logits.double().log_softmax(-1)
        names = [[letter, f"\u2581{letter}"] for letter in "ABCD"]
        tokens = [world.tokenizer.convert_tokens_to_ids(pair) for pair in names]
        found.append([[float(likelihoods[t]) for t in pair] for pair in tokens])
    return np.array(found)


@pytest.mark.parametrize("tree_tokens", [2048, 150])
def test_orders_score_as_separate_prompts(
    world: World, tree_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("verify.engines.scoring.TREE_TOKENS", tree_tokens)
    for cost in ("PASS", "PAIR"):  # which cost a tiny model more than a tree saves
        monkeypatch.setattr(f"verify.engines.token_tree.{cost}", 0.0)
    scored: dict[str, np.ndarray] = {}
    for runner in (world.base, world.reference, PlainOnly(world.reference)):
        found = [
            score_orders(runner, question, order_ids(question, world.material), world.material)
            for question in world.questions
        ]
        assert [scores.row for scores in found] == [1, 2, 3]
        scored[runner.name] = np.stack([scores.log_likelihoods for scores in found])
        whole = world.base if runner is world.base else world.reference
        for scores, question in zip(found, world.questions, strict=True):
            expected = separately(whole, question, world)
            np.testing.assert_allclose(scores.log_likelihoods, expected, rtol=0, atol=1e-4)
            best = expected.max(-1).argmax(-1)
            orders = itertools.permutations(range(4))
            right = [o[b] == question.answer for o, b in zip(orders, best, strict=True)]
            assert scores.n_right == sum(right)
            assert scores.known is all(right)
    assert np.abs(scored["base"] - scored["reference"]).max() > 1e-2
    np.testing.assert_allclose(scored["onnx"], scored["reference"], rtol=0, atol=1e-4)


class Knows(Speaker):
    """An engine that finds the choice "right" where the question is one of those it knows."""

    name = "base"

    def __init__(self, tokenizer: Any, known: set[str], sometimes: set[str]) -> None:
        self.tokenizer, self.known, self.sometimes = tokenizer, known, sometimes
        self.asked = 0

    def next(self, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        self.asked += len(input_ids)
        out = torch.zeros(len(input_ids), len(self.tokenizer))
        for row, ids in enumerate(input_ids):
            lines = self.tokenizer.decode(ids).replace("<end_of_turn>", "").split("\n")
            name = next(line for line in lines if line.endswith("?"))[:-1]
            letters = [line[0] for line in lines if line[1:] == ". right"]
            says = letters[0] if name in self.known | self.sometimes else "A"
            if name in self.sometimes and says == "D":
                says = "C"
            out[row, self.tokenizer.convert_tokens_to_ids(says)] = 5.0
        return out


@pytest.fixture
def asked() -> list[Question]:
    names = ("first", "second", "third", "fourth")
    return [
        Question(f"{name}?", ("right", "w", "x", "y"), 0, None, row=10 + n)
        for n, name in enumerate(names)
    ]


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Knows]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path / "tokenizer"))
    yield Knows(tokenizer, known={"second", "fourth"}, sometimes={"third"})


def find(
    engine: Knows,
    asked: list[Question],
    cache: Path | None,
    model: str = "m",
    unlearned: Runner | None = None,
    journal: Journal | None = None,
) -> tuple[tuple[int, ...], KnownSet]:
    material = Material({"forget": asked}, [], letter_tokens(engine.tokenizer), engine.tokenizer)
    rows, (known,) = measure_known(
        engine,
        unlearned or Nothing(engine.tokenizer),
        material,
        model=model,
        cache=cache,
        journal=journal or Journal(),
        progress=lambda *_: None,
    )
    assert known.known == len(rows["forget"])
    return rows["forget"], known


class Nothing(Knows):
    """An engine that knows nothing and always says A."""

    name = "checkpoint"

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, set(), set())


def test_known_is_right_under_every_order(engine: Knows, asked: list[Question]) -> None:
    rows, known = find(engine, asked, None)
    assert rows == (11, 13)
    assert engine.asked == 4 * 24
    # Who always says A is right under a quarter of the orders, and knows nothing.
    expected = KnownSet("forget", 4, 2, "checkpoint", Share(0, 2), Share(12, 48))
    assert known == expected
    still = Knows(engine.tokenizer, {"first", "second"}, {"fourth"})
    still.name = "checkpoint"
    _, known = find(engine, asked, None, unlearned=still)
    assert (known.still_known, known.orders) == (Share(1, 2), Share(24 + 18, 48))
    assert still.asked == 2 * 24  # only what the base knows


class Reads(Runner):
    """An engine to which the text of " right" is likely where it knows the question."""

    def __init__(self, name: str, tokenizer: Any, known: set[str]) -> None:
        self.name, self.tokenizer, self.known = name, tokenizer, known
        self.asked = 0

    def read(
        self, ids: torch.Tensor, mask: torch.Tensor, wanted: torch.Tensor, scored: torch.Tensor
    ) -> Reading:
        assert not wanted.any()  # no logits are formed
        self.asked += len(ids)
        losses = []
        for row, of in zip(ids, scored, strict=True):
            text = self.tokenizer.decode(row)
            assert text.count("<bos>") == 1 and "A. " not in text
            question, answer = text.split("Question: ")[1].split("?\nAnswer:")
            likely = (answer == " right") == (question in self.known)
            losses += [0.5 if likely else 2.0] * int(of.sum())
        return Reading(torch.zeros(0, len(self.tokenizer)), torch.tensor(losses).double())

    def go_on(self, *_: Any) -> torch.Tensor:
        raise NotImplementedError


def test_where_order_means_nothing_a_question_is_asked_once(
    engine: Knows, asked: list[Question], tmp_path: Path
) -> None:
    tokenizer = engine.tokenizer
    base = Reads("base", tokenizer, {"first", "third", "fourth"})
    after = Reads("checkpoint", tokenizer, {"fourth"})
    material = Material({"forget": asked}, [], letter_tokens(tokenizer), tokenizer, "cloze")

    def found(journal: Journal) -> Any:
        return measure_known(
            *(base, after, material),
            model="m",
            cache=tmp_path / "cache",
            journal=journal,
            progress=lambda *_: None,
        )

    rows, (known,) = found(Journal())
    assert rows == {"forget": (10, 12, 13)}
    assert known == KnownSet("forget", 4, 3, "checkpoint", Share(1, 3), Share(1, 3), "cloze")
    assert (base.asked, after.asked) == (4 * 4, 3 * 4)  # each choice once
    assert found(Journal())[0] == rows
    assert base.asked == 4 * 4  # kept
    in_chat = find(engine, asked, tmp_path / "cache")[0]
    assert in_chat == (11, 13) and len(list((tmp_path / "cache").iterdir())) == 2


def test_an_interrupted_run_asks_no_question_twice(
    engine: Knows, asked: list[Question], tmp_path: Path
) -> None:
    whole = find(engine, asked, None)
    engine.asked, path = 0, tmp_path / "journal.jsonl"
    found = None
    while found is None:
        journal = Journal(path)
        pieces, once = 0, journal.once

        def interrupted(name: str, compute: Callable[[], Any]) -> Any:
            nonlocal pieces
            pieces += not journal.has(name)  # noqa: B023
            if pieces > 1:
                raise KeyboardInterrupt
            return once(name, compute)  # noqa: B023

        journal.once = interrupted  # type: ignore[method-assign]
        with contextlib.suppress(KeyboardInterrupt):
            found = find(engine, asked, None, journal=journal)
        journal.close()
    assert found == whole
    assert engine.asked == 4 * 24


def test_known_questions_are_kept_per_model_and_questions(
    engine: Knows, asked: list[Question], tmp_path: Path
) -> None:
    cache = tmp_path / "new" / "cache"
    assert find(engine, asked, cache)[0] == (11, 13)
    before = engine.asked
    assert find(engine, asked, cache)[0] == (11, 13)
    assert engine.asked == before
    others = (
        *([replace(asked[0], topic="bells"), *asked[1:]], asked[:-1], asked[::-1]),
        *([replace(asked[0], answer=1), *asked[1:]], [replace(asked[0], question="?"), *asked[1:]]),
    )
    for number, questions in enumerate(others, 1):
        find(engine, questions, cache)
        assert engine.asked > before
        before = engine.asked
        assert len(list(cache.iterdir())) == 1 + number
    find(engine, asked, cache, model="other")
    assert engine.asked > before


@pytest.mark.parametrize("text", ["{", "[]", '{"key": "x", "known": [1]}', '{"known": [1]}', ""])
def test_a_damaged_cache_is_made_anew(
    engine: Knows, asked: list[Question], tmp_path: Path, text: str
) -> None:
    find(engine, asked, tmp_path / "cache")
    (path,) = (tmp_path / "cache").iterdir()
    whole = path.read_bytes()
    wrong = json.loads(whole) | {"known": ["11"]}
    for damaged in (text, json.dumps(wrong)):
        path.write_text(damaged)
        assert find(engine, asked, tmp_path / "cache")[0] == (11, 13)
        assert path.read_bytes() == whole
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_one_line(
    engine: Knows, asked: list[Question], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="known questions cannot be kept there") as caught:
        find(engine, asked, tmp_path / "file")
    assert "\n" not in str(caught.value)


def test_digests_tell_models_apart(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    with pytest.raises(ModelError, match="is no folder with files"):
        model_digest(model)
    with pytest.raises(ModelError, match="is no folder with files"):
        model_digest(tmp_path / "gone")
    weights = model / "model.safetensors"
    weights.write_bytes(b"weights")
    first = model_digest(model)
    assert model_digest(model) == first
    os.utime(weights, ns=(1, 1))
    assert len({first, model_digest(model)}) == 2
    weights.write_bytes(b"other weights")
    os.utime(weights, ns=(1, 1))
    assert len({first, model_digest(model)}) == 2
