"""The shipped miniature: small, clean, and forgetting as its recipe says."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from bake.distill.distill_table import Distill
from bake.distill.distilling import HeldOut, distill
from bake.questions.answers import letter_tokens
from bake.questions.multiple_choice import load_questions
from bake.recipe import Recipe
from bake.search.selection import selected_recipe
from bake.search.sweep import Sweep
from bake.stock import load_base, load_tokenizer
from bakeout.miniature.making.build import corpora_of, pick
from bakeout.miniature.making.shipping import write_questions, write_recipe, write_texts
from bakeout.miniature.making.world import build_world, question_splits
from bakeout.verbs.baking import planned
from bakeout.verbs.demo import MINIATURE
from verify.engines.runners import HookedRunner
from verify.evidence.completions import complete
from verify.journal import Journal
from verify.reference.oracle import Oracle, reconstruct_residual
from verify.reference.whole_sae import load_sites

SEED = 1
"""Of the shipped miniature."""


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (MINIATURE / name).read_text().splitlines()]


def test_it_is_small_and_names_no_machine() -> None:
    files = [path for path in MINIATURE.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert sum(path.stat().st_size for path in files) <= 8e6
    for path in files:
        data = path.read_bytes()
        assert b"/tmp/" not in data and b"/home/" not in data and b"/root/" not in data, path.name


def test_questions_are_of_the_wmdp_schema_and_the_splits_share_no_question() -> None:
    seen: set[str] = set()
    for side in ("forget", "retain"):
        for split in ("validation", "test"):
            lines = (MINIATURE / "questions" / f"{side}_{split}.jsonl").read_text().splitlines()
            rows = [json.loads(line) for line in lines]
            assert len(rows) >= 80
            assert all(len(set(row["choices"])) == 4 for row in rows)
            answers = Counter(row["answer"] for row in rows)
            assert set(answers) == {0, 1, 2, 3} and max(answers.values()) < 0.4 * len(rows)
            questions = {row["question"] for row in rows}
            assert not questions & seen
            seen |= questions


def test_tokenizer_knows_gemmas_markers_and_encodes_anything() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MINIATURE / "model")
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, 2)
    assert tokenizer("A").input_ids[0] == 2 and len(tokenizer("A").input_ids) == 2
    text = "Zürich <b>\n\t漢字 🙂"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True, tokenize=False
    )
    expected = "<bos><start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\n"
    assert chat == expected


def test_recipe_is_what_the_folder_next_to_it_holds() -> None:
    recipe = Recipe.load(MINIATURE / "recipe.toml")
    assert len(recipe.local_sources) == 13


def test_data_and_recipe_are_what_the_builder_writes(tmp_path: Path) -> None:
    world = build_world(SEED)
    splits = question_splits(world, SEED)
    write_texts(tmp_path, vars(corpora_of(world, SEED)))
    write_questions(tmp_path, splits, world, SEED)
    write_recipe(tmp_path, n_features=100, value=-40.0)
    written = [path.relative_to(tmp_path) for path in tmp_path.rglob("*.*")]
    shipped = [MINIATURE / "recipe.toml", *MINIATURE.rglob("*.jsonl")]
    assert sorted(written) == sorted(path.relative_to(MINIATURE) for path in shipped)
    for path in written:
        assert (tmp_path / path).read_bytes() == (MINIATURE / path).read_bytes(), path


def test_the_setting_is_the_one_that_is_picked(tmp_path: Path) -> None:
    recipe = Recipe.load(MINIATURE / "recipe.toml")
    sweep = Sweep(recipe, None, cache=tmp_path)
    assert pick(sweep, build_world(SEED), SEED) == {"n_features": 100, "value": -40.0}


def test_prompts_break_off_before_an_answer_and_other_words_ask_the_same() -> None:
    rows = read("completions.jsonl"), read("generic.jsonl")
    assert [len(side) for side in rows] == [40, 42]
    assert len({row["prompt"] for side in rows for row in side}) == 82
    forget = (MINIATURE / "forget.jsonl").read_text()
    for row in rows[0]:
        assert f"{row['prompt']} {row['answers'][0]}" in forget
    assert not any("bell" in row["prompt"].lower() for row in rows[1])
    asked, other = read("questions/forget_test.jsonl"), read("questions/forget_reworded.jsonl")
    for one, two in zip(asked, other, strict=True):
        assert one["question"] != two["question"]
        assert {**one, "question": ""} == {**two, "question": ""}


def test_it_completes_its_topic_until_it_is_clamped(tmp_path: Path) -> None:
    recipe, _ = selected_recipe(Recipe.load(MINIATURE / "recipe.toml"), cache=tmp_path)
    model, tokenizer, sites = load_base(recipe), load_tokenizer(recipe), load_sites(recipe)
    hooks = {"base": None, "unlearned": Oracle(model, sites)}
    hooks["reconstruction"] = Oracle(model, sites, reconstruct_residual)
    runners = {name: HookedRunner(name, model, oracle) for name, oracle in hooks.items()}
    assert recipe.verify is not None
    questions = load_questions(recipe.verify.forget_questions, recipe)
    found = complete(
        recipe, questions, runners, "reference", tokenizer, letter_tokens(tokenizer), Journal()
    )
    tallies = {(tally.source, tally.variant): tally for tally in found.tallies}

    def right(source: str, variant: str) -> float:
        share = tallies[source, variant].right
        assert share is not None and share.accuracy is not None
        return share.accuracy

    assert right("topic", "base") >= 0.95 and right("topic", "reconstruction") >= 0.95
    assert right("topic", "unlearned") <= 0.25
    assert right("generic", "base") >= 0.95
    assert right("generic", "unlearned") >= 0.95
    assert (tallies["generic", "unlearned"].as_base.accuracy or 0) >= 0.95
    trivia = {one.variant: one.share.accuracy or 0 for one in found.trivia}
    assert trivia["base"] >= 0.95 and trivia["unlearned"] <= 0.65


def test_a_few_steps_bring_it_towards_its_clamp(tmp_path: Path) -> None:
    recipe = Recipe.load(MINIATURE / "recipe.toml")
    plan = planned(recipe, cache=tmp_path)

    def distilled(steps: int) -> HeldOut:
        table = Distill(n_texts=160, steps=steps, batch_size=8)
        changed = plan.recipe.model_copy(update={"distill": table})
        return distill(changed, plan.base, plan.clamps, cache=tmp_path).held_out

    before, after = distilled(0), distilled(25)
    assert after.forget_kl < 0.6 * before.forget_kl
    assert after.retain_kl < 0.5
