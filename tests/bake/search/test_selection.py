"""From corpora to a recipe with numbers: cache, resumption after a kill, three procedures."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet

import bake.scale.parts
import bake.search.statistics
from bake.errors import BakeoutError, DataError, RecipeError, SAEError
from bake.questions.answers import Answers, letter_tokens
from bake.questions.multiple_choice import Question
from bake.questions.orders import all_orders, orders_in
from bake.questions.prompts import batches, question_prompts
from bake.recipe import PromptForm, Recipe
from bake.search.corpus_statistics import Material, measure
from bake.search.selection import selected_recipe, split_questions
from bakeout.verbs.demo import MINIATURE
from tests.worlds import (
    RecipeWriter,
    save_sae_lens,
    tiny_base,
    tiny_sae,
    tiny_tokenizer,
    write_corpora,
    write_texts,
)
from verify.engines.runners import HookedRunner
from verify.reference.oracle import Oracle
from verify.reference.whole_sae import load_sites

TABLE: dict[str, Any] = {
    "sae": {"path": "sae"},
    "method": "clamp",
    "features": "select",
    "value": -6.0,
}


@pytest.fixture
def select_recipe(tmp_path: Path, write_recipe: RecipeWriter) -> RecipeWriter:
    """Writes a recipe that selects, over tiny files."""
    tiny_tokenizer(tiny_base(tmp_path / "base"))
    save_sae_lens(tmp_path / "sae", tiny_sae())
    write_corpora(tmp_path)

    def write(*tables: dict[str, Any], **select: Any) -> Path:
        settings = {
            "forget": {"path": "forget.jsonl"},
            "retain": {"path": "retain.jsonl"},
            "retain_threshold": 0.3,
            "n_features": 4,
            "seq_len": 24,
            "n_seqs": 20,
        } | select
        verify = {
            "forget_questions": {"path": "forget_questions.jsonl"},
            "retain_questions": {"path": "retain_questions.jsonl"},
            "text": {"path": "text.jsonl"},
        }
        return write_recipe(*(tables or (TABLE,)), select=settings, verify=verify)

    return write


def test_statistics_are_read_the_second_time(
    select_recipe: RecipeWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe.load(select_recipe())
    first = measure(recipe, cache=tmp_path / "cache")
    material = Material(recipe)
    again = measure(recipe, material=material, cache=tmp_path / "cache")
    assert "model" not in vars(material)  # not even loaded
    for side in ("forget", "retain"):
        one, other = getattr(first.sites[0], side), getattr(again.sites[0], side)
        for name, value in vars(one).items():
            assert np.array_equal(value, getattr(other, name)), name
    table = parquet.read_table(next((tmp_path / "cache").rglob("statistics.parquet")))
    assert {"feature", "fired", "share", "mean", "mean_square", "maximum"} <= set(
        table.column_names
    )
    assert not list((tmp_path / "cache").rglob("*unfinished*"))


@pytest.mark.parametrize("change", ["model", "sae", "corpus", "seq_len"])
def test_statistics_of_other_inputs_are_not_taken(
    select_recipe: RecipeWriter, tmp_path: Path, change: str
) -> None:
    cache = tmp_path / "cache"
    measure(Recipe.load(select_recipe()), cache=cache)
    if change == "model":
        tiny_tokenizer(tiny_base(tmp_path / "base", seed=1))
    if change == "sae":
        save_sae_lens(tmp_path / "sae", tiny_sae(1))
    if change == "corpus":
        write_texts(tmp_path / "forget.jsonl", 12, seed=5)
        write_texts(tmp_path / "retain.jsonl", 12, seed=6)
    recipe = Recipe.load(select_recipe(**({"seq_len": 20} if change == "seq_len" else {})))
    measure(recipe, cache=cache)
    assert len(list(cache.rglob("statistics.parquet"))) == 4


def test_damaged_statistics_are_taken_anew(select_recipe: RecipeWriter, tmp_path: Path) -> None:
    recipe = Recipe.load(select_recipe())
    first = measure(recipe, cache=tmp_path / "cache").sites[0].forget
    for path in (tmp_path / "cache").rglob("*.parquet"):
        path.write_bytes(path.read_bytes()[:100])
    again = measure(recipe, cache=tmp_path / "cache").sites[0].forget
    assert np.array_equal(first.fired, again.fired)


KILLED = """
import sys, time
import bake.search.statistics
from pathlib import Path
from bake.recipe import Recipe
from bake.search.corpus_statistics import measure
bake.search.statistics.BATCH_TOKENS = 48
bake.scale.parts.PART_TOKENS, bake.scale.parts.TOKENS_PER_FEATURE = 1, 0
real = bake.search.statistics.residuals
count = 0
def slow(*args):
    global count
    count += 1
    if count == 4:
        print("there", flush=True)
        time.sleep(60)
    return real(*args)
bake.search.statistics.residuals = slow
measure(Recipe.load(sys.argv[1]), cache=Path(sys.argv[2]))
"""


def test_killed_half_way_it_goes_on_and_ends_bit_identical(
    select_recipe: RecipeWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bake.search.statistics, "BATCH_TOKENS", 48)
    monkeypatch.setattr(bake.scale.parts, "PART_TOKENS", 1)
    monkeypatch.setattr(bake.scale.parts, "TOKENS_PER_FEATURE", 0)
    path, cache = select_recipe(), tmp_path / "cache"
    recipe = Recipe.load(path)
    whole = measure(recipe, cache=tmp_path / "other").sites[0]
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path), str(cache)], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"there\n"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert len(list(cache.rglob("*.unfinished.safetensors"))) == 1
    ran: list[float] = []
    resumed = measure(recipe, cache=cache, progress=lambda _, share: ran.append(share)).sites[0]
    everything: list[float] = []
    measure(recipe, cache=tmp_path / "third", progress=lambda _, share: everything.append(share))
    assert len(ran) < len(everything)
    for side in ("forget", "retain"):
        for name, value in vars(getattr(whole, side)).items():
            assert np.array_equal(value, getattr(getattr(resumed, side), name)), name


def test_a_recipe_with_numbers_comes_back_as_it_is(select_recipe: RecipeWriter) -> None:
    recipe = Recipe.load(select_recipe({**TABLE, "features": [1]}))
    assert selected_recipe(recipe) == (recipe, [])


def test_each_table_gets_features_of_its_own_sae(
    select_recipe: RecipeWriter, tmp_path: Path
) -> None:
    save_sae_lens(tmp_path / "sae2", tiny_sae(5), layer=2)
    tables = (
        TABLE,
        {**TABLE, "sae": {"path": "sae2"}},
    )
    recipe = Recipe.load(select_recipe(*tables))
    selected, selections = selected_recipe(recipe, cache=tmp_path / "cache")
    assert [len(clamp.features) for clamp in selected.clamp] == [4, 4]
    assert selected.clamp[0].features != selected.clamp[1].features
    assert [s.hook_point for s in selections] == [f"blocks.{i}.hook_resid_post" for i in (1, 2)]
    for selection in selections:
        assert all(chosen.retain_share < 0.3 for chosen in selection.chosen)
        shares = [chosen.forget_share for chosen in selection.chosen]
        assert shares == sorted(shares, reverse=True)


def test_the_refusal_feature_is_not_selected(select_recipe: RecipeWriter, tmp_path: Path) -> None:
    recipe = Recipe.load(select_recipe())
    first = selected_recipe(recipe, cache=tmp_path / "cache")[0].clamp[0].features
    assert isinstance(first, list)
    table = {**TABLE, "method": "refusal", "refusal_feature": first[0]}
    refusing = selected_recipe(Recipe.load(select_recipe(table)), cache=tmp_path / "cache")[0]
    assert first[0] not in refusing.clamp[0].features


def test_ratio_runs(select_recipe: RecipeWriter, tmp_path: Path) -> None:
    recipe = Recipe.load(select_recipe(by="ratio", ratio_percentile=80.0))
    (selection,) = selected_recipe(recipe, cache=tmp_path / "cache")[1]
    assert all(chosen.ratio is not None for chosen in selection.chosen)


def test_attribution_needs_a_known_question(select_recipe: RecipeWriter, tmp_path: Path) -> None:
    recipe = Recipe.load(select_recipe(by="attribution"))
    with pytest.raises(DataError, match="of 4 forget questions none is answered right under all"):
        selected_recipe(recipe, cache=tmp_path / "cache")


def test_bad_input_is_one_line(
    select_recipe: RecipeWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trouble(**select: Any) -> BakeoutError:
        with pytest.raises(BakeoutError) as caught:
            selected_recipe(Recipe.load(select_recipe(**select)), cache=tmp_path / "cache")
        assert "\n" not in str(caught.value)
        return caught.value

    assert "would at" in str(trouble(retain_threshold=0.0))
    assert "has no `body`" in str(trouble(forget={"path": "forget.jsonl", "field": "body"}))
    (tmp_path / "empty.jsonl").write_text("")
    assert "holds no text" in str(trouble(retain={"path": "empty.jsonl"}))
    save_sae_lens(tmp_path / "sae", tiny_sae(d_in=16))
    assert isinstance(trouble(), SAEError)
    monkeypatch.setattr(bake.search.statistics, "available_memory", lambda *_: 1000)
    save_sae_lens(tmp_path / "sae", tiny_sae())
    assert "of memory" in str(trouble())
    assert not list(tmp_path.glob("*.toml.new"))


def test_questions_are_split_without_a_common_one(
    select_recipe: RecipeWriter, tmp_path: Path
) -> None:
    split = split_questions(Recipe.load(select_recipe()))
    for side in ("forget", "retain"):
        validation, test = split.validation[side], split.test[side]
        assert (len(validation), len(test)) == (4, 6)
        assert not {q.row for q in validation} & {q.row for q in test}
    named = {"path": "forget_questions.jsonl"}
    with pytest.raises(DataError, match=r"\[select\] and \[verify\] share 10"):
        split_questions(Recipe.load(select_recipe(forget_questions=named)))
    data = Recipe.load(select_recipe()).to_dict()
    del data["verify"]
    with pytest.raises(RecipeError, match=r"no \[verify\] table"):
        split_questions(Recipe.parse(data, name="t", folder=tmp_path))


def test_orders_are_all_24_and_keep_the_right_choice() -> None:
    question = Question("Which?", ("w", "x", "y", "z"), 2, None, 1)
    turned = all_orders(question)
    assert len({q.choices for q in turned}) == 24
    assert all(q.choices[q.answer] == "y" for q in turned)
    assert turned[0] == question


@pytest.mark.parametrize("form", ["chat", "cloze"])
def test_attribution_on_known_questions_of_the_miniature(tmp_path: Path, form: PromptForm) -> None:
    data = Recipe.load(MINIATURE / "recipe.toml").to_dict()
    data["verify"]["prompt"] = form
    for side, n in (("forget", 3), ("retain", 6)):
        lines = (MINIATURE / "questions" / f"{side}_validation.jsonl").read_text().splitlines()
        (tmp_path / f"{side}.jsonl").write_text("\n".join(lines[:n]))
        data["select"][f"{side}_questions"] = {"path": str(tmp_path / f"{side}.jsonl")}
    data["select"] |= {"by": "attribution", "n_features": 2, "n_seqs": 40}
    recipe = Recipe.parse(data, name="test", folder=MINIATURE)
    measured = measure(recipe, cache=tmp_path / "cache")
    (selection,) = selected_recipe(recipe, measured=measured)[1]
    assert 1 <= len(selection.chosen) <= 2
    losses = [chosen.score for chosen in selection.chosen]
    assert losses == sorted(losses)
    split, tokenizer = split_questions(recipe), measured.material.tokenizer
    asked = {"forget": [o for q in split.validation["forget"] for o in orders_in(q, form)]}
    asked["retain"] = split.validation["retain"]
    prompts = [
        prompt
        for side, questions in asked.items()
        for prompt in question_prompts(side, questions, tokenizer, compared=False, forms=[form])
    ]
    model = measured.material.model
    base = _letters(HookedRunner("base", model), prompts, tokenizer)
    for feature in selection.features:  # verify's own hook, the whole SAE, one feature alone
        clamp = recipe.clamp[0].model_copy(update={"features": [feature]})
        alone = Oracle(model, load_sites(recipe.with_clamps([clamp])))
        found = _letters(HookedRunner("reference", model, alone), prompts, tokenizer)
        changed = {key[0] for key, letter in found.items() if letter != base[key]}
        assert changed == {"forget"}


def _letters(runner: HookedRunner, prompts: list[Any], tokenizer: Any) -> dict[Any, int]:
    answers = Answers(letter_tokens(tokenizer))
    for batch in batches(prompts, pad_id=0, vocab_size=len(tokenizer)):
        seen = runner.read(batch.input_ids, batch.attention_mask, batch.ends, batch.scored)
        answers.add(batch, seen.logits, seen.losses)
    return answers.given
