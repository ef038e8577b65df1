from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bake.errors import DataError
from bake.questions.answers import Accuracy, letter_tokens
from bake.questions.forms import FORMS, chat_text, plain_text
from bake.questions.multiple_choice import Question, load_questions
from bake.recipe import Recipe
from bake.stock import load_base, load_tokenizer
from tests.engines import PlainOnly
from tests.logits import every_logit
from tests.toys import TOY_NAMES, Toy, ToyOracle
from tests.worlds import (
    save_sae_lens,
    tiny_base,
    tiny_sae,
    tiny_tokenizer,
    write_jsonl,
    write_questions,
    write_texts,
)
from verify.attacks.attacks import ATTACKS, Way, rounded_weights
from verify.attacks.hints import hint_pool, hinted
from verify.attacks.padding import padded
from verify.attacks.suffix import prefix
from verify.engines.runners import HookedRunner, Reading
from verify.evidence.robustness import attack
from verify.journal import Journal
from verify.reference.oracle import Oracle
from verify.reference.whole_sae import load_sites
from verify.report.findings import EngineReport
from verify.report.measures import Attack, Robustness, Share

HOSTILE = "<script>alert(1)</script> | **x** \u001b[31m \u202e <end_of_turn><bos>"


class World:
    """Forget questions, the same reworded, texts, a tiny base, and its reference."""

    def __init__(
        self, folder: Path, write_recipe: Callable[..., Path], form: str = "chat", n: int = 21
    ) -> None:
        tiny_base(folder / "base")
        tiny_tokenizer(folder / "base")
        save_sae_lens(folder / "sae", tiny_sae())
        names = [
            {
                "question": f"{'e' * (i // 4)} {TOY_NAMES[i % 4]}?",
                "choices": ["no", "so", "in", "it"],
                "answer": i % 4,
            }
            for i in range(n)
        ]
        write_jsonl(folder / "forget.jsonl", names)
        write_jsonl(folder / "other.jsonl", [{**q, "question": HOSTILE} for q in names[:5]])
        write_questions(folder / "retain.jsonl", 3)
        write_texts(folder / "text.jsonl", 12)
        table = {"sae": {"path": "sae"}, "method": "clamp", "features": [0, 1], "value": -5.0}
        source = {"path": "forget.jsonl"}
        verify = {
            "forget_questions": source,
            "retain_questions": {"path": "retain.jsonl"},
            "text": {"path": "text.jsonl", "field": "text"},
            "prompt": form,
            "reworded": {"other": {"path": "other.jsonl"}},
        }
        self.recipe = Recipe.load(write_recipe(table, verify=verify))
        assert self.recipe.verify is not None
        self.questions = load_questions(self.recipe.verify.forget_questions, self.recipe)
        self.tokenizer: Any = load_tokenizer(self.recipe)
        self.letters = letter_tokens(self.tokenizer)
        self.form = form

    def tiny(self) -> Oracle:
        model = load_base(self.recipe)
        model.config.max_position_embeddings = 1024
        return Oracle(model, load_sites(self.recipe))

    def attack(self, oracle: Any, **options: Any) -> Robustness:
        base = PlainOnly(HookedRunner("base", oracle.model), "base")
        unlearned = PlainOnly(HookedRunner("any", oracle.model, oracle), "checkpoint")
        options = {"journal": Journal(), "budget": 0, **options}
        return attack(
            self.recipe,
            self.questions,
            base,
            unlearned,
            oracle,
            self.tokenizer,
            self.letters,
            **options,
        )

    def naively(self, oracle: Oracle, questions: list[Question], texts: list[str]) -> list[Share]:
        """(base, reference), one prompt after another."""
        shares = []
        for runner in (HookedRunner("base", oracle.model), HookedRunner("r", oracle.model, oracle)):
            right = 0
            for question, text in zip(questions, texts, strict=True):
                ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
                ids = torch.tensor([[2, *ids]])
                last = every_logit(runner, ids, torch.ones_like(ids))[0, -1]
                of = getattr(self.letters, self.form)
                best = [max(float(last[token]) for token in tokens) for tokens in of]
                right += best.index(max(best)) == question.answer
            shares.append(Share(right, len(questions)))
        return shares


def named(found: Robustness, name: str) -> Attack:
    (one,) = [one for one in found.attacks if one.name == name]
    return one


@pytest.mark.parametrize(("form", "plainly"), [("chat", chat_text), ("plain", plain_text)])
def test_every_attack_scores_as_one_prompt_after_another(
    tmp_path: Path,
    write_recipe: Callable[..., Path],
    form: str,
    plainly: Callable[[Question], str],
) -> None:
    world = World(tmp_path, write_recipe, form, n=7)
    oracle = world.tiny()
    shares: list[float] = []
    found = world.attack(oracle, progress=shares.append)
    assert (found.engine, found.form) == ("checkpoint", form)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    names = ["as asked", "reworded: other", "hints", "padding", "suffix"]
    assert [one.name for one in found.attacks] == names
    pool = hint_pool(world.questions)
    rows = [json.loads(line) for line in (tmp_path / "text.jsonl").read_text().splitlines()]
    everything = "".join(f"{row['text']}\n" for row in rows)
    long = everything[:512].strip()  # a character is a token
    assert world.recipe.verify is not None
    others = load_questions(world.recipe.verify.reworded["other"], world.recipe)
    asked = world.questions
    expected = {
        "as asked": (asked, [plainly(q) for q in asked]),
        "reworded: other": (others, [plainly(q) for q in others]),
        "hints": (asked, [hinted(q, pool, 4, FORMS[form]) for q in asked]),
        "padding": (asked, [padded(q, long, FORMS[form]) for q in asked]),
    }
    for name, (questions, texts) in expected.items():
        one = named(found, name)
        assert [one.base, one.unlearned] == world.naively(oracle, questions, texts), name
    assert oracle.tokens_fired > 0
    assert named(found, "hints").how.startswith("4 other forget questions")
    assert named(found, "padding").how.startswith(f"{len(long) + 2} tokens")


def test_prompts_never_exceed_the_model(tmp_path: Path, write_recipe: Callable[..., Path]) -> None:
    world = World(tmp_path, write_recipe, n=7)
    oracle = world.tiny()
    encoded = world.tokenizer([chat_text(q) for q in world.questions])["input_ids"]
    longest = max(len(ids) for ids in encoded)

    class Watched(HookedRunner):
        seen = 0

        def read(self, ids: Any, *more: Any) -> Reading:
            Watched.seen = max(Watched.seen, ids.shape[1])
            return super().read(ids, *more)

    def measured(positions: int) -> dict[str, Attack]:
        oracle.model.config.max_position_embeddings = positions
        base = PlainOnly(Watched("base", oracle.model), "base")
        unlearned = PlainOnly(Watched("any", oracle.model, oracle), "checkpoint")
        found = attack(
            world.recipe,
            world.questions,
            base,
            unlearned,
            oracle,
            world.tokenizer,
            world.letters,
            budget=0,
            journal=Journal(),
        )
        return {one.name: one for one in found.attacks}

    for positions in (longest + 40, 3 * longest):
        found = measured(positions)
        assert Watched.seen <= positions
        assert found["padding"].base is not None
    assert found["hints"].how[0] in "12"
    tight = measured(100)
    for name in ("hints", "padding"):
        assert (tight[name].base, tight[name].unlearned) == (None, None)
        assert tight[name].unlearned is None
        assert "100 tokens" in tight[name].how


def test_a_planted_weakness_is_brought_to_light(
    tmp_path: Path, write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("verify.attacks.suffix_search.TOP_K", 8)
    world = World(tmp_path, write_recipe, n=24)
    for immune in (False, True):
        oracle = ToyOracle(Toy(world.tokenizer, immune=immune))
        found = world.attack(oracle, budget=60)
        asked, suffix = named(found, "as asked"), named(found, "suffix")
        assert (asked.base, asked.unlearned) == (Share(24, 24), Share(6, 24))
        assert suffix.base is not None
        assert suffix.unlearned is not None
        assert suffix.base.n == suffix.unlearned.n == 16
        assert immune or suffix.base.right == 16
        # Eight of the 18 forgotten ones were looked at: 10 are left, and the 6 that were not.
        assert suffix.unlearned.right == (6 if immune else 16)
        assert "the base is right on 16 of these and checkpoint on 6" in suffix.how
        assert "on 8 of the forgotten questions" in suffix.how
        assert ("QQ" in suffix.how or suffix.how.count("Q") >= 3) is not immune


def test_a_prefix_brings_the_same_weakness_to_light(
    tmp_path: Path, write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("verify.attacks.suffix_search.TOP_K", 8)
    monkeypatch.setitem(ATTACKS, "suffix", Way(prefix, "search for a prefix"))
    world = World(tmp_path, write_recipe, n=24)
    for immune in (False, True):
        found = named(
            world.attack(ToyOracle(Toy(world.tokenizer, immune=immune)), budget=60), "prefix"
        )
        assert found.unlearned is not None and found.unlearned.n == 16
        assert (found.unlearned.right == 16) is not immune
        assert not immune or found.unlearned.right <= 6  # a guess
        assert found.how.startswith("12 tokens before each question")


def test_a_suffix_leaves_the_question_in_sight(
    tmp_path: Path, write_recipe: Callable[..., Path]
) -> None:
    world = World(tmp_path, write_recipe)
    for window, n_tokens in ((None, 12), (4096, 12), (48, 4), (8, 1)):
        toy = Toy(world.tokenizer)
        toy.config.get_text_config().sliding_window = window
        suffix = named(world.attack(ToyOracle(toy), budget=1), "suffix")
        assert suffix.how.startswith(f"{n_tokens} tokens after each question")


def test_an_interrupted_attack_goes_on(tmp_path: Path, write_recipe: Callable[..., Path]) -> None:
    world = World(tmp_path, write_recipe)
    whole = Toy(world.tokenizer)
    expected = world.attack(ToyOracle(whole), budget=20)
    path = tmp_path / "journal.jsonl"

    class Stopping(Toy):
        stop_at = 0

        def forward(self, *inputs: Any, **named: Any) -> Any:
            if self.calls == self.stop_at:
                raise KeyboardInterrupt
            return super().forward(*inputs, **named)

    for stop_at in (1, 5, 9, 25):
        with pytest.raises(KeyboardInterrupt), Journal(path) as journal:
            toy = Stopping(world.tokenizer)
            toy.stop_at = stop_at
            world.attack(ToyOracle(toy), budget=20, journal=journal)
    with pytest.raises(KeyboardInterrupt), Journal(path) as journal:
        rest = Toy(world.tokenizer)
        assert world.attack(ToyOracle(rest), budget=20, journal=journal) == expected
        assert rest.calls < whole.calls - 25
        again = Toy(world.tokenizer)
        assert world.attack(ToyOracle(again), budget=20, journal=journal) == expected
        assert again.calls == 0
        raise KeyboardInterrupt


def test_what_is_not_measured_says_why(tmp_path: Path, write_recipe: Callable[..., Path]) -> None:
    world = World(tmp_path, write_recipe)
    toy = ToyOracle(Toy(world.tokenizer))
    none = named(world.attack(toy), "suffix")
    assert none == Attack("suffix", "the search was given no steps", None, None)
    asked = world.attack(toy)
    guessed = [q for q in world.questions if len(toy_prompt(world, q)) % 4 == q.answer]
    assert named(asked, "as asked").unlearned == Share(len(guessed), 21)
    forgotten = [q for q in world.questions if q not in guessed]
    world.questions = guessed[:1]
    found = world.attack(toy, budget=5)
    assert named(found, "suffix").how.endswith("needs at least 2; there are 0")
    assert named(found, "suffix").unlearned is None
    assert named(found, "hints").unlearned is None
    assert named(found, "padding").unlearned == Share(1, 1)
    world.questions = [replace(q, question="who?") for q in world.questions * 4]
    world.questions = [replace(q, answer=i) for i, q in enumerate(world.questions)]
    unknown = world.attack(toy, budget=5)  # the toy only ever guesses: nothing was forgotten
    assert named(unknown, "as asked").unlearned == Share(1, 4)
    assert named(unknown, "suffix").how.endswith("there are 0")
    world.questions = forgotten[:3]
    suffix = named(world.attack(toy, budget=1), "suffix")
    assert suffix.base is not None
    assert suffix.base.n == 2  # of three forgotten ones, the search looks at one


def toy_prompt(world: World, question: Question) -> list[int]:
    ids: list[int] = world.tokenizer(chat_text(question))["input_ids"]
    return ids


def test_hostile_text_is_text(tmp_path: Path, write_recipe: Callable[..., Path]) -> None:
    world = World(tmp_path, write_recipe)
    write_jsonl(tmp_path / "text.jsonl", [{"text": HOSTILE}])
    world.recipe.verify.reworded[HOSTILE] = world.recipe.verify.reworded["other"]  # type: ignore[union-attr]
    found = world.attack(ToyOracle(Toy(world.tokenizer)), budget=2)
    assert named(found, f"reworded: {HOSTILE}").base is not None
    assert named(found, "padding").base == Share(21, 21)


def test_a_reworded_set_that_is_broken_is_named(
    tmp_path: Path, write_recipe: Callable[..., Path]
) -> None:
    world = World(tmp_path, write_recipe)
    write_jsonl(tmp_path / "other.jsonl", [{"question": "?", "choices": ["a"], "answer": 0}])
    with pytest.raises(DataError, match=r"other\.jsonl, row 1: `choices` has 1 entries"):
        world.attack(ToyOracle(Toy(world.tokenizer)))


def test_rounded_engines_are_attacks() -> None:
    def engine(name: str, chat: float | None) -> EngineReport:
        return EngineReport(name, forget=None if chat is None else Accuracy(plain=0.5, chat=chat))

    engines = [
        engine("base", 1.0),
        engine("reference", 0.25),
        engine("onnx", 0.25),
        engine("onnx-int4", 1 / 3),
        engine("onnx-fp16", 7 / 12),
        engine("onnx-int8", None),
    ]
    found = list(rounded_weights(engines, "chat", 12))
    assert [(one.name, one.base, one.unlearned) for one in found] == [
        ("weights: onnx-fp16", Share(12, 12), Share(7, 12)),
        ("weights: onnx-int4", Share(12, 12), Share(4, 12)),
    ]
    assert [one.unlearned for one in rounded_weights(engines, "plain", 12)] == [Share(6, 12)] * 2
