"""What generation does with logits and with its arguments, whatever the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Generator, Tensor


def check_prompts(input_ids: Tensor, attention_mask: Tensor, vocab: int) -> None:
    """Raise ValueError unless prompts are [batch, seq] ids of the vocabulary, padded left."""
    shape = tuple(input_ids.shape)
    if len(shape) != 2 or 0 in shape or tuple(attention_mask.shape) != shape:
        raise ValueError(
            f"input_ids {shape}, attention_mask {tuple(attention_mask.shape)}; expected both "
            "[batch, seq] and not empty"
        )
    if int(input_ids.min()) < 0 or int(input_ids.max()) >= vocab:
        raise ValueError(
            f"input_ids from {int(input_ids.min())} to {int(input_ids.max())}; expected 0 to "
            f"{vocab - 1}"
        )
    check_padding(attention_mask)
    if bool((attention_mask.diff(dim=1) < 0).any()):
        raise ValueError("attention_mask has holes; prompts must be padded on the left")


class Chooser:
    """Picks next tokens: the likeliest, or a draw.

    Args: as `OnnxRunner.generate` has them.

    Raises:
        ValueError: one is out of range.
    """

    def __init__(
        self, do_sample: bool, temperature: float, top_k: int = 0, top_p: float = 1.0, seed: int = 0
    ) -> None:
        import torch

        if not 0 < temperature < np.inf or top_k < 0 or not 0 < top_p <= 1:
            raise ValueError(
                f"temperature {temperature}, top_k {top_k}, top_p {top_p}; expected above 0, at "
                "least 0, above 0 and at most 1"
            )
        self._how = (temperature, top_k, top_p)
        self._generator = torch.Generator().manual_seed(seed) if do_sample else None

    def __call__(self, logits: Tensor) -> Tensor:
        """[batch, vocab] float32 -> [batch] int64."""
        if self._generator is None:
            return logits.argmax(dim=-1)
        return sample(logits, *self._how, self._generator)


def sample(
    logits: Tensor, temperature: float, top_k: int, top_p: float, generator: Generator
) -> Tensor:
    """Draw one token per row: [batch, vocab] -> [batch]."""
    import torch

    ordered, tokens = logits.sort(dim=-1, descending=True)
    shares = ((ordered - ordered[:, :1]) / temperature).softmax(dim=-1)  # never overflows
    before = shares.cumsum(dim=-1) - shares
    shares = shares.masked_fill(before >= top_p, 0.0)
    if top_k:
        shares[:, top_k:] = 0.0
    drawn = torch.multinomial(shares, 1, generator=generator)
    return tokens.gather(-1, drawn).squeeze(-1)


def check_padding(attention_mask: Tensor) -> None:
    """Raise ValueError where the last column holds padding."""
    if not bool(attention_mask[:, -1].all()):
        raise ValueError("the last column holds padding; prompts must be padded on the left")


def asked_to_go_on(
    input_ids: Tensor, attention_mask: Tensor, stops: Sequence[int]
) -> dict[str, Tensor]:
    """What a model needs to go on with prompts, as `verify.engines.forward.go_on` takes it."""
    import torch

    check_padding(attention_mask)
    ends = torch.tensor(list(stops), dtype=torch.long)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "stops": ends}
