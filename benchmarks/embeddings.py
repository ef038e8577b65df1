"""What a miniature's embeddings alone say of its topic's facts.

From a name's embedding a ridge regression tells which of a relation's values belongs to it, each
fact from all the others of its relation (leave one out). The base; embeddings drawn at random; and
folders of weights that forget, whose embeddings may be the base's.

    python benchmarks/embeddings.py [FOLDER…]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from bakeout.miniature.making.world import build_world
from bakeout.verbs.demo import MINIATURE

SHIPPED = 1
"""Seed of the shipped miniature."""
RIDGE = 0.1
"""As a share of the mean square of the embeddings."""


def right(embeddings: Tensor, values: list[str]) -> int:
    """How many names' values are told by the others'.

    Args:
        embeddings: [names, d_in].
        values: of each name.
    """
    x = embeddings / embeddings.norm(dim=1, keepdim=True)
    kinds = sorted(set(values))
    found = 0
    for i, value in enumerate(values):
        others = torch.arange(len(values)) != i
        y = torch.eye(len(kinds))[[kinds.index(v) for v in values]][others]
        mean = x[others].mean(0)
        known, asked = x[others] - mean, x[i] - mean
        gram = known @ known.T
        gram += RIDGE * gram.diagonal().mean() * torch.eye(len(known))
        scores = asked @ known.T @ torch.linalg.solve(gram, y - y.mean(0))
        found += kinds[int(scores.argmax())] == value
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path)
    folders = parser.parse_args().folders
    tokenizer = AutoTokenizer.from_pretrained(MINIATURE / "model")
    facts = build_world(SHIPPED).facts_of(forget=True)
    relations = sorted({fact.relation.name for fact in facts})

    def line(name: str, embeddings: Tensor) -> None:
        total = 0
        for relation in relations:
            own = [fact for fact in facts if fact.relation.name == relation]
            tokens = tokenizer.convert_tokens_to_ids([f"▁{fact.entity}" for fact in own])
            total += right(embeddings[tokens], [fact.value for fact in own])
        print(f"{name:<16}{total} of {len(facts)} facts")

    for name, folder in [("base", MINIATURE / "model"), *((f.name, f) for f in folders)]:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        embeddings = model.get_input_embeddings().weight.detach()
        line(name, embeddings)
        if name == "base":
            generator = torch.Generator().manual_seed(0)
            line("drawn", torch.randn(embeddings.shape, generator=generator))


if __name__ == "__main__":
    main()
