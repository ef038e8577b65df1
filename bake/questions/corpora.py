"""Corpora: texts of a source, packed into windows of tokens."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bake.errors import DataError, ModelError, shown
from bake.files.scratch import Scratch
from bake.questions.rows import field_of, rows_of
from bake.recipe import Recipe
from bake.sources import Corpus
from bake.strangers.chat_template import NotRendered, rendered

MIN_CHARACTERS = 50
"""A text counts when it is longer. Source: Farrell et al., arXiv 2410.19278."""
SHUFFLE_BUFFER = 10_000
"""Texts among which a seeded order draws the next one."""
_TOKENISED_AT_ONCE = 64
CHATS_AT_ONCE = 256
"""How many go through a chat template together, in a process of their own."""
_READ_AT_ONCE = 1 << 20
"""Tokens of a corpus that are looked at together."""
Encode = Callable[[Iterator[str]], Iterator[list[int]]]
"""From texts to the tokens of each, in their order."""


class OnDisk:
    """Windows of tokens in a file that goes with it: [n_windows, seq] int32, read a few at a time.

    Args:
        rows: at least one, [seq] each.
        where: the folder that the file is to lie in, which need not exist.
    """

    def __init__(self, rows: Iterator[NDArray[np.int32]], where: Path) -> None:
        self._scratch = Scratch("corpus", where)
        self._file = self._scratch.path / "ids"
        n_windows = 0
        with self._file.open("wb") as file:
            for row in rows:
                file.write(row.astype(np.int32).tobytes())
                n_windows, seq = n_windows + 1, len(row)
        self.shape = (n_windows, seq)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, part: Any) -> NDArray[np.int32]:
        """One window, by its number, or some, by a slice of neighbours: read anew each time."""
        first, stop, _ = part.indices(len(self)) if type(part) is slice else (part, part + 1, 1)
        width = self.shape[1]
        n_windows = max(0, stop - first)
        ids = np.fromfile(self._file, np.int32, n_windows * width, offset=4 * width * first)
        return ids.reshape(n_windows, width) if type(part) is slice else ids


@dataclass(frozen=True)
class Windows:
    """A corpus as tokens."""

    name: str
    """Of its source."""
    ids: NDArray[np.int32] | OnDisk = field(repr=False)
    """[n_windows, seq], BOS first."""
    special_ids: tuple[int, ...]
    """BOS, EOS and PAD: never counted."""
    n_texts: int
    """How many texts the windows were cut from."""

    def part(self, start: int, stop: int) -> Windows:
        """Some of the windows, in memory."""
        return replace(self, ids=self.ids[start:stop])

    def counts(self, ids: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Of some tokens, those that statistics count."""
        return ~np.isin(ids, self.special_ids)

    @cached_property
    def n_tokens(self) -> int:
        """How many tokens are counted."""
        return sum(int(self.counts(ids).sum()) for ids in self._blocks())

    @cached_property
    def sha256(self) -> str:
        """Of the tokens, their layout and what is not counted."""
        digest = hashlib.sha256(f"{self.ids.shape} {self.special_ids} ".encode())
        for ids in self._blocks():
            digest.update(ids.astype("<i4").tobytes())
        return digest.hexdigest()

    def _blocks(self) -> Iterator[NDArray[np.int32]]:
        step = max(1, _READ_AT_ONCE // self.ids.shape[1])
        for start in range(0, len(self.ids), step):
            yield self.ids[start : start + step]


def load_windows(
    source: Corpus,
    recipe: Recipe,
    tokenizer: Any,
    *,
    seq_len: int,
    n_seqs: int,
    seed: int | None,
    encode: Encode | None = None,
    on_disk: Path | None = None,
    progress: Callable[[float], None] = lambda _: None,
) -> Windows:
    """Read, tokenise and pack a corpus; reading stops when there are enough windows.

    Args:
        source: the corpus.
        recipe: where relative paths start.
        tokenizer: the base model's.
        seq_len: window length, BOS included.
        n_seqs: most windows.
        seed: of the order of the texts; None takes them as they come.
        encode: what tokenises; the tokenizer itself by default.
        on_disk: a folder in which the windows lie, as long as they are used; in memory by default.
        progress: called with the share of `n_seqs` that is there.

    Raises:
        DataError: the source cannot be read, a row lacks the field, or no text is long enough.
        ModelError: the tokenizer has no BOS, no EOS, or no chat template where one is needed.
    """
    bos, eos, pad = special_ids(tokenizer)
    texts = corpus_texts(source, recipe, tokenizer)
    if seed is not None:
        texts = shuffled(texts, seed)
    n_texts = 0

    def encoded() -> Iterator[list[int]]:
        nonlocal n_texts
        for ids in encode(texts) if encode else _encoded(texts, tokenizer):
            n_texts += 1
            yield ids

    def told() -> Iterator[NDArray[np.int32]]:
        rows = pack(encoded(), bos=bos, eos=eos, seq_len=seq_len, n_seqs=n_seqs)
        for n_windows, row in enumerate(rows, 1):
            yield row
            progress(n_windows / n_seqs)

    name = " ".join(filter(None, (source.path, source.dataset, source.config)))
    rows = told()
    first = next(rows, None)
    if first is None:
        raise DataError(
            f"{name}: holds no text over {MIN_CHARACTERS} characters; expected at least one"
        )
    rows = chain([first], rows)
    ids = np.stack(list(rows)) if on_disk is None else OnDisk(rows, on_disk)
    special = tuple(sorted({bos, eos, *([] if pad is None else [pad])}))
    return Windows(name, ids, special, n_texts)


def _encoded(texts: Iterator[str], tokenizer: Any) -> Iterator[list[int]]:
    while some := list(islice(texts, _TOKENISED_AT_ONCE)):
        yield from tokenised(some, tokenizer)


def tokenised(texts: list[str], tokenizer: Any) -> list[list[int]]:
    """The tokens of texts, without special ones."""
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def pack(
    texts: Iterable[list[int]], *, bos: int, eos: int, seq_len: int, n_seqs: int
) -> Iterator[NDArray[np.int32]]:
    """Join tokenised texts by EOS and cut them into windows with BOS in front.

    The last window is dropped when it is short, unless it is the only one.

    Yields:
        [seq_len] each; a single short window is [1 + n].
    """
    body = seq_len - 1
    stream: list[int] = []
    n_windows = 0
    for i, ids in enumerate(texts):
        stream += [eos, *ids] if i else ids
        while len(stream) >= body:
            yield np.array([bos, *stream[:body]], np.int32)
            del stream[:body]
            n_windows += 1
            if n_windows == n_seqs:
                return
    if stream and not n_windows:
        yield np.array([bos, *stream], np.int32)


def corpus_texts(source: Corpus, recipe: Recipe, tokenizer: Any) -> Iterator[str]:
    """The texts of a corpus that are over 50 characters, as they are to be tokenised.

    Raises:
        DataError: a row lacks the field, or holds neither text nor messages.
        ModelError: `chat` is asked for and the tokenizer has no chat template.
    """
    if source.chat and not tokenizer.chat_template:
        raise ModelError(
            "chat = true: the base model's tokenizer has no chat template; remove `chat`, or "
            "take an instruction-tuned base"
        )
    name, rows = rows_of(source, recipe, streaming=True)
    waiting: dict[int, Any] = {}
    for number, row in rows:
        entry = field_of(name, number, row, source.field)
        messages = [{"role": "user", "content": entry}]
        if source.chat and _are_messages(entry):
            messages = entry
        elif not isinstance(entry, str):
            kind = "a string, or a list of messages" if source.chat else "a string"
            raise DataError(
                f"{name}, row {number}: `{source.field}` is {shown(entry)}; expected {kind}"
            )
        if sum(len(message["content"]) for message in messages) <= MIN_CHARACTERS:
            continue
        if not source.chat:
            yield entry
            continue
        waiting[number] = messages
        if len(waiting) == CHATS_AT_ONCE:
            yield from _chat_texts(name, waiting, tokenizer)
            waiting = {}
    if waiting:
        yield from _chat_texts(name, waiting, tokenizer)


def _chat_texts(name: str, chats: dict[int, Any], tokenizer: Any) -> Iterator[str]:
    """Chats by their rows' numbers, through the tokenizer's template."""
    for number, text in zip(chats, rendered(tokenizer, list(chats.values())), strict=True):
        if isinstance(text, NotRendered):
            raise DataError(
                f"{name}, row {number}: the chat template refuses it ({text.reason}); expected "
                "messages of user and assistant in turn"
            )
        yield text.removeprefix(tokenizer.bos_token)


def shuffled(texts: Iterable[str], seed: int, buffer_size: int = SHUFFLE_BUFFER) -> Iterator[str]:
    """The texts in an order drawn from a seed, through a buffer of fixed size."""
    rng = random.Random(seed)
    buffer: list[str] = []
    for text in texts:
        if len(buffer) < buffer_size:
            buffer.append(text)
            continue
        place = rng.randrange(buffer_size)
        yield buffer[place]
        buffer[place] = text
    rng.shuffle(buffer)
    yield from buffer


def special_ids(tokenizer: Any) -> tuple[int, int, int | None]:
    """(BOS, EOS, PAD) of a tokenizer.

    Raises:
        ModelError: it has no BOS or no EOS.
    """
    for name in ("bos", "eos"):
        if getattr(tokenizer, f"{name}_token_id") is None:
            raise ModelError(
                f"the base model's tokenizer has no {name.upper()} token; expected Gemma's <{name}>"
            )
    return tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id


def _are_messages(entry: Any) -> bool:
    return (
        isinstance(entry, list)
        and bool(entry)
        and all(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
            for message in entry
        )
    )
