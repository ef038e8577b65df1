"""What is the same in the tests of workers, and a crew in this process."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from bake.questions.corpora import Windows
from bake.search.corpus_statistics import Measured
from bake.search.statistics import (
    Counter,
    FeatureSite,
    FeatureStatistics,
    batch_windows,
    count_windows,
    finished,
)

SEQ = 24
BATCH = batch_windows(SEQ)


def statistics(
    model: Any, sites: Sequence[FeatureSite], windows: Windows
) -> list[FeatureStatistics]:
    """Of a whole corpus at once, one for each site."""
    state = count_windows(model, [Counter(site, model) for site in sites], windows)
    return [finished(state, i, windows.n_tokens) for i in range(len(sites))]


def assert_same(one: FeatureStatistics, other: FeatureStatistics) -> None:
    """To the last bit."""
    for name, array in vars(one).items():
        assert np.array_equal(getattr(other, name), array), name


def assert_all_same(one: Measured, other: Measured) -> None:
    for side in ("forget", "retain"):
        assert one.corpora[side].sha256 == other.corpora[side].sha256
        assert one.corpora[side].n_texts == other.corpora[side].n_texts
        for mine, theirs in zip(one.sites, other.sites, strict=True):
            assert_same(getattr(mine, side), getattr(theirs, side))


class InProcess:
    """A crew of one worker in this process, which ends what it is given in another order.

    Args:
        ahead: how many pieces it is given at once.
        stop_after: how many calls of `method` it does before it is interrupted.
        method: the calls that count.
    """

    def __init__(self, ahead: int = 1, stop_after: int = 10**9, method: str = "count") -> None:
        self.ahead, self.stop_after, self.method = ahead, stop_after, method
        self.counted: list[Any] = []
        """The last argument of each of those."""

    def start(self, worker: type, *arguments: Any, memory: int) -> None:
        self.worker = worker(*arguments)

    def map(self, method: str, items: Iterable[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        numbered = enumerate(items)
        rng = random.Random(0)
        while some := list(itertools.islice(numbered, self.ahead)):
            rng.shuffle(some)
            for number, item in some:
                if method == self.method:
                    if len(self.counted) == self.stop_after:
                        raise KeyboardInterrupt
                    self.counted.append(item[-1])
                yield number, getattr(self.worker, method)(*item)
