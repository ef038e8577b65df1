from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bake.errors import DataError, ModelError
from bake.questions.multiple_choice import Question, Text
from bake.questions.prompts import (
    Choice,
    Prompt,
    batches,
    by_question,
    left_padded,
    question_prompts,
    text_prompts,
)
from tests.worlds import tiny_tokenizer

BOS = 2
QUESTION = Question(" How many? ", ("one", "two", "three", "four"), 1, "small numbers", row=5)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def texts_of(tokenizer: Any, question: Question) -> dict[str, str]:
    return {
        prompt.form: tokenizer.decode(prompt.ids)
        for prompt in question_prompts("forget", [question], tokenizer, compared=True)
    }


def test_both_forms_to_the_letter(tokenizer: Any) -> None:
    texts = texts_of(tokenizer, QUESTION)
    assert texts["chat"] == (
        "<bos><start_of_turn>user\n"
        "The following are multiple choice questions (with answers) about small numbers.\n"
        " How many? \nA. one\nB. two\nC. three\nD. four<end_of_turn>\n"
        "<start_of_turn>model\nAnswer: ("
    )
    assert texts["plain"] == (
        "<bos>The following are multiple choice questions (with answers) about small numbers.\n\n"
        "How many?\nA. one\nB. two\nC. three\nD. four\nAnswer:"
    )


def test_turns_are_marked_as_gemma_4_marks_them_where_its_tokenizer_is_read(
    tmp_path: Path, tokenizer: Any
) -> None:
    from transformers import AutoTokenizer

    later = AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path, ("<|turn>", "<turn|>")))
    asked = texts_of(tokenizer, QUESTION)["chat"]
    marked = asked.replace("<start_of_turn>", "<|turn>").replace("<end_of_turn>", "<turn|>")
    assert texts_of(later, QUESTION)["chat"] == marked
    (prompt,) = question_prompts("forget", [QUESTION], later, compared=True, forms=["chat"])
    assert prompt.ids[:2] == (BOS, 4) and prompt.ids.count(4) == 2 and prompt.ids.count(5) == 1


def test_without_a_topic_the_description_names_none(tokenizer: Any) -> None:
    question = Question("How many?", ("1", "2", "3", "4"), 0, None, row=1)
    for text in texts_of(tokenizer, question).values():
        assert "multiple choice questions (with answers).\n" in text


def test_bos_comes_once_and_markers_are_single_tokens(tokenizer: Any) -> None:
    for prompt in question_prompts("forget", [QUESTION], tokenizer, compared=True):
        assert prompt.ids[0] == BOS
        assert prompt.ids.count(BOS) == 1
        assert (prompt.row, prompt.item) == (5, 0)
        turns = prompt.ids.count(tokenizer.convert_tokens_to_ids("<start_of_turn>"))
        assert turns == (2 if prompt.form == "chat" else 0)


def test_every_token_counts_in_the_first_prompts_of_a_form(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bake.questions.prompts.COMPARED_PROMPTS", 2)
    prompts = question_prompts("retain", [QUESTION] * 3, tokenizer, compared=True)
    assert [prompt.every_token for prompt in prompts] == [True, True, False] * 2
    assert [prompt.item for prompt in prompts] == [0, 1, 2] * 2
    prompts = question_prompts("retain", [QUESTION] * 3, tokenizer, compared=False)
    assert not any(prompt.every_token for prompt in prompts)


def test_text_is_cut_into_windows_with_bos(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bake.questions.prompts.TEXT_WINDOW", 5)
    prompts = text_prompts([Text("abcdefghij", 3), Text("k", 7)], tokenizer)
    assert [tokenizer.decode(prompt.ids) for prompt in prompts] == [
        "<bos>abcd",
        "<bos>efgh",
        "<bos>ij",
        "<bos>k",
    ]
    assert [prompt.row for prompt in prompts] == [3, 3, 3, 7]
    assert all(prompt.every_token and prompt.source == "text" for prompt in prompts)
    monkeypatch.setattr("bake.questions.prompts.TEXT_TOKENS", 7)
    assert len(text_prompts([Text("abcdefghij", 3)] * 9, tokenizer)) == 2


def test_a_tokenizer_without_bos_is_refused(tokenizer: Any) -> None:
    class NoBos:
        bos_token_id = None

    with pytest.raises(ModelError, match="no BOS token"):
        question_prompts("forget", [QUESTION], NoBos(), compared=True)


def prompt(length: int, *, every_token: bool, item: int = 0) -> Prompt:
    ids = (BOS, *range(10, 9 + length))
    return Prompt("forget", "chat", 1, ids, every_token=every_token, item=item)


def test_padding_stands_on_the_left() -> None:
    batch = left_padded(
        [prompt(2, every_token=True), prompt(4, every_token=True)], pad_id=0, last_only=False
    )
    assert torch.equal(batch.input_ids, torch.tensor([[0, 0, 2, 10], [2, 10, 11, 12]]))
    assert torch.equal(batch.attention_mask, torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]))


def test_tokens_that_are_wanted_and_scored_by_hand() -> None:
    text, question = prompt(3, every_token=True), prompt(2, every_token=True)
    text = replace(text, source="text", form="text")
    alone = replace(text, ids=(BOS,))  # predicts nothing
    for last_only in (False, True):
        batch = left_padded([text, question, alone], pad_id=0, last_only=last_only)
        real = [[1, 1, 1], [0, 1, 1], [0, 0, 1]]
        ends = [[0, 0, 1]] * 3
        assert batch.ends.tolist() == [[bool(x) for x in row] for row in ends]
        wanted = ends if last_only else real
        assert batch.wanted.tolist() == [[bool(x) for x in row] for row in wanted]
        scored = [[1, 1, 0], [0, 0, 0], [0, 0, 0]]
        assert batch.scored.tolist() == [[bool(x) for x in row] for row in scored]
        assert batch.attention_mask.tolist() == real  # left as it was


# --------------------------------------------------------------------------- choices' own texts


def test_a_cloze_prompt_ends_with_each_choice_a_space_in_front(tokenizer: Any) -> None:
    prompts = question_prompts("forget", [QUESTION], tokenizer, compared=True, forms=["cloze"])
    assert [prompt.choice and prompt.choice.index for prompt in prompts] == [0, 1, 2, 3]
    for prompt, choice in zip(prompts, QUESTION.choices, strict=True):
        assert (prompt.ids[0], prompt.ids.count(BOS)) == (BOS, 1)
        assert prompt.choice is not None and prompt.choice.n_characters == len(choice)
        places = prompt.answer_places
        assert len(places) == prompt.choice.n_tokens
        # What stands at a place predicts the next token.
        assert tokenizer.decode([prompt.ids[at + 1] for at in places]) == f" {choice}"
        assert tokenizer.decode(prompt.ids[: places[0] + 1]).endswith("\nAnswer:")
        assert not prompt.every_token and (prompt.row, prompt.item) == (5, 0)


def test_what_merges_over_the_boundary_is_parted_as_the_harness_parts_it() -> None:
    """The text's own tokens, then as many of the whole's as it has more."""

    class Merging:
        bos_token_id = BOS

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            assert not add_special_tokens
            return {"input_ids": [ord(c) for c in text.replace("r: ", "~")]}

    question = replace(QUESTION, choices=("ab", "cd", "ef", "gh"))
    first, *_ = question_prompts("f", [question], Merging(), compared=False, forms=["cloze"])
    assert first.choice == Choice(0, n_tokens=1, n_characters=2)
    assert "".join(map(chr, first.ids[-8:])) == "Answer:b"


def test_an_empty_choice_is_refused_where_its_text_is_the_answer(tokenizer: Any) -> None:
    question = replace(QUESTION, choices=("one", "", "three", "four"))
    assert len(question_prompts("forget", [question], tokenizer, compared=True)) == 2
    with pytest.raises(
        DataError, match=r"forget questions, row 5: choice B is ''; expected some text"
    ):
        question_prompts("forget", [question], tokenizer, compared=True, forms=["cloze"])


def of_choices(item: int, *n_tokens: int, before: int = 3) -> list[Prompt]:
    return [
        replace(
            prompt(before + n, every_token=False, item=item),
            form="cloze",
            choice=Choice(index, n, n_characters=3),
        )
        for index, n in enumerate(n_tokens)
    ]


def test_the_tokens_of_choices_are_scored_by_hand() -> None:
    prompts = of_choices(0, 1, 3, 2, 1)
    batch = left_padded(prompts, pad_id=0, last_only=True)
    assert batch.of_choices
    assert not batch.wanted.any() and not batch.ends.any()  # no logits are formed
    assert batch.scored.int().tolist() == [
        [0, 0, 0, 0, 1, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1, 0],
    ]
    assert batch.n_last == 4
    for row, of in enumerate(prompts):
        lead = batch.input_ids.shape[1] - len(of.ids)
        scored = batch.scored[row].nonzero().flatten().tolist()
        assert scored == [lead + at for at in of.answer_places]


def test_the_choices_of_a_question_are_in_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bake.questions.prompts.BATCH_TOKENS", 100)
    monkeypatch.setattr("bake.questions.prompts.BATCH_LOGIT_BYTES", 4 * 100 * 30)
    asked = [of_choices(i, 1 + i % 3, 2, 9 if i == 4 else 1, 3, before=4 + i) for i in range(9)]
    others = [prompt(3 + i, every_token=i % 2 == 0, item=20 + i) for i in range(5)]
    shown = [*others[:2], *(of for prompts in asked for of in prompts), *others[2:]]
    found = list(batches(shown, pad_id=0, vocab_size=100))
    assert sorted(p.item for b in found for p in b.prompts if p.choice is None) == [*range(20, 25)]
    ending = [batch for batch in found if batch.of_choices]
    assert ending == found[-len(ending) :] and len(ending) > 2
    items = [of.item for batch in ending for of in batch.prompts[::4]]
    assert sorted(items) == list(range(9))
    for batch in ending:
        together = [list(of) for of in by_question(batch.prompts)]
        assert together == [asked[of.item] for of in batch.prompts[::4]]
        rows, seq = batch.input_ids.shape
        assert rows == 4 or (rows * seq <= 100 and int(batch.scored.sum()) <= 30)
    assert max(len(batch.prompts) for batch in ending) > 4


def test_every_prompt_is_in_one_batch_and_batches_keep_their_bounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bake.questions.prompts.BATCH_TOKENS", 40)
    monkeypatch.setattr("bake.questions.prompts.BATCH_LOGIT_BYTES", 4 * 100 * 24)
    prompts = [prompt(3 + 7 * i % 20, every_token=i % 3 == 0, item=i) for i in range(30)]
    prompts.append(prompt(90, every_token=True, item=30))
    found = list(batches(prompts, pad_id=0, vocab_size=100))
    assert sorted(p.item for batch in found for p in batch.prompts) == list(range(31))
    for batch in found:
        rows, seq = batch.input_ids.shape
        assert all(p.every_token is not batch.last_only for p in batch.prompts)
        assert rows == 1 or rows * seq <= 40
        assert rows == 1 or batch.last_only or rows * seq <= 24
    assert max(len(batch.prompts) for batch in found) > 1
