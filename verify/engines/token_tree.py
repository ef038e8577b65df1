"""Prompts that begin alike, as one tree of tokens: what they share is computed once.

A model reads the trunk once and then all branches at once, as rows of a batch: each token sees its
own prompt only, at its own place in it. Logits are those of every prompt alone, up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


ONE_ROW = 320
"""Most tokens of a tree that is read in one row, where the model is no wider: up to there a second
forward pass costs more than attention between branches that do not see one another. The wider a
model, the less of its work is attention."""
PAIR = 0.35
"""Work of two tokens that stand in one row, whether they see one another or not, over that of a
token by itself, in a model one wide."""
PASS = 2e6
"""What a forward pass costs beside the work, in tokens by themselves, in a model one wide: calls,
of which there are as many in any model, and matrices grow with the square of the width."""


@dataclass(frozen=True)
class TokenTree:
    """Sequences of tokens, their common beginnings merged; a parent stands before its children."""

    ids: tuple[int, ...]
    """Per node, its token."""
    parents: tuple[int, ...]
    """Per node, the node of the token before it; -1 where there is none."""
    ends: tuple[int, ...]
    """Per sequence, the node of its last token."""

    def tensors(self, hidden_size: int) -> dict[str, Tensor]:
        """What a model needs to read it: the trunk that all sequences share, then a row for each
        branch off it, padded on the left, every row's ends last. A tree that is small for the model
        has no trunk and one branch.

        Args:
            hidden_size: of the model.

        Returns:
            trunk: [1, shared] token ids.
            input_ids: [branches, nodes].
            attention_mask: [branches, nodes], 1 at nodes.
            position_ids: [branches, nodes], each token's place in its sequence, from 0.
            visible: [branches, nodes, nodes] bool, whether the row's token sees the column's; all
                see the trunk.
            ends: [sequences, 2], branch and node of each sequence's last token.
        """
        import torch

        trunk, branches = self._rows(hidden_size)
        last = set(self.ends)
        depth = np.zeros(len(self.ids), dtype=int)
        for node, parent in enumerate(self.parents):
            depth[node] = depth[parent] + 1 if parent >= 0 else 0
        width = max(len(branch) for branch in branches)
        shape = (len(branches), width)
        ids, mask, positions = (np.zeros(shape, dtype=int) for _ in range(3))
        visible = np.broadcast_to(np.eye(width, dtype=bool), (*shape, width)).copy()
        place: dict[int, tuple[int, int]] = {}
        for row, branch in enumerate(branches):
            ordered = sorted(branch, key=lambda node: node in last)
            place |= {node: (row, width - len(branch) + i) for i, node in enumerate(ordered)}
            for node in branch:  # a parent stands before its children
                at, above = place[node], place.get(self.parents[node])
                ids[at], mask[at], positions[at] = self.ids[node], 1, depth[node]
                if above is not None:
                    visible[at] |= visible[above]
        found = {
            "trunk": np.array([[self.ids[node] for node in trunk]], dtype=int).reshape(1, -1),
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": positions,
            "visible": visible,
            "ends": np.array([place[node] for node in self.ends]),
        }
        return {name: torch.from_numpy(array) for name, array in found.items()}

    def work(self, hidden_size: int) -> float:
        """About how much a model of a width has to do to read it, in tokens by themselves."""
        trunk, branches = self._rows(hidden_size)
        width, shared = max(len(branch) for branch in branches), len(trunk)
        branching = width * len(branches) * (1 + (width + shared) * PAIR / hidden_size)
        pass_ = PASS / hidden_size**2
        return pass_ + branching + (work_of_batch([shared], hidden_size) if trunk else 0)

    def _rows(self, hidden_size: int) -> tuple[list[int], list[list[int]]]:
        """Nodes of the trunk, and of each row."""
        small = len(self.ids) <= max(ONE_ROW, hidden_size)
        return ([], [list(range(len(self.ids)))]) if small else self._parted

    @cached_property
    def _parted(self) -> tuple[list[int], list[list[int]]]:
        """Nodes of the trunk, which no sequence ends in; and of each branch, parents first."""
        children: list[list[int]] = [[] for _ in self.ids]
        heads: list[int] = []
        for node, parent in enumerate(self.parents):
            (children[parent] if parent >= 0 else heads).append(node)
        trunk: list[int] = []
        last = set(self.ends)
        while len(heads) == 1 and heads[0] not in last:
            trunk.append(heads[0])
            heads = children[heads[0]]
        branch_of = {head: branch for branch, head in enumerate(heads)}
        branches: list[list[int]] = [[] for _ in heads]
        for node in sorted(set(range(len(self.ids))) - set(trunk)):
            branch_of.setdefault(node, branch_of.get(self.parents[node], -1))
            branches[branch_of[node]].append(node)
        return trunk, branches


@runtime_checkable
class TreeRunner(Protocol):
    """An engine that reads many prompts with a common beginning in one forward pass."""

    reads_trees: bool
    """Whether it does: not where it has to be shown whole sequences."""

    def width(self) -> int:
        """Of the model's residual stream."""
        ...

    def tree_logits(self, tree: TokenTree) -> Tensor:
        """Next-token logits at the end of each of a tree's sequences.

        Returns:
            [sequences, vocab], float32 on the CPU.
        """
        ...


def work_of_batch(lengths: Sequence[int], hidden_size: int) -> float:
    """About how much whole sequences are in one forward pass, as `TokenTree.work` counts."""
    each = (n * (1 + n * PAIR / hidden_size) for n in lengths)
    return PASS / hidden_size**2 + sum(each)


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
