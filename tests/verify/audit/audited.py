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
from verify.audit.attempts import Attempt, Need, Scores
from verify.audit.audit_report import AuditReport
from verify.audit.outcome import FolderAudit, sweeps_of
from verify.audit.subject import Subject, open_subject
from verify.report.measures import Share

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


def an_audit() -> AuditReport:
    """A report made up: `merged` has everything back, `layer` nothing while its clamp is in."""
    merged = _folder("merged", "plain", None, {10: 20, 50: 36}, same=30, swapped=12)
    layer = _folder("layer", "layer", _scores(118, 120), {10: 11, 50: 12}, same=13, swapped=12)
    return AuditReport("quick", (0, 1, 2), (merged, layer))


def _folder(
    name: str,
    carrier: str,
    stripped: Scores | None,
    other: dict[int, int],
    *,
    same: int,
    swapped: int,
) -> FolderAudit:
    """Right answers of 40 held-out facts, with each of three seeds."""
    attempts = []
    for seed in range(3):
        for steps, right in other.items():
            attempts.append(_relearned("other facts", right, steps, seed))
        attempts.append(_relearned("same facts", same, 10, seed))
        attempts.append(_relearned("same facts", swapped, 10, seed, control=True))
    before = _scores(30, 120)
    return FolderAudit(
        folder=name,
        carrier=carrier,
        exact=True,
        manifest_sha256="0" * 64,
        form="chat",
        base=_scores(118, 120),
        before=before,
        stripped=stripped,
        sweeps=sweeps_of(attempts, before, "chat"),
        attempts=tuple(attempts),
    )


def _relearned(need: Need, right: int, steps: int, seed: int, *, control: bool = False) -> Attempt:
    return Attempt(
        f"relearn: {'control, ' if control else ''}{need}, all weights",
        f"fine-tunes all weights for {{steps}} steps on {{samples}} texts about {need}",
        _scores(right, 40),
        (need,),
        {"rate": 1e-4, "texts": 100},
        seed,
        steps,
        100,
        control,
    )


def _scores(right: int, n: int) -> Scores:
    return Scores(
        {"chat": Share(right, n), "cloze": Share(right // 2, n)},
        {"chat": Share(70, 72)},
        Share(5, 10),
        Share(9, 10),
        0.5,
    )
