"""The miniature's tokenizer: one token per known word, characters and bytes for all else.

It behaves as Gemma's does: spaces become U+2581 and stand before the word, `<bos>` is added by
`add_special_tokens`, and no text is without tokens.
"""

import re
from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
PAD, EOS, BOS, UNK, START_OF_TURN, END_OF_TURN = range(len(SPECIAL_TOKENS))

SPACE = "\u2581"
_SPACE = f"(?: |{SPACE})?"
_PIECE = (
    rf"{_SPACE}[A-Za-z]+|{_SPACE}[0-9]|{_SPACE}[!-/:-@\[-`{{-~]|{SPACE}|"
    rf"(?:(?!{SPACE})[^\x00-\x7f])+|\s|."
)
"""What one token may be: a word, a digit or a mark, each with the space before it; anything else.

Runtimes match it before spaces are replaced or after, and on characters or on bytes (C++'s regular
expressions, which know no classes of Unicode); it says the same in all of them.
"""
_MARKUP = re.compile("|".join(re.escape(token) for token in SPECIAL_TOKENS))

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}"
    "{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def pieces(text: str) -> list[str]:
    """The words and marks of `text` as the tokenizer splits them, markup left out."""
    parts = _MARKUP.split(text)
    return [piece for part in parts for piece in re.findall(_PIECE, part.replace(" ", SPACE))]


def _vocabulary(texts: Iterable[str]) -> dict[str, int]:
    tokens = list(SPECIAL_TOKENS)
    tokens += [f"<0x{byte:02X}>" for byte in range(256)]
    tokens += ["\n", SPACE, *(chr(code) for code in range(0x21, 0x7F))]
    tokens += [f"{SPACE}{letter}" for letter in "ABCD"]
    words = {piece for text in texts for piece in pieces(text)}
    tokens += sorted(words - set(tokens))
    return {token: index for index, token in enumerate(tokens)}


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer that knows every word of `texts` as one token."""
    # ignore_merges takes a piece whole where the vocabulary has it; there are no merges at all.
    model = BPE(
        vocab=_vocabulary(texts),
        merges=[],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
        ignore_merges=True,
    )
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Replace(" ", SPACE)
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECE), behavior="isolated")
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.post_processor = TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", BOS)]
    )
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        extra_special_tokens=["<start_of_turn>", "<end_of_turn>"],
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
