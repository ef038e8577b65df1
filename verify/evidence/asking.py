"""Asking several engines the same prompts, those with models of their own side by side."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from bake.questions.answers import LetterTokens, best_letters
from bake.questions.open_prompts import instructed
from bake.questions.prompts import Batch
from verify.compare.lanes import side_by_side
from verify.engines.continuing import go_on, mean_next, prompt_batches, stop_ids
from verify.engines.heap import trim
from verify.engines.runners import HookedRunner, Runner
from verify.journal import Journal
from verify.report.measures import TokenShift

VARIANTS = ("base", "reconstruction", "unlearned", "prompted")
"""`prompted` is the base's runner, told something first."""
MAX_NEW_TOKENS = 10
SHIFTED_TOKENS = 35
"""How many of the tokens whose probability falls most, and of those where it rises most."""
FIRST_PART = 0.8
"""The share of the work that continuations are, for progress."""
Progress = Callable[[float], None]
"""Called with the share done, 0 to 1."""
Said = dict[str, list[list[int]]]
"""Per variant and prompt, the tokens that it went on with, one that ended it included."""


@dataclass(frozen=True)
class Asking:
    """Engines, and how to ask them batch by batch."""

    runners: Mapping[str, Runner]
    instruction: str
    tokenizer: Any
    journal: Journal
    progress: Progress

    @property
    def variants(self) -> list[str]:
        """Those that there are: a slice of an SAE reconstructs nothing."""
        return [name for name in VARIANTS if name == "prompted" or name in self.runners]

    @property
    def everyone(self) -> list[str]:
        """The variants, and engines that are none of them."""
        return [*self.variants, *(name for name in self.runners if name not in VARIANTS)]

    def continuations(self, texts: Sequence[str]) -> Said:
        """What each variant goes on with."""
        stops = stop_ids(self.tokenizer)
        return self._each(
            "continue",
            self.everyone,
            texts,
            lambda runner, batch: go_on(runner, batch, stops, MAX_NEW_TOKENS),
            lambda share: self.progress(FIRST_PART * share),
        )

    def letters(self, texts: Sequence[str], letters: LetterTokens) -> dict[str, list[int]]:
        """Whether each variant says A (0) or B (1)."""

        def choose(runner: Runner, batch: Batch) -> list[int]:
            logits = runner.logits(batch.input_ids, batch.attention_mask)
            return best_letters(logits, letters.chat[:2])

        return self._each(
            "choose",
            self.variants,
            texts,
            choose,
            lambda share: self.progress(FIRST_PART + (1 - FIRST_PART) * share),
        )

    def shifts(self, texts: Sequence[str]) -> tuple[tuple[TokenShift, ...], tuple[TokenShift, ...]]:
        """The tokens that fall most and those that rise most, from base to unlearned."""
        if not texts:
            return (), ()
        shown = prompt_batches(self._bare(texts), self.tokenizer)
        base, unlearned = self.runners["base"], self.runners["unlearned"]
        digests = " ".join(batch.digest for batch in shown)
        falls, rises = self.journal.once(
            f"completions shift {base.name} {unlearned.name} {digests}",
            lambda: most_moved(mean_next(base, shown).numpy(), mean_next(unlearned, shown).numpy()),
        )
        return self._named(falls), self._named(rises)

    def _named(self, moved: Sequence[tuple[int, float, float]]) -> tuple[TokenShift, ...]:
        shifts = []
        for token, before, after in moved:
            text = self.tokenizer.convert_ids_to_tokens(token)  # None beyond the tokenizer's own
            shifts.append(TokenShift((text or f"<{token}>").replace("\u2581", " "), before, after))
        return tuple(shifts)

    def _bare(self, texts: Sequence[str]) -> list[str]:
        """Without the BOS that a prompt may spell: every prompt is given one."""
        return [text.removeprefix(self.tokenizer.bos_token or "") for text in texts]

    def _each(
        self,
        what: str,
        variants: Sequence[str],
        texts: Sequence[str],
        compute: Callable[[Runner, Batch], list[Any]],
        progress: Progress,
    ) -> dict[str, list[Any]]:
        """Per variant, what `compute` finds of every text, batch by batch. Engines that have models
        of their own compute side by side.
        """
        pieces: list[tuple[str, Batch, Journal, str, Runner]] = []
        for variant in variants:
            runner, put = self.runners["base"], self._bare(texts)
            if variant == "prompted":
                put = [instructed(text, self.instruction) for text in put]
            else:
                runner = self.runners[variant]
            journal = self.journal.shared if isinstance(runner, HookedRunner) else self.journal
            for batch in prompt_batches(put, self.tokenizer):
                name = f"completions {what} {variant} {runner.name} {batch.digest}"
                pieces.append((variant, batch, journal, name, runner))

        def once(journal: Journal, name: str, runner: Runner, batch: Batch) -> None:
            journal.once(name, partial(compute, runner, batch))
            trim()

        def do(some: range, progress: Progress) -> None:
            asked = [
                (runner, partial(once, journal, name, runner, batch))
                for _, batch, journal, name, runner in pieces[some.start : some.stop]
                if not journal.has(name)
            ]
            with side_by_side(asked) as futures:
                for done, future in enumerate(as_completed(futures), 1):
                    future.result()
                    progress(done / len(asked))

        digest = hashlib.sha256(" ".join(name for *_, name, _ in pieces).encode()).hexdigest()[:16]
        self.journal.ahead(
            {
                f"{what} {digest} {of.start} to {of.stop}": partial(do, of, lambda _share: None)
                for of in self.journal.parts(len(pieces))
            }
        )
        do(range(len(pieces)), progress)
        found: dict[str, dict[int, Any]] = {variant: {} for variant in variants}
        for variant, batch, journal, name, _ in pieces:
            rows = journal.once(name, list)
            found[variant] |= {p.item: row for p, row in zip(batch.prompts, rows, strict=True)}
        return {name: [of[item] for item in range(len(texts))] for name, of in found.items()}


def most_moved(
    before: np.ndarray, after: np.ndarray
) -> tuple[list[tuple[int, float, float]], list[tuple[int, float, float]]]:
    """(token, before, after) of those that fall most, and of those that rise most.

    Args:
        before: [vocab] probabilities.
        after: [vocab] probabilities. Of two tokens that move alike, the one of smaller id is first.
    """
    change = after - before

    def first(order: np.ndarray) -> list[tuple[int, float, float]]:
        return [(int(i), float(before[i]), float(after[i])) for i in order[:SHIFTED_TOKENS]]

    falls, rises = np.argsort(change, kind="stable"), np.argsort(-change, kind="stable")
    return first(falls[change[falls] < 0]), first(rises[change[rises] > 0])
