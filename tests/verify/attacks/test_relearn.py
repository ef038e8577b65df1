"""Relearning brings back what was hidden, nothing that was never there, and repeats itself."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from bake.questions.forms import chat_text
from bake.questions.multiple_choice import LETTERS, Question, load_questions
from bake.recipe import Recipe
from tests.verify.audit.audited import audited, audited_world
from verify.attacks import relearn as relearning
from verify.attacks.relearn import fine_tune, relearn, trained
from verify.audit.attempts import Attempt, Scores
from verify.audit.levels import LEVELS
from verify.audit.outcome import comes_back, interval_over, sweeps_of
from verify.audit.subject import open_subject
from verify.audit.target import Target
from verify.audit.work_order import Work
from verify.audit.workers import Workers
from verify.journal import Journal
from verify.report.measures import Share

MINIATURE = Path(__file__).parents[3] / "bakeout" / "miniature"
RUN = {"lora": False, "rate": 2.2e-3, "size": 1000, "seed": 0, "brief": True}


def answers_wrongly(model: Any, tokenizer: Any, questions: Sequence[Question]) -> Any:
    """Adds a small low-rank edit that makes a model say the letter after the right one. Changes
    `model`.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    matrices = ["down_proj", "o_proj"]
    config = LoraConfig(r=4, lora_alpha=4, target_modules=matrices, layers_to_transform=[3, 4, 5])
    edited = get_peft_model(model, config)
    weights = [weight for weight in edited.parameters() if weight.requires_grad]
    optimizer, rng = torch.optim.AdamW(weights, lr=5e-3), random.Random(0)
    wrong = [tokenizer.convert_tokens_to_ids(letter) for letter in LETTERS[1:] + LETTERS[0]]
    for _ in range(80):
        asked = rng.sample(list(questions), 12)
        rows = [
            torch.tensor(
                [tokenizer.bos_token_id, *tokenizer.encode(chat_text(q), add_special_tokens=False)]
            )
            for q in asked
        ]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        ends = torch.tensor([len(row) - 1 for row in rows])
        hidden = model.model(input_ids=ids).last_hidden_state[torch.arange(len(rows)), ends]
        expected = torch.tensor([wrong[q.answer] for q in asked])
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model.lm_head(hidden), expected).backward()
        optimizer.step()
    return edited.merge_and_unload()


@pytest.fixture(scope="module")
def hidden(tmp_path_factory: pytest.TempPathFactory) -> Target:
    """The miniature with an edit that is known to undo: its facts are all there."""
    folder = tmp_path_factory.mktemp("planted") / "wrong"
    recipe = Recipe.load(MINIATURE / "recipe.toml")
    assert recipe.select is not None
    assert recipe.select.forget_questions is not None
    shutil.copytree(MINIATURE / "model", folder)
    base = Target(open_subject(folder, recipe), 3)
    validation = load_questions(recipe.select.forget_questions, recipe)
    asked = [*base.facts.questions, *validation]
    answers_wrongly(base.subject.model(), base.tokenizer, asked).save_pretrained(folder)
    return Target(open_subject(folder, recipe), 3)


@pytest.fixture(scope="module")
def never(tmp_path_factory: pytest.TempPathFactory) -> Target:
    """The miniature, asked for facts that it never knew: those of bells that are called as other
    things are, in questions and texts alike.
    """
    folder = tmp_path_factory.mktemp("never")
    shutil.copytree(MINIATURE, folder, dirs_exist_ok=True)
    texts = "".join((folder / f"{side}.jsonl").read_text() for side in ("forget", "retain"))
    names = [
        sorted(set(re.findall(rf"(?:{kind}) ([A-Z]\w+)", texts))) for kind in ("bell", "kite|ferry")
    ]
    called = dict(zip(*names, strict=False))
    assert len(called) == len(names[0]) > 20
    questions = ("questions/forget_test.jsonl", "questions/forget_validation.jsonl")
    for name in ("forget.jsonl", "completions.jsonl", *questions):
        text = (folder / name).read_text()
        pattern = "|".join(rf"\b{bell}\b" for bell in called)
        (folder / name).write_text(re.sub(pattern, lambda match: called[match[0]], text))
    return Target(open_subject(folder / "model", Recipe.load(folder / "recipe.toml")), 3)


def test_it_finds_what_an_edit_hid(hidden: Target) -> None:
    held = hidden.held(0)
    before = hidden.score(hidden.subject.model(), held, brief=True)
    found = fine_tune(hidden, {**RUN, "texts": "other", "steps": 150})
    (sweep,) = sweeps_of(found, before, "chat")
    assert before.forget["chat"].right < 8
    assert sweep.worst is not None
    assert sweep.worst.right.n == 40
    assert comes_back(sweep.worst.interval, before.forget["chat"], 0.25)
    assert not sweep.apart


def test_it_finds_nothing_where_nothing_was(never: Target) -> None:
    before = never.score(never.subject.model(), never.held(0), brief=True)
    found = fine_tune(never, {**RUN, "texts": "other", "steps": 50, "rate": 1e-3})
    (sweep,) = sweeps_of(found, before, "chat")
    assert sweep.worst is not None
    assert not comes_back(sweep.worst.interval, before.forget["chat"], 0.25)
    low, high = interval_over([before.forget["chat"]])
    assert low <= 0.25 <= high  # it guesses


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Target:
    folder = tmp_path_factory.mktemp("tiny")
    audited_world(folder)
    return Target(audited(folder), 3)


@pytest.mark.parametrize("lora", [False, True])
def test_the_same_settings_are_the_same_attempts(tiny: Target, lora: bool) -> None:
    settings = {**RUN, "texts": "other", "steps": 10, "lora": lora}
    first, second = fine_tune(tiny, settings), fine_tune(tiny, settings)
    assert first == second
    assert [attempt.steps for attempt in first] == [10]
    other = fine_tune(tiny, {**settings, "seed": 1})
    assert other[0].scores.sure != first[0].scores.sure


def test_a_longer_run_says_the_same_on_the_way(tiny: Target) -> None:
    settings = {**RUN, "texts": "same", "rate": 1e-3}
    short = fine_tune(tiny, {**settings, "steps": 10})
    long = fine_tune(tiny, {**settings, "steps": 25})
    assert long[0] == short[0]


@pytest.mark.parametrize("lora", [False, True])
def test_training_is_that_of_plain_torch(tiny: Target, lora: bool) -> None:
    texts = ["abel lives in rome", "bora lives in bonn", "cato", "dora is not at home"]
    settings = {"rate": 1e-2, "steps": 3, "seed": 0, "lora": lora}
    model = tiny.subject.model()
    losses = []
    ids = [[2, *tiny.tokenizer.encode(text, add_special_tokens=False)] for text in texts]

    def loss_of() -> float:
        """Mean over all tokens, each text alone."""
        total, n = 0.0, 0
        with torch.no_grad():
            for row in ids:
                logits = model(input_ids=torch.tensor([row])).logits[0, :-1].double()
                total -= float(logits.log_softmax(-1)[range(len(row) - 1), row[1:]].sum())
                n += len(row) - 1
        return total / n

    losses.append(loss_of())
    for _ in trained(model, texts, tiny.tokenizer, settings):
        losses.append(loss_of())
    assert losses[0] > losses[1] > losses[3]
    changed = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert all("lora_" in name for name in changed) == lora


def test_the_sweep_halves_and_the_best_meets_every_seed(
    tiny: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def made(_: Target, settings: dict[str, Any]) -> list[Attempt]:
        """Best at one rate, which ruins the model soon, and one number of texts; next best at a
        rate that does not; a higher rate ruins it at once.
        """
        asked.append(dict(settings))
        sure = {4.6e-4: 0.9, 1e-4: 0.8}.get(settings["rate"], 0.3)
        sure += 0.05 if settings["size"] == 10 else 0
        kept = 1.0 if settings["rate"] < 1e-3 else 0.0
        scores = Scores(retain={"plain": share(kept)}, sure=sure if kept else 0.99)
        later = Scores(retain={"plain": share(kept if settings["rate"] < 4e-4 else 0)}, sure=0.1)
        return [Attempt(f"relearn: {settings['texts']}", "", of) for of in (scores, later)]

    def share(kept: float) -> Any:
        from verify.report.measures import Share

        return Share(int(10 * kept), 10)

    monkeypatch.setattr(relearning, "fine_tune", made)
    before = Scores(retain={"plain": share(1.0)})
    with Workers([tiny.subject], 3, 1) as workers:
        work = Work(
            tiny.subject,
            0,
            workers,
            Journal(),
            lambda *_: None,
            (0, 1, 2),
            LEVELS[0],
            "plain",
            before,
        )
        list(relearn(work))
    final = [of for of in asked if not of["brief"]]
    assert {(of["rate"], of["size"]) for of in final} == {(4.6e-4, 10)}
    longer = [of for of in asked if of["steps"] == 150 and of["texts"] != "swapped"]
    assert {(of["rate"], of["size"]) for of in longer} == {(4.6e-4, 10), (1e-4, 1000)}
    assert {of["steps"] for of in final} == {500, 250}
    assert len(final) == 5 * 3
    assert {of["rate"] for of in asked} == set(relearning.RATES)
    assert {of["size"] for of in asked} == set(relearning.SIZES)
    swapped = [of for of in asked if of["texts"] == "swapped"]
    assert [of["steps"] for of in swapped] == [150] * 6
    assert len(asked) == 5 * (7 + 5 + 2) + 15 + 6


@pytest.mark.parametrize("ruinous", [1e-3, 1e-4, 2.2e-5, 1e-9])
def test_where_every_quick_rate_ruins_the_model_slower_ones_are_tried(
    tiny: Target, monkeypatch: pytest.MonkeyPatch, ruinous: float
) -> None:
    asked = []

    def made(target: Target, settings: dict[str, Any]) -> list[Attempt]:
        asked.append(settings)
        kept = 10 if settings["rate"] < ruinous else 0
        return [Attempt("relearn", "", Scores(retain={"plain": Share(kept, 10)}, sure=0.5))]

    monkeypatch.setattr(relearning, "fine_tune", made)
    before = Scores(retain={"plain": Share(10, 10)})
    told = lambda *_: None  # noqa: E731
    with Workers([tiny.subject], 3, 1) as workers:
        work = Work(tiny.subject, 0, workers, Journal(), told, (0,), LEVELS[-1], "plain", before)
        list(relearn(work))
    slower = {1e-3: [], 1e-4: [2.2e-5], 2.2e-5: [2.2e-5, 4.6e-6], 1e-9: [2.2e-5, 4.6e-6]}[ruinous]
    tried = [of["rate"] for of in asked if of["steps"] == relearning.FIRST]
    assert sorted(set(tried)) == sorted({*relearning.QUICK_RATES, *slower})
    final = {of["rate"] for of in asked if of["steps"] == LEVELS[-1].most_steps}
    if ruinous > 1e-9:
        assert all(rate < ruinous for rate in final)
