"""What an SAE is trained on: a layer's output, each dimension standardised, tokens mixed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bake.questions.corpora import Windows
from bake.search.statistics import BATCH_TOKENS, residuals

if TYPE_CHECKING:
    from bake.training.train_sae import TrainTable

MIXED_BATCHES = 64
"""Batches of activations among which tokens are mixed, and which are held at once."""
SAMPLED_TOKENS = 65_536
"""Tokens by which each dimension is standardised."""


@dataclass(frozen=True)
class Standard:
    """How each dimension of the residual stream is standardised. A real Gemma puts most of its norm
    into a few of them, on which an SAE would spend itself.
    """

    mean: Tensor
    """[d_in] float32."""
    scale: Tensor
    """[d_in] float32: standard deviation, 1 where a dimension does not vary."""

    @classmethod
    def of(cls, model: Any, layer: int, windows: Windows, first: int) -> Standard:
        """By the tokens of windows from `first` on. Arguments as `activations` has them."""
        n, total, squares = 0, torch.zeros(()), torch.zeros(())
        for h in activations(model, layer, windows, first):
            h = h.double()
            n, total, squares = n + len(h), total + h.sum(0), squares + h.square().sum(0)
            if n >= min(SAMPLED_TOKENS, int(windows.counted[first:].sum())):
                break
        mean = total / n
        spread = (squares / n - mean.square()).clamp(min=0).sqrt()
        flat = spread <= 1e-6 * spread.max()
        return cls(mean.float(), torch.where(flat, 1.0, spread).float())

    def of_tokens(self, h: Tensor) -> Tensor:
        """h: [n, d_in] -> [n, d_in]."""
        return (h - self.mean) / self.scale

    def fold(self, sae: Any) -> None:
        """Change an SAE of standardised activations into one of the activations as they are, its
        decoder rows of length 1.
        """
        forth, back = (torch.diag(of.cpu()) for of in (1 / self.scale, self.scale))
        sae.fold_activation_whitening(self.mean.cpu(), forth, back)
        sae.fold_W_dec_norm()


def mixed(
    model: Any, layer: int, windows: Windows, first: int, train: TrainTable, block: int
) -> Iterator[Tensor]:
    """The batches of one block of windows, its tokens in an order of its own: which they are
    depends on the block's number alone. Other arguments as `activations` has them.

    Yields:
        [batch_tokens, d_in] float32.
    """
    per_window = max(1, int(windows.counted[first:].sum()) // (len(windows.ids) - first))
    n = math.ceil(MIXED_BATCHES * train.batch_tokens / per_window)
    places = range(block * n, (block + 1) * n)
    numbers = torch.tensor(places) % (len(windows.ids) - first) + first
    step = max(1, BATCH_TOKENS // windows.ids.shape[1])
    h = torch.cat(
        [activations_of(model, layer, windows, part.numpy()) for part in torch.split(numbers, step)]
    )
    generator = torch.Generator().manual_seed(train.seed * 1_000_003 + block)
    order = torch.randperm(len(h), generator=generator).to(h.device)
    for rows in torch.split(order, train.batch_tokens):
        if len(rows) == train.batch_tokens:
            yield h[rows]


def activations(model: Any, layer: int, windows: Windows, first: int) -> Iterator[Tensor]:
    """A layer's output on the counted tokens of windows from `first` on, over and over.

    Args:
        model: a stock Gemma.
        layer: whose output.
        windows: of a corpus.
        first: of them.

    Yields:
        [n, d_in] float32.
    """
    step = max(1, BATCH_TOKENS // windows.ids.shape[1])
    while True:
        for start in range(first, len(windows.ids), step):
            yield activations_of(model, layer, windows, slice(start, start + step))


def activations_of(model: Any, layer: int, windows: Windows, part: Any) -> Tensor:
    """A layer's output on the counted tokens of some windows: [n, d_in] float32.

    Args:
        model: a stock Gemma.
        layer: whose output.
        windows: of a corpus.
        part: which of them, as numpy indexes.
    """
    ids = torch.from_numpy(windows.ids[part].astype("int64")).to(model.device)
    counted = torch.from_numpy(windows.counted[part]).to(model.device)
    return residuals(model, [layer], ids)[layer][counted].float().clone()
