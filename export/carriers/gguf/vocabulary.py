"""A tokenizer as GGUF files hold it.

Gemma's is a list of merges, after which llama.cpp's SentencePiece kind takes the pair first whose
token has the highest score: minus its merge's rank. A tokenizer without merges takes whole words
(`ignore_merges`), as llama.cpp's byte-level kind does with Llama 3's way of splitting; there, bytes
are written as GPT-2 writes them.

Source: llama.cpp, src/llama-vocab.cpp; GPT-2's bytes, Radford et al. 2019.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from bake.errors import ExportError
from bake.families import END_OF_TURN

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of token, by llama.cpp's numbers."""
SPACE = "\u2581"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_LEAST = -1e6
"""Score of what no merge makes: below every rank of a vocabulary."""


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of its tokenizer."""

    model: str
    """llama.cpp's name of the kind: llama (SentencePiece) or gpt2 (byte-level)."""
    pre: str
    """How text is split before that."""
    tokens: list[str]
    """By id."""
    kinds: list[int]
    """Of each."""
    scores: list[float]
    """Of each; empty for gpt2."""
    bos: int
    eos: int | None
    unk: int | None
    pad: int | None
    eot: int | None
    """What ends a turn."""
    template: str | None
    """Chat template."""


def vocabulary_of(tokenizer: Any, n_tokens: int) -> Vocabulary:
    """Read a tokenizer.

    Args:
        tokenizer: as transformers loads it, with a `tokenizers` backend.
        n_tokens: rows of the model's embedding.

    Raises:
        ExportError: it is of another kind than Gemma's.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or tokenizer.bos_token_id is None:
        what = "is none of `tokenizers`' own" if backend is None else "has no BOS"
        raise ExportError(
            f"tokenizer.json: {what}; expected Gemma's tokenizer. Take Gemma's own tokenizer files"
        )
    data = json.loads(backend.to_str())
    model = data["model"]
    known = model.get("type") == "BPE" and model.get("byte_fallback") is True
    if not known or not _spaces_are_marked(data.get("normalizer")):
        raise ExportError(
            f"tokenizer.json: is of kind {model.get('type')}, with byte_fallback "
            f"{model.get('byte_fallback')}; expected BPE that falls back to bytes and writes "
            "spaces as U+2581, as Gemma's does. Take Gemma's own tokenizer files"
        )
    tokens = [f"[PAD{i}]" for i in range(n_tokens)]
    kinds = [UNUSED] * n_tokens
    for token, i in model["vocab"].items():
        if i < n_tokens:
            tokens[i], kinds[i] = token, BYTE if _BYTE.fullmatch(token) else NORMAL
    for added in data.get("added_tokens") or ():
        if (i := added["id"]) < n_tokens:
            tokens[i], kinds[i] = added["content"], CONTROL if added["special"] else USER_DEFINED
    ids = {token: i for i, token in enumerate(tokens)}
    ends = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unk": tokenizer.unk_token_id,
        "pad": tokenizer.pad_token_id,
        "eot": ids.get(END_OF_TURN),
        "template": _template(tokenizer),
    }
    if (unk := ends["unk"]) is not None and unk < n_tokens:
        kinds[unk] = UNKNOWN
    if model["merges"]:
        scores = [_LEAST] * n_tokens
        for rank, pair in enumerate(model["merges"]):
            made = ids.get("".join(pair.split(" ", 1) if isinstance(pair, str) else pair))
            if made is not None and scores[made] == _LEAST:
                scores[made] = -float(rank)
        return Vocabulary("llama", "default", tokens, kinds, scores, **ends)
    named = _as_bytes(tokens, kinds)
    for i, kind in enumerate(kinds):
        if kind == BYTE:  # where text has its character, the byte itself is never written
            kinds[i] = UNUSED if named[i] == tokens[i] else NORMAL
    return Vocabulary("gpt2", "llama-bpe", named, kinds, [], **ends)


def _spaces_are_marked(normalizer: Any) -> bool:
    """Whether a normalizer does nothing but write spaces as U+2581."""
    wanted = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    return normalizer in (wanted, {"type": "Sequence", "normalizers": [wanted]})


def _template(tokenizer: Any) -> str | None:
    found = tokenizer.chat_template
    return found.get("default") if isinstance(found, dict) else found


def _as_bytes(tokens: list[str], kinds: list[int]) -> list[str]:
    """Tokens of the byte-level kind: text as the characters that stand for its bytes."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    characters = bytes_to_unicode()
    text = {
        "".join(characters[byte] for byte in token.replace(SPACE, " ").encode())
        for token, kind in zip(tokens, kinds, strict=True)
        if kind == NORMAL
    }
    named = []
    for token, kind in zip(tokens, kinds, strict=True):
        byte = _BYTE.fullmatch(token)
        if kind == BYTE and byte is not None:
            character = characters[int(byte[1], 16)]
            named.append(token if character in text else character)
        elif kind == NORMAL:
            named.append("".join(characters[b] for b in token.replace(SPACE, " ").encode()))
        else:
            named.append(token)
    return named
