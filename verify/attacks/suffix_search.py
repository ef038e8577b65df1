"""The search for one suffix that brings back what was forgotten, whatever the question.

Greedy coordinate gradient: the gradient with respect to each place's token says which tokens look
promising there; a few swaps of one token are drawn among those and tried; the best one stays where
it lowers the loss. The clamp is a step, of which a gradient knows nothing, so it is the trial that
decides.

Source: Zou et al., arXiv 2307.15043.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from verify.attacks.suffix_loss import AskedUpTo, Slotted
from verify.journal import Journal

if TYPE_CHECKING:
    from verify.reference.oracle import Oracle

LENGTH = 12
"""Tokens of a suffix, where nothing else is said."""
TOP_K = 256
"""At each place, how many tokens a swap is drawn from."""
CANDIDATES = 8
"""Swaps that are tried in a step."""
SOLVED = 0.01
"""Nats: a mean loss at which there is nothing left to gain."""
SEED = 0


@dataclass(frozen=True)
class Suffix:
    """What the search has come to."""

    ids: tuple[int, ...]
    """Token ids: text that decodes from them need not encode to them again."""
    loss: float
    """Nats: mean of -log p(right letter), p over the four letters, over the questions that the
    search looks at."""
    steps: int
    """How many it took."""


def find_suffix(
    oracle: Oracle,
    prompts: Sequence[Slotted],
    tokenizer: Any,
    letters: Sequence[Sequence[int]],
    *,
    budget: int,
    journal: Journal,
    name: str,
    length: int = LENGTH,
    progress: Callable[[float], None] | None = None,
) -> Suffix:
    """The suffix that makes the right letters likeliest, in so many steps.

    Args:
        oracle: the reference; its counts of firings go on.
        prompts: questions that the search may look at, at least one.
        tokenizer: the base model's.
        letters: the tokens of A to D in the form of the prompts.
        budget: most steps.
        journal: keeps every step, so that an interrupted search ends where a whole one does.
        name: of this search in the journal.
        length: tokens of the suffix.
        progress: called with the share done, 0 to 1.
    """
    search = _Search(oracle, prompts, tokenizer, letters)
    found = _suffix(journal.once(f"{name}: start", lambda: search.start(length)))
    while found.steps < budget and found.loss > SOLVED:
        found = _next(search, found, journal, f"{name}: step {found.steps + 1}")
        if progress is not None:
            progress(found.steps / budget)
    return found


def _next(search: _Search, current: Suffix, journal: Journal, name: str) -> Suffix:
    return _suffix(journal.once(name, lambda: search.step(current)))


def _suffix(kept: dict[str, Any]) -> Suffix:
    return Suffix(tuple(kept["ids"]), kept["loss"], kept["steps"])


class _Search:
    """Steps, each of which depends on nothing but the suffix that it starts from."""

    def __init__(
        self,
        oracle: Oracle,
        prompts: Sequence[Slotted],
        tokenizer: Any,
        letters: Sequence[Sequence[int]],
    ) -> None:
        self._arguments = (oracle, prompts, letters, tokenizer.pad_token_id or 0)
        self._allowed = allowed_tokens(oracle.model, tokenizer)
        self._looked_at: tuple[tuple[int, ...], np.ndarray] | None = None

    @cached_property
    def _asked(self) -> AskedUpTo:
        """Read when the first step needs it: all may be in the journal."""
        return AskedUpTo(*self._arguments)

    def start(self, length: int) -> dict[str, Any]:
        """Any tokens, as JSON data."""
        ids = np.random.default_rng(SEED).choice(self._allowed, length)
        suffix = tuple(int(token) for token in ids)
        return asdict(Suffix(suffix, float(self._asked.losses([suffix])[0]), 0))

    def step(self, current: Suffix) -> dict[str, Any]:
        """The best of a few swaps, or what there was, as JSON data."""
        tried = [current.ids, *self._swaps(current)]  # together, so that all are rounded alike
        losses = self._asked.losses(tried)
        best = int(losses.argmin())
        return asdict(Suffix(tried[best], float(losses[best]), current.steps + 1))

    def _swaps(self, current: Suffix) -> list[tuple[int, ...]]:
        """The suffix with one token changed, several times, none twice."""
        promising = self._promising(current.ids)
        draw = np.random.default_rng([SEED, current.steps])
        swaps: dict[tuple[int, ...], None] = {}
        for place, rank in draw.integers(promising.shape, size=(CANDIDATES, 2)).tolist():
            token = int(promising[place, rank])
            swaps[(*current.ids[:place], token, *current.ids[place + 1 :])] = None
        swaps.pop(current.ids, None)
        return list(swaps)

    def _promising(self, ids: tuple[int, ...]) -> np.ndarray:
        """[places, k] token ids by gradient; taken once of a suffix that stays for many steps."""
        if self._looked_at is None or self._looked_at[0] != ids:
            gradient = self._asked.gradient(ids)[:, self._allowed]
            k = min(TOP_K, len(self._allowed))
            best = gradient.topk(k, largest=False).indices.numpy()
            self._looked_at = (ids, self._allowed[best])
        return self._looked_at[1]


def allowed_tokens(model: Any, tokenizer: Any) -> np.ndarray:
    """Ids that a suffix may be made of: ordinary ones, none that was added to the vocabulary."""
    rows = model.get_input_embeddings().weight.shape[0]
    barred = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    ids = {*tokenizer.get_vocab().values()} - barred
    return np.array(sorted(token for token in ids if token < rows))
