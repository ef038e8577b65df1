"""Open prompts behind other text: what a model that knows, and one that never knew, go on with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from bake.questions.open_prompts import OpenPrompt
from tests.verify.attacks.planted import aimed_at, miniature, never_taught
from verify.attacks.to_go_on import to_go_on
from verify.audit.target import Target
from verify.report.measures import Share


@pytest.mark.parametrize("knows", [True, False])
def test_who_knows_goes_on_and_who_never_knew_does_not(tmp_path: Path, knows: bool) -> None:
    subject = aimed_at(miniature() if knows else never_taught(), tmp_path / "model").subject
    attempts = to_go_on(Target(subject, 3, "open"), {"seeds": [0, 1, 2]})
    ways = ("input: hints", "input: padding", "input: open book")
    assert [a.attack for a in attempts] == [*ways] * 3
    for way, needs in zip(ways, (("other facts",), (), ("same facts",)), strict=True):
        of = [attempt for attempt in attempts if attempt.attack == way]
        assert [a.seed for a in of] == [0, 1, 2]
        assert all(a.needs == needs and not a.scores.forget and not a.scores.retain for a in of)
        shares = [a.scores.open for a in of if a.scores.open is not None]
        right, n = sum(share.right for share in shares), sum(share.n for share in shares)
        assert n == 40  # each prompt once
        assert right > n / 2 if knows else right == 0


def test_hints_give_no_held_fact_away_and_a_book_states_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Target(aimed_at(miniature(), tmp_path / "model").subject, 3, "open")
    asked: list[Sequence[OpenPrompt]] = []

    def gone_on(_self: Target, _model: object, prompts: Sequence[OpenPrompt]) -> Share:
        asked.append(prompts)
        return Share(0, len(prompts))

    monkeypatch.setattr(Target, "gone_on", gone_on)
    to_go_on(target, {"seeds": [0]})
    hints, padded, books = asked
    own = {prompt.row: prompt.prompt for prompt in target.held(0).prompts}
    for prompt in (*hints, *padded):
        before = prompt.prompt.removesuffix(own[prompt.row])
        assert before.endswith("\n\n") and len(before) > 20
        assert not any(answer in before for answer in prompt.answers)
    assert all(any(answer in p.prompt for answer in p.answers) for p in books)
