"""Variants side by side: tallies by hand, the same after an interruption, hostile text as text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from bake.errors import DataError, RecipeError
from bake.questions.answers import letter_tokens
from bake.questions.multiple_choice import load_questions
from bake.recipe import Recipe
from bake.stock import load_base, load_tokenizer
from tests.engines import Speaker
from tests.logits import every_logit
from tests.worlds import (
    save_sae_lens,
    tiny_base,
    tiny_sae,
    tiny_tokenizer,
    tiny_words,
    write_jsonl,
    write_questions,
)
from verify.engines.runners import HookedRunner, Reading
from verify.evidence.asking import SHIFTED_TOKENS, VARIANTS, most_moved
from verify.evidence.completions import complete
from verify.journal import Journal
from verify.reference.oracle import Oracle, reconstruct_residual
from verify.reference.whole_sae import load_sites
from verify.report.measures import Completions, Share


class Says(Speaker):
    """An engine that goes on with texts as told, and answers every question with one letter."""

    def __init__(self, name: str, tokenizer: Any, lines: dict[str, str], letter: str) -> None:
        self.name, self.tokenizer, self.lines, self.letter = name, tokenizer, lines, letter
        self.seen: list[str] = []

    def next(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(len(ids), len(self.tokenizer))
        for row, (one, real) in enumerate(zip(ids, mask, strict=True)):
            text = self.tokenizer.decode(one[real.bool()])
            self.seen.append(text)
            out[row, self._says(text)] = 9.0
        return out

    def _says(self, text: str) -> int:
        if text.endswith("Answer: ("):
            return int(self.tokenizer.convert_tokens_to_ids(self.letter))
        prompt = max((p for p in self.lines if p in text), key=len)
        said = text.rpartition(prompt)[2]
        left = self.lines[prompt].removeprefix(said)
        ids = self.tokenizer(left, add_special_tokens=False)["input_ids"] if left else [1]
        return int(ids[0])


def recipe_in(folder: Path, write_recipe: Any, **completions: Any) -> Recipe:
    verify: dict[str, Any] = {
        "forget_questions": {"path": "q.jsonl"},
        "retain_questions": {"path": "q.jsonl"},
        "text": {"path": "t.jsonl"},
    }
    if completions:
        verify["completions"] = completions
    write_questions(folder / "q.jsonl", 6, subject="bells")
    table = {"sae": {"path": "sae"}, "method": "clamp", "features": [0, 1], "value": -5.0}
    return Recipe.load(write_recipe(table, verify=verify))


class Scripted:
    """Prompts, and three engines that say known things."""

    def __init__(self, folder: Path, write_recipe: Any) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer(folder / "tokenizer"))
        rows = [
            {"prompt": "ab", "answers": ["kim", "tom"]},
            {"prompt": "<start_of_turn>user\ncd", "answers": ["lea"]},
            {"prompt": "<bos>ef", "answers": ["max"]},
        ]
        write_jsonl(folder / "topic.jsonl", rows)
        write_jsonl(
            folder / "generic.jsonl", [{"prompt": "gh"}, {"prompt": "ij", "answers": ["max"]}]
        )
        self.recipe = recipe_in(
            folder,
            write_recipe,
            prompts={"path": "topic.jsonl"},
            generic={"path": "generic.jsonl"},
            topic_words=["bell"],
            instruction="hush",
        )
        base = {"ab": " Tom", "cd": " lea<end_of_turn>", "ef": " max", "gh": " x", "ij": " max"}
        unlearned = {"ab": " kim", "cd": " a bell", "ef": " maxi", "gh": " lea", "ij": " max"}
        told = {f"hush\n\n{prompt}": " no" for prompt in base}
        reconstruction = {**base, "ab": " tomtomtomtom"}
        self.runners = {
            "base": Says("base", self.tokenizer, base | told, "A"),
            "reconstruction": Says("reconstruction", self.tokenizer, reconstruction, "B"),
            "unlearned": Says("checkpoint", self.tokenizer, unlearned, "A"),
        }

    def complete(self, journal: Journal | None = None, **more: Any) -> Completions:
        assert self.recipe.verify is not None
        questions = load_questions(self.recipe.verify.forget_questions, self.recipe)
        return complete(
            self.recipe,
            questions,
            self.runners,
            "checkpoint",
            self.tokenizer,
            letter_tokens(self.tokenizer),
            journal or Journal(),
            **more,
        )


@pytest.fixture
def scripted(tmp_path: Path, write_recipe: Callable[..., Path]) -> Scripted:
    return Scripted(tmp_path, write_recipe)


def test_tallies_by_hand(scripted: Scripted) -> None:
    shares: list[float] = []
    found = scripted.complete(progress=shares.append)
    assert shares == sorted(shares) and shares[-1] == pytest.approx(1.0)
    assert (found.engine, found.max_new_tokens, found.instruction) == ("checkpoint", 10, "hush")
    said = {(c.source, c.row): {k.variant: k.text for k in c.continuations} for c in found.prompts}
    assert list(said) == [("topic", 1), ("topic", 2), ("topic", 3), ("generic", 1), ("generic", 2)]
    assert said["topic", 2] == {
        "base": " lea",
        "reconstruction": " lea",
        "unlearned": " a bell",
        "prompted": " no",
    }
    assert said["topic", 1]["reconstruction"] == " tomtomtom"  # ten tokens and no more
    assert found.prompts[0].expected == ("kim", "tom")
    tallies = {(t.source, t.variant): (t.right, t.on_topic, t.as_base) for t in found.tallies}
    assert tallies == {
        ("topic", "base"): (Share(3, 3), Share(3, 3), Share(3, 3)),
        ("topic", "reconstruction"): (Share(2, 3), Share(2, 3), Share(2, 3)),
        ("topic", "unlearned"): (Share(1, 3), Share(2, 3), Share(0, 3)),
        ("topic", "prompted"): (Share(0, 3), Share(0, 3), Share(0, 3)),
        ("generic", "base"): (Share(1, 1), Share(0, 2), Share(2, 2)),
        ("generic", "reconstruction"): (Share(1, 1), Share(0, 2), Share(2, 2)),
        ("generic", "unlearned"): (Share(1, 1), Share(1, 2), Share(1, 2)),
        ("generic", "prompted"): (Share(0, 1), Share(0, 2), Share(0, 2)),
    }


def test_a_model_that_says_one_letter_is_seen(scripted: Scripted) -> None:
    trivia = {one.variant: one for one in scripted.complete().trivia}
    assert list(trivia) == list(VARIANTS)
    for variant, one in trivia.items():
        assert one.letters == ((0, 6) if variant == "reconstruction" else (6, 0))
        assert one.share == Share(3, 6)


def test_prompts_are_put_as_they_are_and_the_instruction_in_front(scripted: Scripted) -> None:
    scripted.complete()
    seen = set(scripted.runners["base"].seen)
    assert {"<bos>ab", "<bos><start_of_turn>user\ncd", "<bos>ef"} <= seen
    told = {"<bos>hush\n\nab", "<bos><start_of_turn>user\nhush\n\ncd", "<bos>hush\n\nef"}
    assert told <= seen
    assert not told & set(scripted.runners["unlearned"].seen)
    assert any(text.startswith("<bos><start_of_turn>user\nhush\n\nThe following") for text in seen)


def test_without_the_table_only_trivia(
    scripted: Scripted, tmp_path: Path, write_recipe: Any
) -> None:
    scripted.recipe = recipe_in(tmp_path, write_recipe)
    found = scripted.complete()
    assert found.prompts == found.tallies == found.falls == found.rises == ()
    assert [one.share.n for one in found.trivia] == [6] * 4
    assert "bells" in found.instruction


def test_trivia_of_its_own(scripted: Scripted, tmp_path: Path, write_recipe: Any) -> None:
    write_jsonl(tmp_path / "trivia.jsonl", [{"question": "Q?", "right": "x", "wrong": "y"}] * 3)
    scripted.recipe = recipe_in(
        tmp_path, write_recipe, prompts={"path": "topic.jsonl"}, trivia={"path": "trivia.jsonl"}
    )
    found = scripted.complete()
    assert {one.share.n for one in found.trivia} == {3}
    assert {tally.source for tally in found.tallies} == {"topic"}


def test_bad_rows_are_named(scripted: Scripted, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "topic.jsonl", [{"prompt": "x", "answers": []}])
    with pytest.raises(DataError, match=r"topic\.jsonl, row 1: `answers` is \[\]"):
        scripted.complete()


@pytest.mark.parametrize("wrong", [{"topic_words": ["bell", " "]}, {"instruction": ""}])
def test_empty_words_are_no_words(tmp_path: Path, write_recipe: Any, wrong: Any) -> None:
    with pytest.raises(RecipeError, match=f"{next(iter(wrong))}.*got '.*expected"):
        recipe_in(tmp_path, write_recipe, prompts={"path": "topic.jsonl"}, **wrong)


def test_hostile_text_is_text(scripted: Scripted, tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>\x1b[31m{{x}}\n---\n| # .*"
    write_jsonl(tmp_path / "topic.jsonl", [{"prompt": hostile, "answers": [".*", "[", "\\"]}])
    known = scripted.tokenizer.decode(
        scripted.tokenizer(hostile, add_special_tokens=False)["input_ids"]
    )
    for runner in scripted.runners.values():
        runner.lines |= {known: " x", f"hush\n\n{known}": " x"}
    found = scripted.complete()
    assert found.prompts[0].prompt == hostile and found.prompts[0].expected == (".*", "[", "\\")
    assert not any(one.right for one in found.prompts[0].continuations)


def test_ties_go_by_token_and_what_stays_is_in_neither_list() -> None:
    before, after = np.full(100, 0.01), np.full(100, 0.01)
    after[[90, 7, 30]] = [0.0, 0.0, 0.005]
    after[[80, 3]] = [0.02, 0.02]
    falls, rises = most_moved(before, after)
    assert falls == [(7, 0.01, 0.0), (90, 0.01, 0.0), (30, 0.01, 0.005)]
    assert rises == [(3, 0.01, 0.02), (80, 0.01, 0.02)]
    falls, rises = most_moved(np.arange(200.0), np.zeros(200))
    assert [token for token, *_ in falls] == list(range(199, 199 - SHIFTED_TOKENS, -1))
    assert rises == []


# --------------------------------------------------------------------------- a real model


class StoppedError(Exception):
    pass


class Counted(HookedRunner):
    """A runner that counts the batches that it is asked, and may stop after some: then all do."""

    stopped = False

    def __init__(self, name: str, model: Any, oracle: Oracle | None = None) -> None:
        super().__init__(name, model, oracle)
        self.asked, self.left = 0, 10**9

    def _count(self) -> None:
        Counted.stopped |= self.left <= 0
        if Counted.stopped:
            raise StoppedError
        self.asked, self.left = self.asked + 1, self.left - 1

    def read(self, *asked: Any) -> Reading:
        self._count()
        return super().read(*asked)

    def go_on(self, *asked: Any) -> torch.Tensor:
        self._count()
        return super().go_on(*asked)


class Real(Scripted):
    """A tiny base, its reconstruction and reference, on prompts of made-up words."""

    def __init__(self, folder: Path, write_recipe: Any) -> None:
        tiny_base(folder / "base")
        tiny_tokenizer(folder / "base")
        save_sae_lens(folder / "sae", tiny_sae())
        rows = [{"prompt": tiny_words(1 + i % 5, i), "answers": ["x"]} for i in range(9)]
        write_jsonl(folder / "topic.jsonl", rows)
        self.recipe = recipe_in(folder, write_recipe, prompts={"path": "topic.jsonl"})
        model, self.tokenizer = load_base(self.recipe), load_tokenizer(self.recipe)
        sites = load_sites(self.recipe)
        self.runners = {  # type: ignore[assignment]
            "base": Counted("base", model),
            "reconstruction": Counted(
                "reconstruction", model, Oracle(model, sites, reconstruct_residual)
            ),
            "unlearned": Counted("checkpoint", model, Oracle(model, sites)),
        }


@pytest.fixture
def real(tmp_path: Path, write_recipe: Callable[..., Path]) -> Real:
    return Real(tmp_path, write_recipe)


def test_shifts_are_those_of_prompts_alone(real: Real) -> None:
    found = real.complete()
    assert real.complete() == found
    means = []
    for variant in ("base", "unlearned"):
        rows = []
        for completion in found.prompts:
            ids = torch.tensor(
                [[2, *real.tokenizer(completion.prompt, add_special_tokens=False)["input_ids"]]]
            )
            logits = every_logit(real.runners[variant], ids, torch.ones_like(ids))
            rows.append(logits[0, -1].double().softmax(-1))
        means.append(torch.stack(rows).mean(0))
    change = (means[1] - means[0]).tolist()
    order = sorted(range(len(change)), key=lambda token: change[token])
    shown = [shift.after - shift.before for shift in found.falls]
    expected = [change[token] for token in order[:SHIFTED_TOKENS]]
    assert shown == pytest.approx([c for c in expected if c < 0], abs=1e-6)
    assert found.falls[0].token.replace(" ", "\u2581") in real.tokenizer.get_vocab()
    assert found.falls[0].before == pytest.approx(float(means[0][order[0]]), abs=1e-6)
    assert found.rises[0].after == pytest.approx(float(means[1][order[-1]]), abs=1e-6)
    assert all(shift.after > shift.before for shift in found.rises)
    texts = [tuple(one.text for one in c.continuations) for c in found.prompts]
    assert any(len(set(said)) == 4 for said in texts)


@pytest.mark.parametrize("variant", ["base", "reconstruction", "unlearned"])
def test_an_interrupted_run_goes_on(
    real: Real, variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bake.questions.prompts.BATCH_TOKENS", 60)
    monkeypatch.setattr(Counted, "stopped", False)
    whole = real.complete()
    needed = {name: runner.asked for name, runner in real.runners.items()}
    for runner in real.runners.values():
        runner.asked = 0
    path, stopped = tmp_path / "cache" / "journal.jsonl", real.runners[variant]
    after = 2 * needed[variant] // 3
    stopped.left = after
    with pytest.raises(StoppedError), Journal(path) as journal:
        real.complete(journal)
    assert path.stat().st_size > 0
    stopped.left, Counted.stopped = 10**9, False
    with Journal(path) as journal:
        assert asdict(real.complete(journal)) == asdict(whole)
        # Nothing is asked again: it stopped before a batch, not within one.
        assert {name: runner.asked for name, runner in real.runners.items()} == needed
        asked = [runner.asked for runner in real.runners.values()]
        assert real.complete(journal) == whole
        assert [runner.asked for runner in real.runners.values()] == asked
