"""Trains an SAE on the miniature's residual stream, by the path of `bakeout train-sae`."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor
from transformers import Gemma2ForCausalLM, PreTrainedTokenizerFast

from bake.search.statistics import residuals
from bake.training.train_sae import SAETable, Schedule, train_sae
from bakeout.miniature.making.tokenizer import BOS, EOS, PAD
from bakeout.miniature.making.train_model import ModelSchedule, collate, encode
from bakeout.miniature.making.world import World
from bakeout.miniature.making.written_corpora import PRACTISE, training_documents

LAYER = 0
"""Whose output it reads."""
SAE_TABLE = SAETable(hook_point=f"blocks.{LAYER}.hook_resid_post", d_sae=1536, k=5.0)
SCHEDULE = Schedule(SAE_TABLE, n_steps=2500, batch_size=1024, learning_rate=2e-3)
N_TOKENS = 150_000
"""Tokens whose activations are cached."""


def cached_activations(
    model: Gemma2ForCausalLM, world: World, tokenizer: PreTrainedTokenizerFast, seed: int
) -> Tensor:
    """Activations [N_TOKENS, d_in] on fresh documents; `<bos>`, `<eos>` and `<pad>` left out."""
    documents = training_documents(world, seed + 1_000_000, PRACTISE)
    kept: list[Tensor] = []
    n_kept = 0
    while n_kept < N_TOKENS:
        rows = [encode(d, tokenizer, ModelSchedule()) for d in islice(documents, 128)]
        ids = collate(rows).ids
        counted = (ids != PAD) & (ids != BOS) & (ids != EOS)
        kept.append(residuals(model, [LAYER], ids)[LAYER][counted].clone())
        n_kept += len(kept[-1])
    return torch.cat(kept)[:N_TOKENS]


def _batches(activations: Tensor, batch_size: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(activations), generator=generator)
        for chunk in torch.split(order, batch_size):
            if len(chunk) == batch_size:
                yield activations[chunk]


def train_site_sae(activations: Tensor, seed: int, schedule: Schedule = SCHEDULE) -> Any:
    """Trains a BatchTopK SAE as `bakeout train-sae` does.

    Args:
        activations: [n_tokens, d_in].
        seed: of the initial weights and of the order of tokens.
        schedule: sizes and steps.

    Returns:
        The SAE in training form; `save_inference_model` writes it as a JumpReLU SAE.
    """
    metadata = SAEMetadata(
        model_name="bakeout-miniature",
        hook_name=SAE_TABLE.hook_point,
        context_size=128,
        prepend_bos=True,
        exclude_special_tokens=[PAD, EOS, BOS],
    )
    batches = _batches(activations, schedule.batch_size, seed)
    return train_sae(batches, activations.shape[1], seed, schedule, metadata)
