"""What an SAE is trained on: a layer's output, each dimension standardised, tokens mixed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bake.questions.corpora import Windows
from bake.search.statistics import BATCH_TOKENS, layer_outputs_of

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
        """By the tokens of windows from `first` on.

        Args:
            model: a stock Gemma.
            layer: whose output.
            windows: of a corpus.
            first: of them.
        """
        n, total, squares = 0, torch.zeros(()), torch.zeros(())
        for part in _slices(windows, first, 0, len(windows.ids) - first):
            h = activations_of(model, layer, windows, part).double()
            n, total, squares = n + len(h), total + h.sum(0), squares + h.square().sum(0)
            if n >= SAMPLED_TOKENS:
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
    depends on the block's number alone. Behind the last window the first comes again.

    Args:
        model: a stock Gemma.
        layer: whose output.
        windows: of a corpus.
        first: of them.
        train: how large a batch is, and the seed.
        block: its number.

    Yields:
        [batch_tokens, d_in] float32.
    """
    per_window = max(1, windows.n_tokens // len(windows.ids))
    n = math.ceil(MIXED_BATCHES * train.batch_tokens / per_window)
    parts = _slices(windows, first, block * n, (block + 1) * n)
    h = torch.cat([activations_of(model, layer, windows, part) for part in parts])
    generator = torch.Generator().manual_seed(train.seed * 1_000_003 + block)
    order = torch.randperm(len(h), generator=generator).to(h.device)
    for rows in torch.split(order, train.batch_tokens):
        if len(rows) == train.batch_tokens:
            yield h[rows]


def _slices(windows: Windows, first: int, begin: int, end: int) -> Iterator[slice]:
    """Places in the windows from `first` on, over and over, as slices that are run at once."""
    step, count = max(1, BATCH_TOKENS // windows.ids.shape[1]), len(windows.ids) - first
    while begin < end:
        at = begin % count
        n = min(step, end - begin, count - at)
        yield slice(first + at, first + at + n)
        begin += n


def activations_of(model: Any, layer: int, windows: Windows, part: slice) -> Tensor:
    """A layer's output on the counted tokens of some windows: [n, d_in] float32.

    Args:
        model: a stock Gemma.
        layer: whose output.
        windows: of a corpus.
        part: which of them.

    Raises:
        RanOutError: memory runs out at one window.
    """
    ids = windows.ids[part]
    counted = torch.from_numpy(windows.counts(ids)).to(model.device)
    return layer_outputs_of(model, [layer], ids)[layer][counted].float().clone()
