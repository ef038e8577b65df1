from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from verify.firing import EXAMPLES, FiredExamples
from verify.prompts import Prompt, left_padded


@dataclass
class Oracle:
    last_fired: torch.Tensor | None = None


class Tokenizer:
    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [f"<{i}>" for i in ids]


def prompt(source: str, row: int, n: int, form: str = "plain") -> Prompt:
    return Prompt(source, form, row, tuple(range(2, 2 + n)), every_token=True)


def test_the_sequences_that_fire_most_are_kept_with_their_positions() -> None:
    oracle: Any = Oracle()
    examples = FiredExamples(oracle, "plain")
    generator = torch.Generator().manual_seed(0)
    expected: dict[str, list[tuple[int, int, tuple[int, ...]]]] = {}
    for first in range(0, 24, 4):
        sources = ("forget", "retain", "text", "forget")
        prompts = [
            prompt(source, first + i, 3 + (first + i) % 5, "text" if source == "text" else "plain")
            for i, source in enumerate(sources)
        ]
        batch = left_padded(prompts, pad_id=0, last_only=False)
        fired = torch.rand(batch.input_ids.shape, generator=generator) < 0.4
        oracle.last_fired = fired & batch.attention_mask.bool()
        for i, each in enumerate(prompts):
            real = oracle.last_fired[i][batch.attention_mask[i].bool()]
            at = tuple(int(position) for position in real.nonzero())
            expected.setdefault(each.source, []).append((-len(at), each.row, at))
        examples(batch)
    result = examples.result(Tokenizer())
    for source, found in expected.items():
        kept = [(-len(e.fired), e.row, e.fired) for e in result if e.source == source]
        assert kept == sorted(found)[:EXAMPLES]
    assert [e.source for e in result] == sorted(
        (e.source for e in result), key=["forget", "retain", "text"].index
    )
    assert result[0].tokens[:3] == ("<2>", "<3>", "<4>")


def test_questions_in_the_other_form_are_left_out() -> None:
    oracle: Any = Oracle()
    examples = FiredExamples(oracle, "plain")
    batch = left_padded([prompt("forget", 1, 4, "chat")], pad_id=0, last_only=False)
    oracle.last_fired = torch.ones(1, 4).bool()
    examples(batch)
    assert examples.result(Tokenizer()) == ()
