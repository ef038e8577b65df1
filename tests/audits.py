"""A tiny world to audit: facts, texts that say them, a base, and a checkpoint over it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tomli_w

from bake.recipe import Recipe
from export.carriers.checkpoint import plan_checkpoint, write_checkpoint
from tests.worlds import (
    save_sae_lens,
    tiny_base,
    tiny_sae,
    tiny_tokenizer,
    tiny_words,
    write_jsonl,
    write_questions,
    write_texts,
)
from verify.audit.subject import Subject, open_subject

N_FACTS = 9
NAMES = ("Abel", "Bora", "Cato", "Dora", "Ebba", "Fons", "Gerd", "Hugo", "Ines")
PLACES = ("Rome", "Bonn", "Oslo", "Kiel", "Lima", "Nice", "Gent", "Bath", "Cork")


def fact_questions(n: int = N_FACTS) -> list[dict[str, Any]]:
    """Where somebody lives: the right place at A, B, C or D in turn, the next three beside it."""
    rows = []
    for i in range(n):
        choices = [PLACES[(i + k) % N_FACTS] for k in (1, 2, 3)]
        choices.insert(i % 4, PLACES[i])
        rows.append(
            {"question": f"Where does {NAMES[i]} live?", "choices": choices, "answer": i % 4}
        )
    return rows


def fact_texts(n: int = N_FACTS) -> list[dict[str, str]]:
    """Each fact in two texts of its own, over 50 characters, and one that says none."""
    texts = []
    for i in range(n):
        texts += [
            f"{tiny_words(9, i)}. {NAMES[i]} lives in {PLACES[i]}. {tiny_words(3, 50 + i)}.",
            f"In {PLACES[i]} stands the house that belongs to {NAMES[i]}. {tiny_words(2, 70 + i)}.",
        ]
    return [{"text": text} for text in [*texts, f"{tiny_words(20, 99)}."]]


def audited_world(folder: Path, **select: Any) -> Recipe:
    """Fills a folder with `base/`, `checkpoint/` and a recipe with texts; gives the recipe."""
    tiny_tokenizer(tiny_base(folder / "base"))
    save_sae_lens(folder / "sae", tiny_sae())
    write_jsonl(folder / "forget_questions.jsonl", fact_questions())
    write_questions(folder / "retain_questions.jsonl", 6, seed=2)
    write_jsonl(folder / "forget.jsonl", fact_texts())
    write_texts(folder / "retain.jsonl", 20, seed=5)
    write_texts(folder / "text.jsonl", 20, seed=9)
    prompts = [{"prompt": f"{NAMES[i]} lives in", "answers": [PLACES[i]]} for i in range(N_FACTS)]
    write_jsonl(folder / "prompts.jsonl", prompts)
    data = {
        "schema": 1,
        "base": {"model": "base", "license": "apache-2.0"},
        "clamp": [
            {"sae": {"path": "sae"}, "method": "clamp", "features": [1, 5, 9], "value": -6.0}
        ],
        "select": {
            "forget": {"path": "forget.jsonl"},
            "retain": {"path": "retain.jsonl"},
            **select,
        },
        "verify": {
            "forget_questions": {"path": "forget_questions.jsonl"},
            "retain_questions": {"path": "retain_questions.jsonl"},
            "text": {"path": "text.jsonl"},
            "prompt": "plain",
            "completions": {"prompts": {"path": "prompts.jsonl"}},
        },
    }
    (folder / "recipe.toml").write_text(tomli_w.dumps(data))
    recipe = Recipe.load(folder / "recipe.toml")
    write_checkpoint(plan_checkpoint(recipe), folder / "checkpoint", card="# card\n")
    return recipe


def audited(folder: Path, name: str = "checkpoint") -> Subject:
    """A folder of such a world, opened."""
    return open_subject(folder / name, Recipe.load(folder / "recipe.toml"))
