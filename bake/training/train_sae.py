"""`bakeout train-sae`: an SAE for a model that has no public one, by sae_lens's own trainer.

Activations come from the stock transformers model, cut off after the hook layer, not from another
library's rebuilding of it: an SAE must see what the clamp will see.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field, ValidationError
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from bake.base import find_base
from bake.errors import DataError, ModelError, RecipeError
from bake.new_folder import check_output, new_folder
from bake.questions.corpora import Windows, load_windows
from bake.recipe import Base, Recipe
from bake.sae.fit_figures import Fit
from bake.search.cache import model_sha256
from bake.sources import Corpus, Table, layer_of, one_line, read_toml
from bake.stock import load_base, load_tokenizer
from bake.training.kept_training import Kept
from bake.training.standard import Standard, activations_of, mixed

HELD_OUT_TOKENS = 16_384
"""Tokens that the SAE is not trained on, or a tenth of the corpus if that is less: by them it is
judged."""


class SAETable(Table):
    """What is trained."""

    hook_point: str
    """blocks.L.hook_resid_post or blocks.L.hook_resid_pre."""
    architecture: Literal["batchtopk", "jumprelu", "standard"] = "batchtopk"
    """batchtopk is saved as JumpReLU."""
    d_sae: int = Field(default=16_384, ge=2)
    """Number of features. Farrell et al., arXiv 2410.19278, took 16k for layer 9 of gemma-2b-it."""
    k: float = Field(default=20.0, gt=0)
    """batchtopk only: mean number of features active per token."""
    sparsity_coefficient: float = Field(default=1.0, gt=0)
    """jumprelu and standard: weight of the L0 or L1 term."""


class TrainTable(Table):
    """How, and on what."""

    text: Corpus
    """Texts of the kind that the model is going to see."""
    seq_len: int = Field(default=1024, ge=2)
    """Window length in tokens, BOS included."""
    n_tokens: int = Field(default=100_000_000, ge=1)
    """Tokens to train on; the corpus is gone through as often as that takes."""
    batch_tokens: int = Field(default=4096, ge=1)
    """Tokens per step."""
    learning_rate: float = Field(default=3e-4, gt=0)
    """Peak; warmed up at the start, brought down to a hundredth over the last quarter."""
    seed: int = Field(default=0, ge=0, lt=1 << 32)
    """Of initial weights, order of texts and mixing of tokens."""


class TrainConfig(Table):
    """A whole training configuration, as `bakeout train-sae` reads it."""

    schema_version: Literal[1] = Field(alias="schema")
    """Version of this format."""
    base: Base
    """The model."""
    sae: SAETable
    """What is trained."""
    train: TrainTable
    """How, and on what."""

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a configuration file.

        Raises:
            RecipeError: it is missing, is no TOML, or a value is wrong; one line.
        """
        try:
            config = cls.model_validate(read_toml("config", path))
            layer_of(config.sae.hook_point)
            if config.sae.architecture == "batchtopk" and config.sae.k > config.sae.d_sae:
                raise ValueError(f"k is {config.sae.k:g}, expected at most d_sae")
        except ValidationError as error:
            raise RecipeError(f"config {path}: {one_line(error, cls)}") from error
        except ValueError as error:
            raise RecipeError(f"config {path}: sae: {error}") from error
        return config


@dataclass(frozen=True)
class Schedule:
    """How an SAE is trained; what sae_lens's trainer is told."""

    sae: SAETable
    n_steps: int
    batch_size: int
    """Tokens per step."""
    learning_rate: float
    warm_up_steps: int = 50


@dataclass(frozen=True)
class Quality:
    """How well an SAE does on tokens that it was not trained on."""

    fit: Fit
    """On these tokens; its share of dead features is of them too."""
    dead: int
    """Features that fire on none of them."""


def train_config(
    file: Path,
    out: Path,
    progress: Callable[[str, float], None] = lambda _what, _share: None,
    device: str = "cpu",
) -> Quality:
    """Train what a configuration file asks for, and write the SAE as a sae_lens folder. A run that
    was killed goes on, to the same result.

    Args:
        file: the configuration.
        out: folder of the SAE; it may not exist.
        progress: called with what is done, and the share of it.
        device: as torch names it; on a GPU in bfloat16, the weights and their sums in float32.

    Raises:
        BakeoutError: of the kind of trouble it meets; nothing is written then.
    """
    config = TrainConfig.load(file)
    recipe = _as_recipe(config, file.resolve().parent)
    sae, train = config.sae, config.train
    base = find_base(recipe)
    layer = layer_of(sae.hook_point)
    if layer >= base.n_layers:
        raise ModelError(
            f"config {file}: sae.hook_point is {sae.hook_point}, but {base.name} has "
            f"{base.n_layers} layers; expected 0 to {base.n_layers - 1}"
        )
    size = 8 * base.d_in * sae.d_sae
    check_output(out, inputs=[file, base.folder], size=size, force=False)
    tokenizer, model = load_tokenizer(recipe), load_base(recipe, device)
    windows = load_windows(
        train.text,
        recipe,
        tokenizer,
        seq_len=train.seq_len,
        n_seqs=-(-(train.n_tokens + HELD_OUT_TOKENS) // (train.seq_len - 1)),
        seed=train.seed,
    )
    if len(windows.ids) < 2:
        raise DataError(
            f"{windows.name}: {windows.n_tokens:,} tokens make no two windows of seq_len "
            f"{train.seq_len}, one to train on and one to judge by; add texts, or shorten seq_len"
        )
    n_steps = train.n_tokens // train.batch_tokens
    if n_steps < 4:
        raise DataError(
            f"config {file}: n_tokens {train.n_tokens:,} makes {n_steps} steps of "
            f"{train.batch_tokens:,}; expected at least 4"
        )
    held_out = max(1, min(len(windows.ids) // 10, HELD_OUT_TOKENS // train.seq_len))
    schedule = Schedule(
        sae,
        n_steps,
        batch_size=train.batch_tokens,
        learning_rate=train.learning_rate,
        warm_up_steps=min(1000, n_steps // 10),
    )
    metadata = SAEMetadata(
        model_name=base.name,
        hook_name=sae.hook_point,
        context_size=train.seq_len,
        prepend_bos=True,
        exclude_special_tokens=list(windows.special_ids),
    )
    trainer = trainer_of(base.d_in, train.seed, schedule, metadata, device, scaled=False)
    standard = Standard.of(model, layer, windows, held_out)
    kept = Kept.of([config.model_dump_json(), model_sha256(base), windows.sha256, device])
    first = kept.restore(trainer)

    def told() -> Iterator[Tensor]:
        for block in count(first):
            if block > first:
                kept.save(trainer, block)
            for batch in mixed(model, layer, windows, held_out, train, block):
                progress("train", min(1.0, trainer.n_training_steps / n_steps))
                yield standard.of_tokens(batch)

    trained = fit(trainer, told())
    with new_folder(out) as folder:
        save_sae(trained, folder)
        folded = SAE.load_from_disk(folder)
        standard.fold(folded)
        if not all(bool(tensor.isfinite().all()) for tensor in folded.state_dict().values()):
            kept.remove()
            raise DataError(
                f"config {file}: what was trained is not finite; expected a learning_rate at which "
                f"it is, got {train.learning_rate:g}. Take a smaller one"
            )
        folded.save_model(folder)
        _in_order(folder)
    kept.remove()
    return quality(SAE.load_from_disk(out), model, layer, windows, held_out)


def save_sae(trained: Any, folder: Path) -> None:
    """Write a trained SAE into a folder; the same SAE gives the same bytes."""
    trained.save_inference_model(folder)
    _in_order(folder)


def _in_order(folder: Path) -> None:
    cfg = folder / "cfg.json"  # sae_lens writes its keys in an order that changes from run to run
    config = json.loads(cfg.read_text(encoding="utf-8"))
    cfg.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for path in folder.iterdir():
        path.chmod(0o644)


# --------------------------------------------------------------------------- training


def train_sae(
    batches: Iterator[Tensor], d_in: int, seed: int, schedule: Schedule, metadata: SAEMetadata
) -> Any:
    """Train an SAE with sae_lens's trainer; its input scaling is folded into the weights.

    Args:
        batches: [batch_size, d_in] each, without end.
        d_in: width of the residual stream.
        seed: of the initial weights.
        schedule: sizes and steps.
        metadata: what the SAE says of itself.

    Returns:
        The SAE in training form; `save_inference_model` writes it ready for use.
    """
    return fit(trainer_of(d_in, seed, schedule, metadata, "cpu", scaled=True), batches)


def fit(trainer: Any, batches: Iterator[Tensor]) -> Any:
    """Train to the end; returns the SAE in training form. Changes the trainer."""
    trainer.data_provider = batches
    with contextlib.redirect_stderr(io.StringIO()):
        return trainer.fit()


def trainer_of(
    d_in: int, seed: int, schedule: Schedule, metadata: SAEMetadata, device: str, *, scaled: bool
) -> Any:
    """sae_lens's trainer of a new SAE.

    Args:
        d_in: width of the residual stream.
        seed: of the initial weights.
        schedule: sizes and steps.
        metadata: what the SAE says of itself.
        device: as torch names it.
        scaled: let it bring activations to a common size; else they have it.
    """
    torch.manual_seed(seed)
    random.seed(seed)
    cfg = SAETrainerConfig(
        total_training_samples=schedule.n_steps * schedule.batch_size,
        train_batch_size_samples=schedule.batch_size,
        lr=schedule.learning_rate,
        lr_warm_up_steps=schedule.warm_up_steps,
        lr_end=0.01 * schedule.learning_rate,
        lr_decay_steps=schedule.n_steps // 4,
        dead_feature_window=100,
        feature_sampling_window=schedule.n_steps + 1,
        n_batches_for_norm_estimate=20,
        device=device,
        autocast=torch.device(device).type == "cuda",
    )
    sae = _untrained(d_in, schedule, metadata, scaled).to(device)
    return SAETrainer(cfg=cfg, sae=sae, data_provider=iter(()))


def _untrained(d_in: int, schedule: Schedule, metadata: SAEMetadata, scaled: bool) -> Any:
    common: dict[str, Any] = {
        "d_in": d_in,
        "d_sae": schedule.sae.d_sae,
        "normalize_activations": "expected_average_only_in" if scaled else "none",
        "metadata": metadata,
    }
    warm_up = schedule.n_steps // 10
    if schedule.sae.architecture == "jumprelu":
        return JumpReLUTrainingSAE(
            JumpReLUTrainingSAEConfig(
                l0_coefficient=schedule.sae.sparsity_coefficient, l0_warm_up_steps=warm_up, **common
            )
        )
    if schedule.sae.architecture == "standard":
        return StandardTrainingSAE(
            StandardTrainingSAEConfig(
                l1_coefficient=schedule.sae.sparsity_coefficient, l1_warm_up_steps=warm_up, **common
            )
        )
    return BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(k=schedule.sae.k, **common))


@torch.no_grad()
def quality(sae: Any, model: Any, layer: int, windows: Windows, n_windows: int) -> Quality:
    """An SAE on the first windows of a corpus."""
    h = activations_of(model, layer, windows, slice(0, n_windows)).cpu()
    acts = sae.encode(h)
    errors = (h - sae.decode(acts)).double().square().sum(0)
    variances = (h - h.mean(0)).double().square().sum(0)
    fired = acts > 0
    dead = int((~fired.any(0)).sum())
    l0, share = float(fired.sum(-1).float().mean()), dead / fired.shape[1]
    fit = Fit.of(len(h), errors.tolist(), variances.tolist(), l0=l0, dead=share, agreement=math.nan)
    return Quality(fit, dead)


def _as_recipe(config: TrainConfig, folder: Path) -> Recipe:
    """The base and the place where paths start, as what loads a model wants them."""
    clamp = {"sae": {"path": "."}, "method": "zero", "features": [0]}
    base = config.base.model_dump(exclude_unset=True)
    data = {"schema": 1, "base": base, "clamp": [clamp]}
    return Recipe.parse(data, name="train-sae", folder=folder)
