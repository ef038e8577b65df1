"""A corpus counted in parts: what comes of each is kept at once, and merged in their order.

Which parts there are depends on the corpus and the SAEs alone, so that everything is added up in
the same order, whoever counts, and however often it was interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bake.new_folder import whole_file
from bake.questions.corpora import Windows
from bake.search.cache import Unfinished
from bake.search.statistics import batch_windows, strongest

PART_TOKENS, TOKENS_PER_FEATURE = 1 << 14, 4
"""Least tokens of a part, and how many for each feature: what comes of a part has some hundred
numbers a feature, and must be little work beside the counting."""

State = dict[str, Tensor]
"""As `count_windows` gives it."""
Part = tuple[int, int, State]
"""Its first window, the one behind its last, and what came of it."""
Count = Callable[[Iterator[tuple[Windows, int]]], Iterator[Part]]
"""From parts (windows, index of the first) to what comes of them, as they end."""


def count_parts(
    count: Count,
    windows: Windows,
    n_features: int,
    unfinished: Unfinished,
    progress: Callable[[float], None],
) -> State:
    """Count a corpus, which no other process may do at the same time.

    What comes of a part lies beside the unfinished state as soon as it is there, and is removed
    once the state that has it is on disk.

    Args:
        count: whoever counts.
        windows: the corpus.
        n_features: of all SAEs together.
        unfinished: of a pass over these SAEs and this corpus: it goes on from there.
        progress: called with the share that is done.

    Returns:
        What `count_windows` gives for the whole, but for the rounding of sums.
    """
    n_windows, seq = windows.ids.shape
    merging = _Merging(unfinished)
    step = batch_windows(seq)
    tokens = max(PART_TOKENS, TOKENS_PER_FEATURE * n_features)
    size = step * -(-tokens // (seq * step))

    def parts() -> Iterator[tuple[Windows, int]]:
        for start in range(merging.start, n_windows, size):
            stop = min(start + size, n_windows)
            if not merging.has(start, stop):
                yield windows.part(start, stop), start

    for part in count(parts()):
        merging.take(*part)
        progress(merging.n_windows / n_windows)
    return merging.result()


class _Merging:
    """Parts of a corpus, merged as far as they reach without a gap; the others wait on disk.

    Args:
        unfinished: where what is merged is kept from time to time.
    """

    def __init__(self, unfinished: Unfinished) -> None:
        self._folder, self._unfinished = unfinished.parts, unfinished
        self._folder.mkdir(parents=True, exist_ok=True)
        state = unfinished.load()
        self.start = 0 if state is None else int(state.pop("start"))
        """How many windows are merged."""
        self.n_windows = self.start
        """How many are counted."""
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

    def take(self, start: int, stop: int, state: State) -> None:
        """Keep a part, and merge what can be."""
        with whole_file(self._path(start, stop)) as new:
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, new)
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
        self.n_windows += stop - start
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
        one: of one part.
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
