"""Feature statistics on a crew: its workers tokenise texts, and count parts of a corpus."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bake.base import BaseModel, find_base
from bake.clamp import SAESite, find_site
from bake.errors import ScaleError
from bake.questions.corpora import Windows, tokenised
from bake.recipe import Recipe
from bake.sae.folding import load_encoder, sha256_of
from bake.scale.crew import Crew, about_here
from bake.scale.parts import Part
from bake.search.cache import model_sha256
from bake.search.statistics import Counter, FeatureSite, count_windows, memory_of
from bake.stock import decoder_layers, load_base, load_tokenizer

TEXTS_AT_ONCE = 512
"""Texts that a worker tokenises together."""
_PROCESS_BYTES = 1 << 30
"""What a worker takes beside model and SAEs, about."""


class FeatureWorker:
    """Counts features in a process of its own, on the device that Ray gives it.

    Args:
        recipe: whose base and SAEs must lie at the same paths on all machines.
        tokenizer: sha256 of the base's.
        dtype: in which the base runs; what the recipe says by default.
    """

    def __init__(self, recipe: Recipe, tokenizer: str, dtype: str | None = None) -> None:
        self._recipe, self._tokenizer_sha256, self._dtype = recipe, tokenizer, dtype
        self._ready: tuple[tuple[int, ...], Any, list[Counter]] | None = None

    def about(self) -> dict[str, str]:
        """The versions that it has."""
        return about_here()

    @cached_property
    def _tokenizer(self) -> Any:
        base = find_base(self._recipe)
        check_same(f"{base.name}'s tokenizer", tokenizer_sha256(base), self._tokenizer_sha256)
        return load_tokenizer(self._recipe)

    def encode(self, texts: list[str]) -> tuple[NDArray[np.int32], list[int]]:
        """(tokens of all texts, how many each has), without special ones.

        Raises:
            ScaleError: the tokenizer is another one here.
        """
        ids = tokenised(texts, self._tokenizer)
        return np.array([i for of in ids for i in of], np.int32), [len(of) for of in ids]

    def count(
        self, which: Mapping[int, str], model: str, windows: Windows, start: int
    ) -> tuple[int, int, dict[str, NDArray[Any]]]:
        """Count a part of a corpus.

        Args:
            which: places of the recipe's tables → sha256 of their SAE's weights.
            model: sha256 of the base.
            windows: the part.
            start: index of its first window in the corpus.

        Returns:
            `start`, where the part ends, and what `count_windows` gives.

        Raises:
            ScaleError: base or SAEs are others here.
            BakeoutError: they cannot be loaded.
        """
        state = count_windows(*self._counters(which, model), windows, start)
        arrays = {name: tensor.numpy() for name, tensor in state.items()}
        return start, start + len(windows.ids), arrays

    def _counters(self, which: Mapping[int, str], model: str) -> tuple[Any, list[Counter]]:
        """(model up to the last hook layer, a counter for each SAE), as they were used last."""
        places = tuple(which)
        if self._ready is None or self._ready[0] != places:
            self._ready = None
            base = find_base(self._recipe)
            sites = [find_site(self._recipe.clamp[i], self._recipe, base) for i in places]
            check_same(base.name, model_sha256(base), model)
            for site, expected in zip(sites, which.values(), strict=True):
                check_same(site.name, sha256_of(site.files), expected)
            device = "cuda" if torch.cuda.is_available() else "cpu"
            loaded = load_base(self._recipe, device, self._dtype)
            del decoder_layers(loaded)[max(site.layer for site in sites) + 1 :]
            encoders = [FeatureSite(site.layer, load_encoder(site.files)) for site in sites]
            self._ready = (places, loaded, [Counter(site, loaded) for site in encoders])
        return self._ready[1], self._ready[2]


def check_same(name: str, here: str, expected: str) -> None:
    """Refuse other files on a worker's machine.

    Raises:
        ScaleError: their sha256 is not the expected one.
    """
    if here != expected:
        raise ScaleError(
            f"{name}: is another one on {socket.gethostname()} than where bakeout was started; "
            "expected the same files on all machines. Copy them there"
        )


def tokenizer_sha256(base: BaseModel) -> str:
    """Of the files that a base's tokenizer is made of."""
    digest = hashlib.sha256()
    for path in sorted(base.folder.glob("*token*")):
        if path.is_file():
            digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def memory_with_model(recipe: Recipe, base: BaseModel, dtype: str | None = None) -> int:
    """Bytes that a worker takes which holds a recipe's base, in a dtype or what the recipe says,
    about.
    """
    stored = sum((base.folder / shard).stat().st_size for shard in base.shards)
    wide = (dtype or recipe.base.dtype) == "float32"
    return _PROCESS_BYTES + (2 * stored if wide else stored)


def start_workers(
    crew: Crew,
    recipe: Recipe,
    base: BaseModel,
    sites: Sequence[SAESite],
    dtype: str | None = None,
) -> None:
    """Ask for workers that can count for a recipe, the base in a dtype or what the recipe says.

    Raises:
        ScaleError: there is no room for any.
    """
    saes = sum(memory_of(site.d_in, site.d_sae) for site in sites)
    memory = memory_with_model(recipe, base, dtype) + saes
    crew.start(FeatureWorker, recipe, tokenizer_sha256(base), dtype, memory=memory)


def encoded_on(crew: Crew, texts: Iterator[str]) -> Iterator[list[int]]:
    """The tokens of texts, in their order, that a crew makes of them."""
    blocks = iter(lambda: (list(islice(texts, TEXTS_AT_ONCE)),), ([],))
    waiting: dict[int, tuple[NDArray[np.int32], list[int]]] = {}
    following = 0
    for number, found in crew.map("encode", blocks):
        waiting[number] = found
        while following in waiting:
            ids, lengths = waiting.pop(following)
            following += 1
            for part in np.split(ids, np.cumsum(lengths)[:-1]):
                yield part.tolist()


def counted_on(
    crew: Crew, which: Mapping[int, str], model: str, parts: Iterator[tuple[Windows, int]]
) -> Iterator[Part]:
    """What comes of parts of a corpus that a crew counts, as they end.

    Args:
        crew: started.
        which: places of the recipe's tables → sha256 of their SAE's weights.
        model: sha256 of the base.
        parts: windows, and the index of the first.

    Raises:
        BakeoutError: of the kind of trouble that crew or workers meet.
    """
    items = ((which, model, windows, start) for windows, start in parts)
    for _, (start, stop, arrays) in crew.map("count", items):
        yield start, stop, {name: torch.tensor(array) for name, array in arrays.items()}
