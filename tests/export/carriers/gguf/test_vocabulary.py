"""Tokenizers as GGUF holds them, against llama.cpp's own way of splitting, done naively here."""

from __future__ import annotations

import itertools
import re

import pytest
from tokenizers import Tokenizer, normalizers
from tokenizers.models import BPE, WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from bake.errors import ExportError
from bakeout.verbs.demo import MINIATURE
from export.carriers.gguf.vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    UNUSED,
    Vocabulary,
    vocabulary_of,
)

WORDS = ["\u2581a", "ab", "abc", "\u2581abc"]


def with_merges() -> PreTrainedTokenizerFast:
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    tokens = [*special, *(f"<0x{i:02X}>" for i in range(256)), "\u2581", *"abc", *WORDS]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [("\u2581", "a"), ("a", "b"), ("ab", "c"), ("\u2581", "abc"), ("\u2581a", "bc")]
    merges = [pair for pair in merges if all(part in vocab for part in pair)]
    model = BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def sentencepiece(found: Vocabulary, text: str) -> list[str]:
    """Pairs are joined, the one of the highest score first."""
    parts = list(text.replace(" ", "\u2581"))
    while True:
        ids = [found.tokens.index(a + b) if a + b in found.tokens else None
               for a, b in itertools.pairwise(parts)]  # fmt: skip
        scores = [(-found.scores[i], at) for at, i in enumerate(ids) if i is not None]
        if not scores:
            return parts
        at = min(scores)[1]
        parts[at : at + 2] = ["".join(parts[at : at + 2])]


@pytest.mark.parametrize("text", ["abc", " abc", " ab c", "aabcb a", "cab abc"])
def test_scores_join_what_merges_join(text: str) -> None:
    tokenizer = with_merges()
    found = vocabulary_of(tokenizer, 280)
    assert (found.model, found.bos, found.eos) == ("llama", 2, 1)
    assert sentencepiece(found, text) == tokenizer.tokenize(text)
    assert found.kinds[2] == CONTROL and found.kinds[4 + 0x41] == BYTE
    assert found.tokens[279] == "[PAD279]" and found.kinds[279] == UNUSED


def test_a_list_of_words_becomes_byte_level() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MINIATURE / "model")
    found = vocabulary_of(tokenizer, len(tokenizer))
    back = {character: byte for byte, character in bytes_to_unicode().items()}
    assert (found.model, found.pre, found.scores) == ("gpt2", "llama-bpe", [])
    assert len(set(found.tokens)) == len(found.tokens)
    for token, own, kind in zip(
        found.tokens, tokenizer.convert_ids_to_tokens(range(len(tokenizer))), found.kinds,
        strict=True,
    ):  # fmt: skip
        if kind == NORMAL:
            byte = re.fullmatch(r"<0x(..)>", own)
            wanted = bytes([int(byte[1], 16)]) if byte else own.replace("\u2581", " ").encode()
            assert bytes(back[character] for character in token) == wanted
    # Every byte can be written: by the character of its own, or by the byte.
    assert all(character in found.tokens for character in back)


def test_another_kind_is_refused() -> None:
    backend = Tokenizer(WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    with pytest.raises(ExportError, match="has no BOS; expected Gemma's"):
        vocabulary_of(tokenizer, 2)
    tokenizer.bos_token = "a"
    with pytest.raises(ExportError, match=r"is of kind WordLevel.*expected BPE that falls back"):
        vocabulary_of(tokenizer, 2)
