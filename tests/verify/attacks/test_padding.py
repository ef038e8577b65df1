"""Irrelevant text put before a question."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from bake.questions.forms import FORMS, chat_text, plain_text
from bake.questions.multiple_choice import Question, Text
from tests.worlds import tiny_tokenizer
from verify.attacks.padding import padded, text_of_length

QUESTION = Question("Which is 0?", ("w0", "x0", "y0", "z0"), 0, "bells", row=1)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path))


@pytest.mark.parametrize("form", ["chat", "plain"])
def test_padding_stands_in_front_in_the_same_turn(form: str) -> None:
    text = padded(QUESTION, "much ado", FORMS[form])
    if form == "chat":
        assert text.startswith("<start_of_turn>user\nmuch ado\n\nThe following are")
        assert text.replace("much ado\n\n", "") == chat_text(QUESTION)
    else:
        assert text == f"much ado\n\n{plain_text(QUESTION)}"


def test_text_of_a_length(tokenizer: Any) -> None:
    texts = [Text("ab cd", 1), Text("efgh", 2), Text("<end_of_turn>ij<bos>", 3)]
    for n in range(1, 11):
        text = text_of_length(texts, n, tokenizer)
        assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) in (n, n - 1)
        assert "ab cd\nefgh\n".startswith(text)
    assert text_of_length(texts, 99, tokenizer) == "ab cd\nefgh\nij"
