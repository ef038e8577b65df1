"""Packing: texts become windows, by the rule, in an order that a seed decides."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from bake.errors import DataError, ModelError
from bake.questions.corpora import Windows, corpus_texts, load_windows, pack, shuffled
from bake.recipe import Recipe
from bake.sources import Corpus
from tests.worlds import tiny_tokenizer, tiny_words, write_jsonl

BOS, EOS = 2, 1
LONG = [tiny_words(30 + 9 * i, i) for i in range(6)]


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    tiny_tokenizer(tmp_path / "base")
    clamp = {"sae": {"path": "sae"}, "method": "zero", "features": [0]}
    data = {"schema": 1, "base": {"model": "base"}, "clamp": [clamp]}
    return Recipe.parse(data, name="test", folder=tmp_path)


@pytest.fixture
def tokenizer(recipe: Recipe) -> Any:
    return AutoTokenizer.from_pretrained(recipe.local("base"))


def load(recipe: Recipe, tokenizer: Any, *rows: Any, **options: Any) -> Windows:
    write_jsonl(recipe.local("c.jsonl"), rows)
    settings = {"seq_len": 16, "n_seqs": 1000, "seed": None} | options
    source = Corpus(path="c.jsonl", chat=settings.pop("chat", False))
    return load_windows(source, recipe, tokenizer, **settings)


@given(st.lists(st.lists(st.integers(3, 90), min_size=1, max_size=40), min_size=1, max_size=8))
def test_pack_joins_by_eos_and_drops_the_last_short_window(texts: list[list[int]]) -> None:
    stream = texts[0] + [token for text in texts[1:] for token in (EOS, *text)]
    rows = list(pack(texts, bos=BOS, eos=EOS, seq_len=8, n_seqs=3))
    if len(stream) < 7:
        assert [list(row) for row in rows] == [[BOS, *stream]]
        return
    expected = [[BOS, *stream[i : i + 7]] for i in range(0, len(stream) - 6, 7)][:3]
    assert [list(row) for row in rows] == expected


def test_windows_of_a_file(recipe: Recipe, tokenizer: Any) -> None:
    short = {"text": "x" * 50}
    found = load(recipe, tokenizer, short, *({"text": text} for text in LONG))
    stream: list[int] = []
    for i, text in enumerate(LONG):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        stream += [EOS, *ids] if i else ids
    n = len(stream) // 15
    assert found.ids[:, 0].tolist() == [BOS] * n
    assert found.ids[:, 1:].flatten().tolist() == stream[: 15 * n]
    assert found.n_tokens == sum(token not in (0, BOS, EOS) for token in stream[: 15 * n])
    assert found.n_texts == 6 and found.special_ids == (0, 1, 2)
    assert len(load(recipe, tokenizer, {"text": LONG[0]}, n_seqs=2).ids) == 2


def test_a_seed_decides_the_order(recipe: Recipe, tokenizer: Any) -> None:
    rows = [{"text": text} for text in LONG]
    hashes = [load(recipe, tokenizer, *rows, seed=seed).sha256 for seed in (None, 1, 1, 2)]
    assert hashes[1] == hashes[2] and len(set(hashes)) == 3
    assert sorted(shuffled(LONG, 3, buffer_size=2)) == sorted(LONG)
    assert list(islice(shuffled(map(str, range(10**9)), 3, buffer_size=4), 3))  # streams


def test_chat_goes_through_the_template(recipe: Recipe, tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}|{% endfor %}"
    )
    messages = [{"role": "user", "content": LONG[0]}, {"role": "assistant", "content": "yes"}]
    rows = [{"text": LONG[1]}, {"text": messages}, {"text": "short"}]
    write_jsonl(recipe.local("c.jsonl"), rows)
    texts = list(corpus_texts(Corpus(path="c.jsonl", chat=True), recipe, tokenizer))
    assert texts == [f"user: {LONG[1]}|", f"user: {LONG[0]}|assistant: yes|"]
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="has no chat template"):
        load(recipe, tokenizer, {"text": LONG[0]}, chat=True)


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([], r"c\.jsonl: holds no text over 50 characters"),
        ([{"text": "x" * 50}], r"c\.jsonl: holds no text over 50 characters"),
        ([{"body": LONG[0]}], r"c\.jsonl, row 1: has no `text`; it has `body`"),
        ([{"text": LONG[0]}, {"text": 3}], r"c\.jsonl, row 2: `text` is 3; expected a string"),
    ],
)
def test_bad_corpora(recipe: Recipe, tokenizer: Any, rows: list[Any], match: str) -> None:
    with pytest.raises(DataError, match=match):
        load(recipe, tokenizer, *rows)


def test_a_tokenizer_needs_its_markers(recipe: Recipe, tokenizer: Any) -> None:
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="has no EOS token"):
        load(recipe, tokenizer, {"text": LONG[0]})


def test_counted_is_everything_but_the_markers() -> None:
    windows = Windows("w", np.array([[2, 5, 1, 6, 0, 2]], np.int32), (0, 1, 2), 1)
    assert windows.counts(windows.ids).tolist() == [[False, True, False, True, False, False]]
