"""Prompts that begin alike, as one tree of tokens: what they share is computed once.

A model reads the whole tree in one forward pass: each token sees its own prompt only, at its own
place in it. Logits are those of every prompt alone, up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TokenTree:
    """Sequences of tokens, their common beginnings merged; a parent stands before its children."""

    ids: tuple[int, ...]
    """Per node, its token."""
    parents: tuple[int, ...]
    """Per node, the node of the token before it; -1 where there is none."""
    ends: tuple[int, ...]
    """Per sequence, the node of its last token."""

    def tensors(self) -> dict[str, Tensor]:
        """What a model needs to read it.

        Returns:
            input_ids: [1, nodes].
            position_ids: [1, nodes], each token's place in its sequence, from 0.
            visible: [nodes, nodes] bool, whether the row's token sees the column's.
            ends: [sequences].
        """
        import torch

        visible = np.eye(len(self.ids), dtype=bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                visible[node] |= visible[parent]
        return {
            "input_ids": torch.tensor([self.ids]),
            "position_ids": torch.from_numpy(visible.sum(axis=1) - 1)[None],
            "visible": torch.from_numpy(visible),
            "ends": torch.tensor(self.ends),
        }


def merge(sequences: Sequence[Sequence[int]]) -> TokenTree:
    """The tree of sequences; none may be empty."""
    ids: list[int] = []
    parents: list[int] = []
    ends: list[int] = []
    known: dict[tuple[int, int], int] = {}
    for sequence in sequences:
        node = -1
        for token in sequence:
            at = (node, token)
            if at not in known:
                known[at] = len(ids)
                ids.append(token)
                parents.append(node)
            node = known[at]
        if node < 0:
            raise ValueError("an empty sequence has no last token")
        ends.append(node)
    return TokenTree(tuple(ids), tuple(parents), tuple(ends))
