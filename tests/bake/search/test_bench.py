"""The cached bench against whole forwards of verify's hooked reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bake.base import find_base
from bake.clamp import find_site
from bake.errors import DataError, SAEError
from bake.questions.answers import Answers, letter_tokens
from bake.questions.forms import forms_beside
from bake.questions.loss import LossSum
from bake.questions.multiple_choice import load_questions, load_texts
from bake.questions.prompts import batches, question_prompts, text_prompts
from bake.recipe import Recipe
from bake.search.bench import Bench, Clamper, Results
from bake.sources import QuestionSource, TextSource
from bake.stock import load_base, load_tokenizer
from tests.worlds import (
    FAMILIES,
    RecipeWriter,
    notes,
    room_for,
    save_sae_lens,
    tiny_base,
    tiny_sae,
    tiny_tokenizer,
    write_questions,
    write_texts,
)
from verify.engines.runners import HookedRunner
from verify.reference.oracle import Oracle
from verify.reference.whole_sae import load_sites

TABLES: list[dict[str, Any]] = [
    {"method": "clamp", "value": -9.0},
    {"method": "zero"},
    {"method": "scale", "multiplier": 7.0},
    {"method": "refusal", "value": 40.0, "refusal_feature": 60, "trigger": 0.2},
    {"method": "random_decoder", "value": -9.0, "exempt_bos": False},
]
SAE = {"sae": {"path": "sae"}, "features": [3, 9, 14]}


def material(folder: Path) -> None:
    write_questions(folder / "q.jsonl", 7)
    write_texts(folder / "t.jsonl", 4)


def measured_both_ways(recipe: Recipe) -> tuple[Any, Any, Any]:
    """(bench's results, its base, the reference's answers and loss)."""
    model, tokenizer = load_base(recipe), load_tokenizer(recipe)
    questions = load_questions(QuestionSource(path="q.jsonl"), recipe)
    forms = forms_beside("cloze")
    prompts = question_prompts("forget", questions, tokenizer, compared=False, forms=forms)
    prompts += text_prompts(load_texts(TextSource(path="t.jsonl"), recipe), tokenizer)
    letters = letter_tokens(tokenizer)
    base = find_base(recipe)
    clamps = [Clamper(find_site(c, recipe, base)).weights(c) for c in recipe.clamp]
    bench = Bench(model, prompts, letters, min(c.layer for c in clamps), 0)
    found = bench.measure(clamps)
    oracle = Oracle(model, load_sites(recipe))
    runner = HookedRunner("reference", model, oracle)
    answers, loss = Answers(letters), LossSum()
    for batch in batches(prompts, pad_id=0, vocab_size=99):
        seen = runner.read(batch.input_ids, batch.attention_mask, batch.ends, batch.scored)
        answers.add(batch, seen.logits, seen.losses)
        loss.losses += [] if batch.of_choices else seen.losses.tolist()
    assert bench.changes(clamps) == (
        found.letters != bench.base.letters or bool(found.losses != bench.base.losses)
    )
    return found, bench.base, (answers.given, loss.mean, oracle.tokens_fired)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("table", TABLES, ids=lambda table: str(table["method"]))
def test_bench_answers_as_the_reference(
    tmp_path: Path, write_recipe: RecipeWriter, family: str, table: dict[str, Any]
) -> None:
    tiny_tokenizer(tiny_base(tmp_path / "base", family))
    save_sae_lens(tmp_path / "sae", tiny_sae(), layer=2)
    material(tmp_path)
    found, base, (letters, loss, fired) = measured_both_ways(Recipe.load(write_recipe(SAE | table)))
    assert found.letters == letters
    assert found.loss == pytest.approx(loss, abs=1e-5)
    assert found.loss != pytest.approx(base.loss, abs=1e-5)
    if table["method"] != "refusal":  # there the reference counts changed codes, and a = value
        assert found.tokens_fired == fired > 0


def test_two_hook_points(tmp_path: Path, write_recipe: RecipeWriter) -> None:
    tiny_tokenizer(tiny_base(tmp_path / "base"))
    save_sae_lens(tmp_path / "sae", tiny_sae(), layer=1)
    save_sae_lens(tmp_path / "sae2", tiny_sae(3), layer=2)
    material(tmp_path)
    tables = (SAE | TABLES[0], SAE | TABLES[2] | {"sae": {"path": "sae2"}})
    found, _, (letters, loss, _) = measured_both_ways(Recipe.load(write_recipe(*tables)))
    assert found.letters == letters and found.loss == pytest.approx(loss, abs=1e-5)


def test_where_nothing_fires_nothing_is_run(tmp_path: Path, write_recipe: RecipeWriter) -> None:
    tiny_tokenizer(tiny_base(tmp_path / "base"))
    save_sae_lens(tmp_path / "sae", tiny_sae())
    material(tmp_path)
    recipe = Recipe.load(write_recipe(SAE | TABLES[0] | {"trigger": 1e6}))
    model, tokenizer = load_base(recipe), load_tokenizer(recipe)
    questions = load_questions(QuestionSource(path="q.jsonl"), recipe)
    forms = forms_beside("cloze")
    prompts = question_prompts("forget", questions, tokenizer, compared=False, forms=forms)
    bench = Bench(model, prompts, letter_tokens(tokenizer), 1, 0)
    clamper = Clamper(find_site(recipe.clamp[0], recipe, find_base(recipe)))
    ran: list[int] = []
    model.model.layers[3].register_forward_hook(lambda *_: ran.append(1))
    clamps = [clamper.weights(recipe.clamp[0])]
    assert bench.measure(clamps).letters == bench.base.letters and not bench.changes(clamps)
    assert not ran
    below: list[int] = []
    real = model.model.layers[0].mlp
    real.register_forward_hook(lambda *_: below.append(1))
    strong = recipe.clamp[0].model_copy(update={"trigger": 0.0})
    bench.measure([clamper.weights(strong)])
    assert ran and not below
    with torch.no_grad():
        model(torch.tensor([[2, 5]]))
    assert below  # the forward is its own again
    with pytest.raises(SAEError, match="feature 64 is out of range; expected 0 to 63"):
        clamper.weights(recipe.clamp[0].model_copy(update={"features": [64]}))


@pytest.mark.parametrize("layer", [0, 3])
def test_memory_that_runs_out(
    tmp_path: Path, write_recipe: RecipeWriter, capsys: pytest.CaptureFixture[str], layer: int
) -> None:
    tiny_tokenizer(tiny_base(tmp_path / "base"))
    save_sae_lens(tmp_path / "sae", tiny_sae())
    material(tmp_path)
    recipe = Recipe.load(write_recipe(SAE | TABLES[0]))
    tokenizer, letters = load_tokenizer(recipe), letter_tokens(load_tokenizer(recipe))
    questions = load_questions(QuestionSource(path="q.jsonl"), recipe)
    forms = forms_beside("cloze")
    prompts = question_prompts("forget", questions, tokenizer, compared=False, forms=forms)
    prompts += text_prompts(load_texts(TextSource(path="t.jsonl"), recipe), tokenizer)
    clamper = Clamper(find_site(recipe.clamp[0], recipe, find_base(recipe)))
    clamps = [clamper.weights(recipe.clamp[0])]

    def found() -> tuple[Results, Results]:
        bench = Bench(load_base(recipe), prompts, letters, 1, 0)
        return bench.base, bench.measure(clamps)

    whole = found()
    assert notes(capsys) == []
    longest = max(len(prompt.ids) for prompt in prompts)
    with room_for(2 * longest, layer=layer) as asked:
        halved = found()
    assert "note: prompts: memory ran out at " in (said := "\n".join(notes(capsys)))
    assert ("note: clamping: memory ran out at " in said) is (layer == 3)  # below nothing is run
    assert len([n for n in asked if n <= 2 * longest]) > 10
    for one, other in zip(whole, halved, strict=True):
        assert one.letters == other.letters and one.tokens_fired == other.tokens_fired
        assert [n for _, n in one.losses] == [n for _, n in other.losses]
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
    assert whole[0].loss != pytest.approx(whole[1].loss, rel=1e-4)


def test_activations_that_cannot_fit(
    tmp_path: Path, write_recipe: RecipeWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_tokenizer(tiny_base(tmp_path / "base"))
    material(tmp_path)
    recipe = Recipe.load(write_recipe(SAE | TABLES[0]))
    tokenizer = load_tokenizer(recipe)
    questions = load_questions(QuestionSource(path="q.jsonl"), recipe)
    prompts = question_prompts("forget", questions, tokenizer, compared=False)
    monkeypatch.setattr("bake.search.bench.available_memory", lambda _: 10)
    with pytest.raises(DataError, match="14 prompts: their activations need"):
        Bench(load_base(recipe), prompts, letter_tokens(tokenizer), 1, 0)
