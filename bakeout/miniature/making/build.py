"""Builds the miniature from a seed: `python -m bakeout.miniature.making.build`.

Trains the model and one SAE per layer of the grid, picks layer, features and value on the
validation questions, writes everything, and prints what was measured on the test questions.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from sae_lens import SAE
from torch import Tensor
from transformers import Gemma2ForCausalLM, PreTrainedTokenizerFast

from bake.questions.corpora import MIN_CHARACTERS, Windows, pack
from bake.sae.folding import load_encoder
from bake.sae.layouts import open_sae_folder
from bake.search.select import by_sparsity
from bake.search.statistics import FeatureSite, FeatureStatistics, statistics
from bake.search.train_sae import save_sae
from bakeout.miniature.making.measure import (
    Clamp,
    PromptSet,
    accuracy,
    letter_ids,
    mean_loss,
    text_batches,
    tokenise,
)
from bakeout.miniature.making.miniature_sae import SAESchedule, cached_activations, train_site_sae
from bakeout.miniature.making.shipping import (
    write_model,
    write_questions,
    write_recipe,
    write_texts,
)
from bakeout.miniature.making.tokenizer import BOS, EOS, PAD, build_tokenizer
from bakeout.miniature.making.train_model import ModelSchedule, train_model
from bakeout.miniature.making.world import (
    Splits,
    World,
    build_world,
    question_splits,
    rotations,
)
from bakeout.miniature.making.written_corpora import (
    retained_text,
    selection_corpus,
    vocabulary_texts,
)

HERE = Path(__file__).parents[1]

GRID_LAYERS = (0,)
GRID_N_FEATURES = (80, 100, 120)
GRID_VALUES = (-20.0, -40.0)
RETAIN_THRESHOLD = 0.0001
SEQ_LEN = 128
N_SEQS = 256
N_CORPUS_TEXTS = 1200
N_TEXTS = 300

FORGET_BAR = 0.30
RETAINED_BAR = 0.985
LOSS_BAR = 0.05


@dataclass(frozen=True)
class Outcome:
    """What one setting does on one split."""

    forget_chat: float
    forget_plain: float
    retain_chat: float
    retain_plain: float
    loss: float
    """Nats/token on retained text."""


@dataclass(frozen=True)
class Bench:
    """Prompts and text of one split, ready to measure."""

    forget: PromptSet
    retain: PromptSet
    texts: list[Tensor]
    letters: Tensor
    """[2, 4], see `letter_ids`."""

    def measure(
        self, model: Gemma2ForCausalLM, sae: SAE[Any] | None = None, clamp: Clamp | None = None
    ) -> Outcome:
        """Accuracies in both prompt forms, and the loss; without a clamp, of the base."""
        spaced = self.letters[1:]
        return Outcome(
            accuracy(model, self.forget.chat, self.letters, sae, clamp),
            accuracy(model, self.forget.plain, spaced, sae, clamp),
            accuracy(model, self.retain.chat, self.letters, sae, clamp),
            accuracy(model, self.retain.plain, spaced, sae, clamp),
            mean_loss(model, self.texts, sae, clamp),
        )


@dataclass(frozen=True)
class Site:
    """One layer's SAE and its firing shares."""

    layer: int
    sae: SAE[Any]
    """The SAE as saved and loaded again."""
    forget: FeatureStatistics
    retain: FeatureStatistics


@dataclass(frozen=True)
class Corpora:
    """The texts that are shipped."""

    forget: list[str]
    retain: list[str]
    text: list[str]


def keeps(base: Outcome, outcome: Outcome) -> bool:
    """Whether what is to be kept was kept, in both prompt forms, and the loss within its bar."""
    retained = min(outcome.retain_chat / base.retain_chat, outcome.retain_plain / base.retain_plain)
    return retained >= RETAINED_BAR and outcome.loss - base.loss <= LOSS_BAR


def forgotten(outcome: Outcome) -> float:
    """Accuracy on the forget questions in the prompt form that knows more."""
    return max(outcome.forget_chat, outcome.forget_plain)


def line(name: str, base: Outcome, outcome: Outcome) -> str:
    """One row of the printed table."""
    return (
        f"{name:34s} {outcome.forget_chat:7.3f} {outcome.forget_plain:7.3f}"
        f" {outcome.retain_chat:7.3f} {outcome.retain_plain:7.3f}"
        f" {outcome.retain_chat / base.retain_chat:7.3f} {outcome.loss - base.loss:+8.4f}"
    )


HEADER = (
    f"{'':34s} {'forget':>7s} {'forget':>7s} {'retain':>7s} {'retain':>7s} {'retain':>7s}"
    f" {'loss':>8s}\n{'':34s} {'chat':>7s} {'plain':>7s} {'chat':>7s} {'plain':>7s}"
    f" {'/base':>7s} {'added':>8s}"
)


def train_site(
    model: Gemma2ForCausalLM,
    layer: int,
    world: World,
    tokenizer: PreTrainedTokenizerFast,
    corpora: Corpora,
    seed: int,
    folder: Path,
) -> Site:
    """Trains the SAE of one layer, saves it in `folder`, and counts where its features fire."""
    schedule = SAESchedule()
    activations = cached_activations(model, layer, world, tokenizer, seed, schedule.n_tokens)
    trained = train_site_sae(activations, layer, seed, schedule)
    save_sae(trained, folder)
    sae = SAE.load_from_disk(folder)
    feature_site = FeatureSite(layer, load_encoder(open_sae_folder(folder)))
    found = [
        statistics(model, [feature_site], windows_of(texts, tokenizer))[0]
        for texts in (corpora.forget, corpora.retain)
    ]
    return Site(layer, sae, found[0], found[1])


def windows_of(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> Windows:
    """A corpus packed as the shipped recipe has it packed."""
    encoded = (
        tokenizer.encode(text, add_special_tokens=False)
        for text in texts
        if len(text) > MIN_CHARACTERS
    )
    rows = list(pack(encoded, bos=BOS, eos=EOS, seq_len=SEQ_LEN, n_seqs=N_SEQS))
    return Windows("miniature", np.stack(rows), (PAD, EOS, BOS), len(texts))


def pick(model: Gemma2ForCausalLM, sites: Sequence[Site], bench: Bench) -> tuple[Site, Clamp]:
    """The setting of the grid that forgets most on the validation split and keeps the rest."""
    base = bench.measure(model)
    print(f"\nvalidation\n{HEADER}\n{line('base', base, base)}")
    best: tuple[tuple[bool, float, float], Site, Clamp] | None = None
    for site, n_features in product(sites, GRID_N_FEATURES):
        chosen = by_sparsity(
            site.forget, site.retain, retain_threshold=RETAIN_THRESHOLD, n_features=n_features
        )
        features = tuple(one.feature for one in chosen)
        for value in GRID_VALUES:
            clamp = Clamp(site.layer, features, value)
            outcome = bench.measure(model, site.sae, clamp)
            name = f"layer {site.layer}, {len(features)} features, value {value:g}"
            print(line(name, base, outcome), flush=True)
            score = (keeps(base, outcome), -forgotten(outcome), -outcome.loss)
            if best is None or score > best[0]:
                best = (score, site, clamp)
    assert best is not None, "the grid is not empty"
    return best[1], best[2]


def corpora_of(world: World, seed: int) -> Corpora:
    """The forget and retain corpora and the text for loss added."""
    return Corpora(
        selection_corpus(world, forget=True, n_texts=N_CORPUS_TEXTS, seed=seed),
        selection_corpus(world, forget=False, n_texts=N_CORPUS_TEXTS, seed=seed),
        retained_text(world, N_TEXTS, seed),
    )


def benches_of(
    splits: Splits, corpora: Corpora, world: World, tokenizer: PreTrainedTokenizerFast, seed: int
) -> tuple[Bench, Bench]:
    """What the validation and the test split measure with.

    For picking, each forget question is asked four times, its choices rotated, and loss is taken
    on text of its own; the test split is measured exactly as it is shipped.
    """
    letters = letter_ids(tokenizer)
    rotated = [turned for question in splits.forget_validation for turned in rotations(question)]
    validation_text = retained_text(world, N_TEXTS, seed + 1_000_000)
    return (
        Bench(
            tokenise(rotated, tokenizer),
            tokenise(splits.retain_validation, tokenizer),
            text_batches(validation_text, tokenizer),
            letters,
        ),
        Bench(
            tokenise(splits.forget_test, tokenizer),
            tokenise(splits.retain_test, tokenizer),
            text_batches(corpora.text, tokenizer),
            letters,
        ),
    )


def report(model: Gemma2ForCausalLM, site: Site, clamp: Clamp, bench: Bench) -> bool:
    """Prints the test table and says whether every bar is met in both prompt forms."""
    base = bench.measure(model)
    zero = bench.measure(model, site.sae, replace(clamp, value=0.0))
    outcome = bench.measure(model, site.sae, clamp)
    print(f"\ntest\n{HEADER}\n{line('base', base, base)}\n{line('value 0', base, zero)}")
    print(line(f"layer {clamp.layer}, value {clamp.value:g}", base, outcome))
    features = list(clamp.features)
    shares = site.forget.share[features]
    print(f"features fire on {shares.min():.4f}..{shares.max():.4f} of the forget tokens")
    return keeps(base, outcome) and forgotten(outcome) <= FORGET_BAR


def build(seed: int, out: Path) -> bool:
    """Builds the miniature of `seed` in `out`; True when the test split meets every bar."""
    started = time.perf_counter()
    world = build_world(seed)
    splits = question_splits(world, seed)
    tokenizer = build_tokenizer(vocabulary_texts(world))
    corpora = corpora_of(world, seed)
    print(f"seed {seed}: {len(world.facts)} facts, {len(tokenizer)} tokens", flush=True)

    model = train_model(world, tokenizer, seed, ModelSchedule())
    print(f"model trained: {time.perf_counter() - started:.0f} s", flush=True)
    validation, test = benches_of(splits, corpora, world, tokenizer, seed)
    with tempfile.TemporaryDirectory() as scratch:
        sites = [
            train_site(model, layer, world, tokenizer, corpora, seed, Path(scratch) / str(layer))
            for layer in GRID_LAYERS
        ]
        print(f"SAEs trained: {time.perf_counter() - started:.0f} s", flush=True)
        site, clamp = pick(model, sites, validation)
        met = report(model, site, clamp, test)
        write_model(model, tokenizer, out / "model")
        shutil.copytree(Path(scratch) / str(site.layer), out / "sae", dirs_exist_ok=True)
    write_texts(out, vars(corpora))
    write_questions(out, splits, world, seed)
    write_recipe(out, clamp, retain_threshold=RETAIN_THRESHOLD, seq_len=SEQ_LEN, n_seqs=N_SEQS)
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
