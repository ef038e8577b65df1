"""What a model is asked, and how its answers are counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.verify.audit.audited import audited, audited_world
from verify.audit.attempts import Scores, keeps_utility
from verify.audit.target import Target
from verify.report.measures import Share


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    folder = tmp_path_factory.mktemp("target")
    audited_world(folder)
    return Target(audited(folder), 3)


def alone(target: Target, model: Any, text: str) -> torch.Tensor:
    """Logits after a text, with nothing beside it."""
    ids = [
        target.tokenizer.bos_token_id,
        *target.tokenizer(text, add_special_tokens=False).input_ids,
    ]
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.tensor([ids])).logits[0, -1]
    return found


def test_counts_are_those_of_one_question_after_another(target: Target) -> None:
    model = target.subject.model()
    scores = target.score(model)
    right, sure = 0, 0.0
    letters = [target.tokenizer.convert_tokens_to_ids(f"▁{letter}") for letter in "ABCD"]
    for question in target.questions["forget"]:
        choices = "\n".join(f"{a}. {c}" for a, c in zip("ABCD", question.choices, strict=True))
        text = (
            "The following are multiple choice questions (with answers).\n\n"
            f"{question.question}\n{choices}\nAnswer:"
        )
        said = alone(target, model, text)[letters]
        right += int(said.argmax()) == question.answer
        sure += float(said.softmax(dim=-1)[question.answer])
    assert scores.forget["plain"] == Share(right, 9)
    assert scores.sure == pytest.approx(sure / 9, abs=1e-5)
    assert scores.retain["plain"].n == 6
    assert scores.forget["cloze"].n == 9
    assert scores.open is not None
    assert scores.open.n == 9
    assert scores.generic is None


def test_held_facts_alone_are_asked(target: Target) -> None:
    model = target.subject.model()
    parts = [target.score(model, target.held(seed)) for seed in range(3)]
    whole = target.score(model)
    for form in ("plain", "cloze"):
        assert sum(of.forget[form].right for of in parts) == whole.forget[form].right
        assert sum(of.forget[form].n for of in parts) == 9
    assert sum(of.open.right for of in parts if of.open) == (whole.open.right if whole.open else 0)
    brief = target.score(model, target.held(0), brief=True)
    assert brief == Scores({"plain": parts[0].forget["plain"]}, parts[0].retain, sure=parts[0].sure)
    told = Target(target.subject, 3, "open")
    whole = told.score(model, told.held(0))
    assert whole.open is not None
    assert whole.open.n == 3
    assert told.score(model, told.held(0), brief=True) == Scores(open=whole.open)


def test_a_model_is_of_use_within_a_tenth() -> None:
    before = Scores(retain={"chat": Share(100, 100)}, generic=Share(50, 50))
    assert keeps_utility(Scores(retain={"chat": Share(90, 100)}), before, "chat")
    assert not keeps_utility(Scores(retain={"chat": Share(89, 100)}), before, "chat")
    assert keeps_utility(Scores(), before, "chat")  # its weights were left alone
    ruined = Scores(retain={"chat": Share(0, 100)}, generic=Share(45, 50))
    assert keeps_utility(ruined, before, "open")  # which is told by prompts
    assert not keeps_utility(Scores(generic=Share(44, 50)), before, "open")
