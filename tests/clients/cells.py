"""What is asked of every client: carriers in dtypes; and what it says: a cell of the matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

NOT_RUN = "not run"
"""Beside the words of `bake.rounding`: nobody tried, and the cell says why."""


class NotHereError(Exception):
    """What a client needs is not on this machine; the message says what."""


@dataclass(frozen=True)
class Way:
    """One way in which a client takes a carrier."""

    carrier: str
    """A folder of the world: `layer`, `onnx`, `compiled`, `adapter`."""
    dtype: str
    """As whom the page's row names: the dtype, and what is done beside."""
    slow: bool = False
    """Left out of the tests; measured for the page."""


class Prompt(list[int]):
    """Token ids."""

    def __init__(self, ids: Sequence[int], places: Sequence[int]) -> None:
        super().__init__(ids)
        self.places = list(places)
        """Tokens after which something is wanted: a slow client may say nothing elsewhere."""


@dataclass(frozen=True)
class Generated:
    """What a client says that goes on with a prompt by itself."""

    ids: list[int]
    """The prompt, and what it said."""
    logits: NDArray[np.float32]
    """[n, vocab] of its own n last tokens' places: each predicts the token at its end."""


Said = NDArray[np.float32] | Generated
"""[seq, vocab] logits or log-probabilities of a prompt, or what a client generated."""


@dataclass(frozen=True)
class Client:
    """A program that loads model folders."""

    name: str
    packages: tuple[str, ...]
    """Python distributions, or with `npm:` before them packages of npm, whose versions are told."""
    ways: tuple[Way, ...]
    say: Callable[[Way, Mapping[str, Path], Sequence[Any]], Sequence[Said]] | None = None
    """From a way, the folders by carrier (and `base`), and prompts (`Prompt`), to what it says of
    each. Runs in a process that cannot import bakeout. It raises `NotHereError` where something is
    missing; whatever else it raises is the client's refusal. None: it cannot be run, see `why`."""
    why: str = ""
    """Of a client that cannot be run: the reason."""
    note: str = ""
    """What else is to be known, for the page."""
    knows_bakeout: bool = False
    """Whether its process may import bakeout."""


@dataclass(frozen=True)
class Cell:
    """What became of one carrier in one client."""

    client: str
    carrier: str
    dtype: str
    word: str
    """One of `bake.rounding`'s, or `NOT_RUN`."""
    kl_to_hook: float | None = None
    """Mean, nats per token, from the clamp's first firing on; None where it is not finite."""
    kl_to_base: float | None = None
    effect: float | None = None
    """Share of the clamp's effect that shows."""
    why: str = ""
    """The client's own words, or why it was not run."""
    versions: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        """What it is about."""
        return self.client, self.carrier, self.dtype


def rows(arrays: Sequence[Any]) -> list[NDArray[np.float32]]:
    """[seq, vocab] each, as float32 arrays."""
    return [np.asarray(array, dtype=np.float32) for array in arrays]
