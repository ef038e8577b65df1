"""Builds the miniature from a seed: `python -m bakeout.miniature.making.build`.

Trains the model and an SAE, picks features and value on the validation questions, writes
everything, and prints what was measured on the test questions.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers

from bake.questions.forms import forms_beside
from bake.questions.multiple_choice import Question, Text, load_texts
from bake.questions.orders import in_order
from bake.questions.prompts import question_prompts, text_prompts
from bake.recipe import Recipe
from bake.search.asking_bench import SIDES, Scored, scored
from bake.search.bench import Bench
from bake.search.grid import Point
from bake.search.sweep import Sweep
from bake.training.train_sae import save_sae
from bakeout.miniature.making.miniature_sae import LAYER, cached_activations, train_site_sae
from bakeout.miniature.making.shipping import (
    write_model,
    write_questions,
    write_recipe,
    write_texts,
)
from bakeout.miniature.making.tokenizer import build_tokenizer
from bakeout.miniature.making.train_model import ModelSchedule, train_model
from bakeout.miniature.making.world import World, build_world, question_splits
from bakeout.miniature.making.written_corpora import (
    retained_text,
    selection_corpus,
    vocabulary_texts,
)

FORMS_ASKED = forms_beside(None)
HERE = Path(__file__).parents[1]

GRID_N_FEATURES = (80, 100, 120)
GRID_VALUES = (-20.0, -40.0)
N_CORPUS_TEXTS = 1200
N_TEXTS = 300

FORGET_BAR = 0.30
RETAINED_BAR = 0.985
LOSS_BAR = 0.05


@dataclass(frozen=True)
class Corpora:
    """The texts that are shipped."""

    forget: list[str]
    retain: list[str]
    text: list[str]


def corpora_of(world: World, seed: int) -> Corpora:
    """The forget and retain corpora and the text for loss added."""
    return Corpora(
        selection_corpus(world, forget=True, n_texts=N_CORPUS_TEXTS, seed=seed),
        selection_corpus(world, forget=False, n_texts=N_CORPUS_TEXTS, seed=seed),
        retained_text(world, N_TEXTS, seed),
    )


@dataclass(frozen=True)
class Measuring:
    """The questions and the text of one split, ready to measure."""

    sweep: Sweep
    asked: dict[str, list[Question]]
    """forget, retain."""
    bench: Bench

    @classmethod
    def made(
        cls, sweep: Sweep, asked: dict[str, list[Question]], texts: Sequence[Text]
    ) -> "Measuring":
        """Run the base on everything once."""
        words = sweep.material.tokenizer
        prompts = [
            p for side in SIDES for p in question_prompts(side, asked[side], words, compared=False)
        ]
        prompts += text_prompts(texts, words)
        return cls(sweep, asked, sweep.bench(prompts, LAYER, "questions"))

    @property
    def base(self) -> Scored:
        """What the base does."""
        return scored(self.bench.base, self.asked, FORMS_ASKED, text=True)

    def at(self, **settings: float) -> Scored:
        """What the clamp does at some settings of the recipe."""
        recipe = self.sweep.at(Point(tuple(settings.items())))
        results = self.bench.measure(self.sweep.weights(recipe))
        return scored(results, self.asked, FORMS_ASKED, text=True)


def loss_added(base: Scored, outcome: Scored) -> float:
    """Nats/token."""
    return (outcome.loss or 0.0) - (base.loss or 0.0)


def keeps(base: Scored, outcome: Scored) -> bool:
    """Whether what is to be kept was kept, in both prompt forms, and the loss within its bar."""
    retained = min(outcome.retain[form] / base.retain[form] for form in FORMS_ASKED)
    return retained >= RETAINED_BAR and loss_added(base, outcome) <= LOSS_BAR


def forgotten(outcome: Scored) -> float:
    """Accuracy on the forget questions in the prompt form that knows more."""
    return max(outcome.forget.values())


def line(name: str, base: Scored, outcome: Scored) -> str:
    """One row of the printed table."""
    shares = [side[form] for side in (outcome.forget, outcome.retain) for form in FORMS_ASKED]
    return f"{name:34s}{''.join(f' {x:12.3f}' for x in shares)} {loss_added(base, outcome):+11.4f}"


HEADER = f"{'':34s}" + "".join(
    f" {name:>12s}"
    for name in (*(f"{side} {form}" for side in SIDES for form in FORMS_ASKED), "loss added")
)


def pick(sweep: Sweep, world: World, seed: int) -> dict[str, Any]:
    """The setting of the grid that forgets most on the validation split and keeps the rest.

    Each forget question is asked four times, its choices rotated, and loss is taken on text of its
    own.
    """
    validation = sweep.asked.split.validation
    rotations = [(*range(first, 4), *range(first)) for first in range(4)]
    rotated = [
        in_order(question, order) for question in validation["forget"] for order in rotations
    ]
    texts = [Text(text, 0) for text in retained_text(world, N_TEXTS, seed + 1_000_000)]
    measuring = Measuring.made(sweep, validation | {"forget": rotated}, texts)
    base = measuring.base
    print(f"\nvalidation\n{HEADER}\n{line('base', base, base)}")
    found = []
    for n_features, value in product(GRID_N_FEATURES, GRID_VALUES):
        settings = {"n_features": n_features, "value": value}
        outcome = measuring.at(**settings)
        print(line(f"{n_features} features, value {value:g}", base, outcome), flush=True)
        score = (keeps(base, outcome), -forgotten(outcome), -loss_added(base, outcome))
        found.append((score, settings))
    return max(found, key=lambda one: one[0])[1]


def report(sweep: Sweep, settings: dict[str, Any]) -> bool:
    """Prints the test table and says whether every bar is met in both prompt forms."""
    assert sweep.recipe.verify is not None
    texts = load_texts(sweep.recipe.verify.text, sweep.recipe)
    measuring = Measuring.made(sweep, sweep.asked.split.test, texts)
    base, outcome = measuring.base, measuring.at(**settings)
    zero = measuring.at(**settings | {"value": 0.0})
    print(f"\ntest\n{HEADER}\n{line('base', base, base)}\n{line('value 0', base, zero)}")
    print(line(f"value {settings['value']:g}", base, outcome))
    print(f"the clamp fires on {outcome.tokens_fired} tokens")
    return keeps(base, outcome) and forgotten(outcome) <= FORGET_BAR


def build(seed: int, out: Path) -> bool:
    """Builds the miniature of `seed` in `out`; True when the test split meets every bar."""
    started = time.perf_counter()
    world = build_world(seed)
    tokenizer = build_tokenizer(vocabulary_texts(world))
    print(f"seed {seed}: {len(world.facts)} facts, {len(tokenizer)} tokens", flush=True)
    write_texts(out, vars(corpora_of(world, seed)))
    write_questions(out, question_splits(world, seed), world, seed)

    model = train_model(world, tokenizer, seed, ModelSchedule())
    write_model(model, tokenizer, out / "model")
    print(f"model trained: {time.perf_counter() - started:.0f} s", flush=True)
    save_sae(train_site_sae(cached_activations(model, world, tokenizer, seed), seed), out / "sae")
    print(f"SAE trained: {time.perf_counter() - started:.0f} s", flush=True)

    write_recipe(out, n_features=GRID_N_FEATURES[0], value=GRID_VALUES[0])
    with tempfile.TemporaryDirectory() as cache:
        sweep = Sweep(Recipe.load(out / "recipe.toml"), None, cache=Path(cache))
        settings = pick(sweep, world, seed)
        write_recipe(out, **settings)
        met = report(sweep, settings)
    print(f"bars met: {met}; {time.perf_counter() - started:.0f} s in all", flush=True)
    return met


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="build", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="the shipped one is 1")
    parser.add_argument("--out", type=Path, default=HERE, help="default: the shipped one")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # sums in one order, so that a seed gives the same files everywhere
    torch.use_deterministic_algorithms(True)
    transformers.logging.set_verbosity_error()
    if not build(arguments.seed, arguments.out):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
