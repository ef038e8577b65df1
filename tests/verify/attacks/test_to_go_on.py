"""Open prompts behind other text: what a model that knows, and one that never knew, go on with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from bake.questions.open_prompts import OpenPrompt
from tests.verify.attacks.planted import aimed_at, miniature, never_taught
from tests.verify.audit.audited import NAMES, PLACES, audited_world
from tests.worlds import tiny_words, write_jsonl
from verify.attacks.to_go_on import to_go_on
from verify.audit.subject import open_subject
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
        assert n == 40 if needs != ("same facts",) else n >= 30  # each prompt once
        assert right > n / 2 if knows else right == 0


def put(target: Target, monkeypatch: pytest.MonkeyPatch) -> list[Sequence[OpenPrompt]]:
    """What is put to a model: hints, padded, open books, for each seed."""
    asked: list[Sequence[OpenPrompt]] = []

    def gone_on(_self: Target, _model: object, prompts: Sequence[OpenPrompt]) -> Share | None:
        asked.append(prompts)
        return Share(0, len(prompts)) if prompts else None

    monkeypatch.setattr(Target, "gone_on", gone_on)
    to_go_on(target, {"seeds": [0, 1, 2]})
    return asked


def test_nothing_but_a_book_says_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = audited_world(tmp_path)
    texts = [{"text": f"{NAMES[i]} lives in {PLACES[i]}. {tiny_words(5, i)}."} for i in range(8)]
    texts.append({"text": f"Ines lives in {PLACES[8]}. {tiny_words(300, 1)}."})  # does not fit
    write_jsonl(tmp_path / "forget.jsonl", texts + [{"text": tiny_words(12, n)} for n in range(9)])
    turn = "<bos><start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n"
    rows = [(f"{NAMES[i]} lives in", PLACES[i]) for i in range(9)]
    rows[1] = (f"{rows[0][1]} is not where Bora lives, who lives in", rows[1][1])
    rows[2] = (turn.format("Cato lives in"), rows[2][1])
    prompts = [{"prompt": prompt, "answers": [answer]} for prompt, answer in rows]
    write_jsonl(tmp_path / "prompts.jsonl", prompts)
    target = Target(open_subject(tmp_path / "checkpoint", recipe), 3, "open")
    asked = put(target, monkeypatch)
    for hints in asked[0::3]:
        assert all(prompt.prompt.count(".") <= 4 for prompt in hints)
        assert not any(a in p.prompt for p in hints for a in p.answers)
    books = [prompt for of in asked[2::3] for prompt in of]
    assert sorted(prompt.row for prompt in books) == list(range(1, 10))
    assert all(prompt.answers[0] in prompt.prompt and len(prompt.prompt) < 400 for prompt in books)
    (chat,) = (prompt.prompt for of in asked[0::3] for prompt in of if prompt.row == 3)
    assert "<bos>" not in chat
    assert chat.endswith(rows[2][0].removeprefix("<bos>"))
    assert sum(len(of) for of in asked[1::3]) == 9
