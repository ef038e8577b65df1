from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, Gemma2ForCausalLM

from bake.questions.answers import LetterTokens, letter_log_likelihoods, letter_tokens
from bake.questions.forms import FORMS, plain_text
from bake.questions.multiple_choice import Question
from bake.questions.prompts import Prompt, asking
from tests.engines import PlainOnly
from tests.worlds import tiny_base, tiny_tokenizer
from verify.engines.runners import HookedRunner, Reading
from verify.engines.scoring import choices_made, last_logits, token_ids


def test_likelihoods_of_letters() -> None:
    logits = torch.randn(5, 30, generator=torch.Generator().manual_seed(0))
    letters = LetterTokens(
        chat=((10, 20), (11, 21), (12, 22), (23,)), plain=((20,), (21,), (22,), (23,))
    )
    found = letter_log_likelihoods(logits, letters)
    expected = logits.double().softmax(-1).log().numpy()
    np.testing.assert_allclose(found[:, :3, 0], expected[:, 10:13])
    np.testing.assert_allclose(found[..., 1], expected[:, 20:24])
    assert (found[:, 3, 0] == -np.inf).all()


@pytest.mark.parametrize("tree_tokens", [2048, 200])
def test_plain_form_is_one_prompt_after_another(
    tmp_path: Path, tree_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("verify.engines.scoring.TREE_TOKENS", tree_tokens)
    for cost in ("PASS", "PAIR"):  # which cost a tiny model more than a tree saves
        monkeypatch.setattr(f"verify.engines.token_tree.{cost}", 0.0)
    tiny_tokenizer(tiny_base(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    letters = letter_tokens(tokenizer)
    model = Gemma2ForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    questions = [
        Question("which" * (1 + n % 3) + "?", ("w", "x", f"y{n}", "z"), 0, topic, row=n)
        for n, topic in enumerate(["bells", "bells", None, "kites", "bells"])
    ]
    expected = []
    for question in questions:
        text = plain_text(question)
        ids = torch.tensor([[2, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
        with torch.no_grad():
            likelihoods = model(ids).logits[0, -1].double().log_softmax(-1)
        tokens = [tokenizer.convert_tokens_to_ids(f"\u2581{letter}") for letter in "ABCD"]
        expected.append(likelihoods[tokens].tolist())
    runner = HookedRunner("base", model)
    sequences = token_ids([plain_text(question) for question in questions], tokenizer)
    for engine in (runner, PlainOnly(runner)):
        for n in (1, 2, 5):
            logits = last_logits(engine, sequences[:n], tokenizer)
            found = letter_log_likelihoods(logits, letters)[..., 1]
            np.testing.assert_allclose(found, expected[:n], rtol=0, atol=1e-4)
    both = [last_logits(engine, sequences, tokenizer) for engine in (runner, PlainOnly(runner))]
    torch.testing.assert_close(*both, rtol=0, atol=2e-5)


START, OTHER = tuple(range(12)), tuple(range(100, 112))


@pytest.mark.parametrize(
    ("starts", "width", "read"),
    [
        ([()] * 3, 4096, ["batch"]),
        ([START[:2]] * 3, 4096, ["batch"]),
        ([START] * 3, 4096, ["tree"]),
        ([START] * 3, 64, ["batch"]),  # where attention is most of the work
        ([START * 9] * 4 + [OTHER * 9] * 4, 1024, ["tree", "tree"]),
        ([START * 9] * 8, 1024, ["tree"]),
    ],
)
def test_trees_are_read_where_they_save_work(
    starts: list[tuple[int, ...]], width: int, read: list[str]
) -> None:
    done: list[str] = []

    class Watched(HookedRunner):
        def read(self, ids: Any, mask: Any, wanted: Any, scored: Any) -> Reading:
            assert not scored.any()
            assert wanted[:, -1].all() and int(wanted.sum()) == len(ids)
            done.append("batch")
            return Reading(torch.zeros(len(ids), 9), torch.zeros(0))

        def width(self) -> int:
            return width

        def tree_logits(self, tree: Any) -> torch.Tensor:
            done.append("tree")
            return torch.zeros(len(tree.ends), 9)

    class Nine:
        pad_token_id = 0

        def __len__(self) -> int:
            return 9

    sequences = [(*start, 50 + n, *range(20)) for n, start in enumerate(starts)]
    assert last_logits(Watched("base", None), sequences, Nine()).shape == (len(starts), 9)
    assert done == read


def test_choices_of_many_questions_are_made_as_of_one_after_another(tmp_path: Path) -> None:
    tiny_tokenizer(tiny_base(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = Gemma2ForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    questions = [
        Question("which" * (1 + n % 3) + "?", ("w" * (1 + n), "xy", f"y{n} z", "z"), 0, None, row=n)
        for n in range(7)
    ]
    runner, letters = HookedRunner("base", model), letter_tokens(tokenizer)
    made = {}
    for form in FORMS:
        at = Prompt("forget", form, 1, (), every_token=False)
        asked = [asking(FORMS[form].text(q), q, tokenizer, at) for q in questions]
        made[form] = choices_made(runner, asked, letters, tokenizer)
        alone = [choices_made(PlainOnly(runner), [one], letters, tokenizer) for one in asked]
        assert [made[form]] == [[choice for (choice,) in alone]]
        assert choices_made(runner, asked[::-1], letters, tokenizer) == made[form][::-1]
    assert len(set(made["cloze"])) > 1
