"""Feature statistics on a crew: windows go out in parts, and what comes back is merged in order."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file
from torch import Tensor

from bake.base import BaseModel, find_base
from bake.clamp import SAESite, find_site
from bake.errors import ScaleError
from bake.files.locks import folder_lock
from bake.new_folder import whole_file
from bake.questions.corpora import Windows, tokenised
from bake.recipe import Recipe
from bake.sae.folding import load_encoder, sha256_of
from bake.scale.crew import Crew, about_here
from bake.search.cache import Unfinished, model_sha256
from bake.search.statistics import (
    Counter,
    FeatureSite,
    FeatureStatistics,
    batch_windows,
    count,
    finished,
    memory_of,
    state_of,
    strongest,
)
from bake.stock import decoder_layers, load_base, load_tokenizer

PART_TOKENS, TOKENS_PER_FEATURE = 1 << 14, 4
"""Least tokens of a part, and how many for each feature: what comes back of a part has some hundred
numbers a feature, and must be little work beside the counting."""
TEXTS_AT_ONCE = 512
"""Texts that a worker tokenises together."""
_PROCESS_BYTES = 1 << 30
"""What a worker takes beside model and SAEs, about."""

State = dict[str, Tensor]
"""As `state_of` gives it."""


class FeatureWorker:
    """Counts features in a process of its own, on the device that Ray gives it.

    Args:
        recipe: whose base and SAEs must lie at the same paths on all machines.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._ready: tuple[tuple[int, ...], Any, list[Counter]] | None = None

    def about(self) -> dict[str, str]:
        """The versions that it has."""
        return about_here()

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self._recipe)

    def encode(self, texts: list[str]) -> tuple[NDArray[np.int32], list[int]]:
        """(tokens of all texts, how many each has), without special ones."""
        ids = tokenised(texts, self._tokenizer)
        return np.array([i for of in ids for i in of], np.int32), [len(of) for of in ids]

    def count(
        self, which: Mapping[int, str], model: str, ids: Any, counted: Any, start: int
    ) -> tuple[int, int, dict[str, NDArray[Any]]]:
        """Count a part of a corpus.

        Args:
            which: places of the recipe's tables → sha256 of their SAE's weights.
            model: sha256 of the base.
            ids: [windows, seq].
            counted: [windows, seq]: tokens that are counted.
            start: index of the first window in the corpus.

        Returns:
            `start`, how many windows, and `state_of` the counters.

        Raises:
            ScaleError: base or SAEs are others here.
            BakeoutError: they cannot be loaded.
        """
        loaded, counters = self._counters(which, model)
        for counter in counters:
            counter.clear()
        step = batch_windows(ids.shape[1])
        for first in range(0, len(ids), step):
            part = slice(first, first + step)
            count(loaded, counters, ids[part], counted[part], start + first)
        state = {name: tensor.cpu().numpy() for name, tensor in state_of(counters).items()}
        return start, len(ids), state

    def _counters(self, which: Mapping[int, str], model: str) -> tuple[Any, list[Counter]]:
        """(model up to the last hook layer, a counter for each SAE), as they were used last."""
        places = tuple(which)
        if self._ready is None or self._ready[0] != places:
            self._ready = None
            base = find_base(self._recipe)
            sites = [find_site(self._recipe.clamp[i], self._recipe, base) for i in places]
            there = [model_sha256(base), *(sha256_of(site.files) for site in sites)]
            names = [base.name, *(site.name for site in sites)]
            for name, here, expected in zip(names, there, [model, *which.values()], strict=True):
                if here != expected:
                    raise ScaleError(
                        f"{name}: is another one on {socket.gethostname()} than where bakeout was "
                        "started; expected the same files on all machines. Copy them there"
                    )
            device = "cuda" if torch.cuda.is_available() else "cpu"
            loaded = load_base(self._recipe, device)
            del decoder_layers(loaded)[max(site.layer for site in sites) + 1 :]
            encoders = [FeatureSite(site.layer, load_encoder(site.files)) for site in sites]
            self._ready = (places, loaded, [Counter(site, loaded) for site in encoders])
        return self._ready[1], self._ready[2]


def start_workers(crew: Crew, recipe: Recipe, base: BaseModel, sites: Sequence[SAESite]) -> None:
    """Ask for workers that can count for a recipe.

    Raises:
        ScaleError: there is no room for any.
    """
    stored = sum((base.folder / shard).stat().st_size for shard in base.shards)
    weights = 2 * stored if recipe.base.dtype == "float32" else stored
    saes = sum(memory_of(site.d_in, site.d_sae) for site in sites)
    crew.start(FeatureWorker, recipe, memory=_PROCESS_BYTES + weights + saes)


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
    crew: Crew,
    which: Mapping[int, str],
    model: str,
    windows: Windows,
    n_features: int,
    unfinished: Unfinished,
    progress: Callable[[float], None],
) -> list[FeatureStatistics]:
    """Count a corpus on a crew.

    What comes back of a part lies beside the unfinished state as soon as it is there, is merged in
    the corpus's order, and is removed once the state that has it is on disk.

    Args:
        crew: started.
        which: places of the recipe's tables → sha256 of their SAE's weights.
        model: sha256 of the base.
        windows: the corpus.
        n_features: of all SAEs together.
        unfinished: of a pass over these SAEs and this corpus, on a crew or not: it goes on from it.
        progress: called with the share that is done.

    Returns:
        One for each SAE; `statistics` gives the same counts and contexts, and sums that differ by
        float64's rounding.

    Raises:
        BakeoutError: of the kind of trouble that crew or workers meet.
    """
    n_windows, seq = windows.ids.shape
    folder = unfinished.path.with_suffix("").with_suffix(".parts")
    folder.mkdir(parents=True, exist_ok=True)
    with folder_lock(folder):
        merging = _Merging(folder, unfinished)
        step = batch_windows(seq)
        tokens = max(PART_TOKENS, TOKENS_PER_FEATURE * n_features)
        size = step * -(-tokens // (seq * step))
        done = first = merging.start

        def items() -> Iterator[tuple[Any, ...]]:
            nonlocal done
            for start in range(first, n_windows, size):
                ids = windows.ids[start : start + size]
                if merging.has(start, start + len(ids)):
                    done += len(ids)
                    continue
                yield which, model, ids, windows.counts(ids), start

        for _, (start, length, arrays) in crew.map("count", items()):
            merging.take(start, start + length, arrays)
            done += length
            progress(done / n_windows)
        state = merging.result()
    return [finished(state, i, windows.n_tokens) for i in range(len(which))]


class _Merging:
    """Parts of a corpus, merged as far as they reach without a gap; the others wait on disk.

    Args:
        folder: of the parts.
        unfinished: where what is merged is kept from time to time.
    """

    def __init__(self, folder: Path, unfinished: Unfinished) -> None:
        self._folder, self._unfinished = folder, unfinished
        state = unfinished.load()
        self.start = 0 if state is None else int(state.pop("start"))
        """How many windows are merged."""
        self._state = state
        self._keep = unfinished.saver()
        self._waiting: dict[int, int] = {}
        """First window of each part that waits → the window behind its last."""
        self._merged: list[Path] = []
        """Parts that are in no state on disk yet."""

    def has(self, start: int, stop: int) -> bool:
        """Whether an earlier run left this part whole; it is merged then."""
        if _read(self._path(start, stop)) is None:
            return False
        self._merge(start, stop)
        return True

    def take(self, start: int, stop: int, state: dict[str, NDArray[Any]]) -> None:
        """Keep a part, and merge what can be."""
        with whole_file(self._path(start, stop)) as new:
            save_arrays(state, new)
        self._merge(start, stop)

    def result(self) -> State:
        """The state of the whole corpus, which is on disk now, and no part any more."""
        assert self._state is not None and not self._waiting
        self._unfinished.save(self._whole())
        for path in self._folder.iterdir():
            path.unlink()
        self._folder.rmdir()
        return self._state

    def _merge(self, start: int, stop: int) -> None:
        self._waiting[start] = stop
        while (stop := self._waiting.pop(self.start, 0)) > 0:
            path = self._path(self.start, stop)
            part = load_file(path)
            self._state = part if self._state is None else merged(self._state, part)
            self._merged.append(path)
            self.start = stop
            if self._keep(self._whole()):
                for path in self._merged:
                    path.unlink()
                self._merged = []

    def _whole(self) -> State:
        assert self._state is not None
        return {"start": torch.tensor(self.start), **self._state}

    def _path(self, start: int, stop: int) -> Path:
        return self._folder / f"{start}-{stop}.safetensors"


def _read(path: Path) -> State | None:
    """A part's state; None where it is not there, or not whole."""
    try:
        state: State = load_file(path)
        return state
    except (OSError, SafetensorError):
        return None


def merged(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Tensor]:
    """What two parts of a corpus make together, on the CPU: of any parts in any order the same
    counts and contexts, and the same sums but for float64's rounding.

    Args:
        one: `state_of` counters.
        other: of another part for the same sites.
    """
    both = {name: tensor + other[name] for name, tensor in one.items() if ".top_" not in name}
    for values in (name for name in one if name.endswith(".top_values")):
        places = values.replace("values", "places")
        pairs = [torch.cat([one[name], other[name]]) for name in (values, places)]
        first = pairs[1].argsort(dim=0, stable=True)  # of equal activations, the earlier place
        pairs = [tensor.gather(0, first) for tensor in pairs]
        both[values], both[places] = strongest(*pairs)
    return both
