from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from bake.questions.prompts import Choice, Prompt, left_padded
from verify.compare.firing import EXAMPLES, FeatureWatch, FiredExamples, fired_on


@dataclass
class Oracle:
    last_fired: torch.Tensor
    last_active: dict[int, torch.Tensor] = field(default_factory=dict)


class Tokenizer:
    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [f"<{i}>" for i in ids]


def prompt(source: str, row: int, n: int, form: str = "plain") -> Prompt:
    return Prompt(source, form, row, tuple(range(2, 2 + n)), every_token=True)


def test_the_sequences_that_fire_most_are_kept_with_their_positions() -> None:
    examples = FiredExamples("plain")
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
        oracle: Any = Oracle(fired & batch.attention_mask.bool())
        after: list[bool] = []
        for i, each in enumerate(prompts):
            real = oracle.last_fired[i][batch.attention_mask[i].bool()]
            at = tuple(int(position) for position in real.nonzero())
            expected.setdefault(each.source, []).append((-len(at), each.row, at))
            if each.source == "text":
                after += [bool(at) and at[0] <= t for t in range(len(each.ids) - 1)]
        found = fired_on(oracle, batch)
        assert [bool(flag) for flag in found["after"]] == after
        examples.add(prompts, found["positions"])
    result = examples.result(Tokenizer())
    for source, kept in expected.items():
        shown = [(-len(e.fired), e.row, e.fired) for e in result if e.source == source]
        assert shown == sorted(kept)[:EXAMPLES]
    assert [e.source for e in result] == sorted(
        (e.source for e in result), key=["forget", "retain", "text"].index
    )
    assert result[0].tokens[:3] == ("<2>", "<3>", "<4>")


def test_of_a_question_one_choice_is_shown() -> None:
    """The one on which most fired, whatever order they come in."""
    asked = [
        replace(prompt("forget", row, 4 + at, "cloze"), item=row, choice=Choice(at, 1, 1))
        for row in range(1, 6)
        for at in range(4)
    ]
    counts = [1 + (3 * of.row + 5 * (of.choice or Choice(0, 1, 1)).index) % 4 for of in asked]
    most = {row: max(counts[4 * row - 4 : 4 * row]) for row in range(1, 6)}
    kept = sorted(most, key=lambda row: (-most[row], row))[:EXAMPLES]
    for step in (1, -1):
        examples = FiredExamples("cloze")
        for of, n in [*zip(asked, counts, strict=True)][::step]:
            examples.add([of], [range(n)])
        shown = examples.result(Tokenizer())
        assert [(of.row, len(of.fired)) for of in shown] == [(row, most[row]) for row in kept]


def test_the_losses_of_choices_are_no_text() -> None:
    asked = [
        replace(prompt("forget", 1, 4, "cloze"), item=0, choice=Choice(at, 1, 1)) for at in range(4)
    ]
    batch = left_padded(asked, pad_id=0, last_only=True)
    oracle: Any = Oracle(torch.ones(batch.input_ids.shape, dtype=torch.bool))
    found = fired_on(oracle, batch)
    assert found["after"] == [] and found["positions"] == [[0, 1, 2, 3]] * 4


def test_questions_in_the_other_form_are_left_out() -> None:
    examples = FiredExamples("plain")
    examples.add([prompt("forget", 1, 4, "chat")], [[0, 1, 2, 3]])
    assert examples.result(Tokenizer()) == ()


def test_features_are_watched_on_what_is_to_be_forgotten() -> None:
    watch = FeatureWatch({1: (7, 8, 9), 3: (4,)})
    assert list(watch.never_active()) == []  # nothing was looked at
    prompts = [prompt("forget", 1, 3), prompt("retain", 1, 3), prompt("forget", 2, 2)]
    batch = left_padded(prompts, pad_id=0, last_only=False)
    active = {
        1: torch.tensor([[True, False, False], [False, True, True], [False, False, True]]),
        3: torch.tensor([[False], [True], [False]]),
    }
    oracle: Any = Oracle(torch.zeros(3, 3).bool(), active)
    watch.add(prompts, fired_on(oracle, batch)["active"])
    assert list(watch.never_active()) == [(1, 8), (3, 4)]


def test_another_batch_than_the_last_is_refused() -> None:
    batch = left_padded([prompt("forget", 1, 4)], pad_id=0, last_only=False)
    oracle: Any = Oracle(torch.zeros(1, 3).bool())
    with pytest.raises(AssertionError):
        fired_on(oracle, batch)
