"""The way through a comparison: the references lead, and every engine follows when it has room."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.questions.forms import FORMS
from bake.questions.prompts import Batch, left_padded
from verify.compare.comparison import REFERENCE, Comparison
from verify.compare.firing import Firings
from verify.compare.lanes import side_by_side
from verify.compare.shelf import Seen, Shelf
from verify.engines.heap import trim
from verify.engines.runners import DecodingRunner, HookedRunner, Reading, Runner
from verify.journal import Journal, Progress

if TYPE_CHECKING:
    from torch import Tensor

    from verify.reference.oracle import Oracle

DECODED_PROMPTS, DECODED_TOKENS = 4, 64
"""How many forget prompts of each form, the shortest, are read token by token, and how many of
their last tokens, at most."""
DECODED_LOGITS, FEWEST_DECODED = 1 << 25, 16
"""How many logits that may form, and how many tokens it is at least."""


def compare(
    here: Sequence[HookedRunner],
    elsewhere: Sequence[DecodingRunner],
    oracles: Mapping[str, Oracle],
    comparison: Comparison,
    journal: Journal,
    progress: Progress,
    cache: Path | None = None,
) -> None:
    """Show every engine the same prompts. Changes `comparison`.

    Args:
        here: engines that share this process's models, run one after another.
        elsewhere: engines that follow, side by side where there is room for them.
        oracles: by name, those of the references among `here`; the first is `REFERENCE`'s.
        comparison: what is collected.
        journal: holds the batches of a run that was interrupted.
        progress: told how far it is.
        cache: the folder in which is kept what the references read; else a temporary one.
    """
    batches = [
        _Step(f"batch {n}", batch, comparison, here, oracles)
        for n, batch in enumerate(comparison.material.batches(comparison.prompts))
    ]
    steps = batches + (_decoding(comparison, here, oracles) if comparison.parity else [])
    others = [runner for runner in here if runner.name not in oracles]
    show = partial(_show, elsewhere, others, journal=journal, cache=cache)
    journal.ahead(
        {
            f"steps {of.start} to {of.stop}": partial(show, steps[of.start : of.stop], _untold)
            for of in journal.parts(len(steps))
        }
    )
    show(steps, progress)
    for step in steps:
        asked = elsewhere if isinstance(step, _Decoding) else (*others, *elsewhere)
        engines = {of.name: journal.once(step.named(of), dict) for of in asked}
        step.take(journal.once(step.name, dict), engines)


def _show(
    elsewhere: Sequence[DecodingRunner],
    others: Sequence[HookedRunner],
    steps: Sequence[_Step],
    progress: Progress,
    *,
    journal: Journal,
    cache: Path | None,
) -> None:
    """Show some steps to every engine; what is found is in the journal. Arguments as `compare`
    takes them; `others` share the references' model and are none.
    """
    batches = [step for step in steps if not isinstance(step, _Decoding)]
    todo = _missing(elsewhere, steps, journal)
    afterwards = _missing(others, batches, journal)
    waited_for = Counter(step.name for _, step in (*todo, *afterwards))
    left = (*steps, *(step for _, step in (*todo, *afterwards)))
    total, done = sum(step.n_tokens for step in left), 0

    def advance(step: _Step) -> None:
        nonlocal done
        done += step.n_tokens
        progress("compare", done / total)

    with Shelf(waited_for, cache) as shelf:

        def follow(runner: Runner, step: _Step) -> None:
            seen, reading = shelf.take(step.name, step.comparison.reference_of(runner.name))
            found = step.follow(runner, seen, reading)
            journal.once(step.named(runner), lambda: found)
            trim()

        work = [(runner, partial(follow, runner, step)) for runner, step in todo]
        with side_by_side(work) as futures, shelf.failing():
            for step in steps:
                for future in filter(Future.done, futures):
                    future.result()  # what went wrong in it
                if waited_for[step.name] or not journal.has(step.name):
                    led = step.lead()
                    if waited_for[step.name]:
                        shelf.put(step.name, led.seen, led.logits)
                    journal.once(step.name, partial(getattr, led, "found"))
                    del led
                    trim()
                advance(step)
            for runner, step in afterwards:  # on the references' model, so not meanwhile
                follow(runner, step)
                advance(step)
            steps_of = dict(zip(futures, (step for _, step in todo), strict=True))
            for future in as_completed(futures):
                future.result()
                advance(steps_of[future])


def _untold(what: str, share: float) -> None:
    """Of a part of the work."""


def _missing(
    runners: Sequence[Runner], steps: Sequence[_Step], journal: Journal
) -> list[tuple[Runner, _Step]]:
    """What each engine has still to do, its steps in order."""
    return [(of, step) for of in runners for step in steps if not journal.has(step.named(of))]


@dataclass(frozen=True)
class _Led:
    """What the references gave of some prompts."""

    found: dict[str, Any]
    """As JSON data."""
    seen: Seen
    logits: dict[str, Tensor]
    """By reference, [n, vocab] at the wanted tokens."""


@dataclass(frozen=True)
class _Step:
    """One batch. The references are first: where they fired decides what is looked at."""

    name: str
    """Of the piece of work."""
    batch: Batch
    comparison: Comparison
    here: Sequence[HookedRunner]
    oracles: Mapping[str, Oracle]

    @property
    def n_tokens(self) -> int:
        """Padding left out."""
        return sum(len(prompt.ids) for prompt in self.batch.prompts)

    def named(self, runner: Runner) -> str:
        """The piece of work of one engine."""
        return f"{self.name} {runner.name}"

    def lead(self) -> _Led:
        """Let the references read it."""
        batch, comparison = self.batch, self.comparison
        firings = Firings(self.oracles, REFERENCE)

        def choose(rows: slice) -> Tensor:  # of the rows that the reference was shown last
            return comparison.wanted(batch.part(rows), self.oracles[REFERENCE])

        inputs = (batch.input_ids, batch.attention_mask)
        references = {runner.name: runner for runner in self.here if runner.name in self.oracles}
        readings = {REFERENCE: references.pop(REFERENCE).read(*inputs, choose, batch.scored)}
        wanted = choose(slice(None))
        asked = (*inputs, wanted, batch.scored)
        readings |= {name: of.read(*asked) for name, of in references.items()}
        losses = {name: of.losses for name, of in readings.items()}
        seen = Seen(wanted, comparison.nearby(batch), losses)
        since = firings.since(batch)
        engines = {name: self._compared(name, of, seen, of) for name, of in readings.items()}
        logits = {name: of.logits for name, of in readings.items()}
        return _Led({"engines": engines, **since}, seen, logits)

    def follow(self, runner: Runner, seen: Seen, reference: Reading) -> Any:
        """Let one engine read it: what that says beside its reference's, as JSON data."""
        batch = self.batch
        read = runner.read(batch.input_ids, batch.attention_mask, seen.wanted, batch.scored)
        return self._compared(runner.name, read, seen, reference)

    def take(self, found: Mapping[str, Any], engines: Mapping[str, Any]) -> None:
        """Take in what was found of the references, and of the engines that followed. Changes the
        comparison.
        """
        self.comparison.take(self.batch, {**found, "engines": {**found["engines"], **engines}})

    def _compared(self, name: str, read: Reading, seen: Seen, reference: Reading) -> dict[str, Any]:
        of = self.comparison
        return of.found(name, self.batch, seen.wanted, read, reference, seen.nearby)


@dataclass(frozen=True)
class _Decoding(_Step):
    """Some forget prompts, which the engines read token by token, from a cache.

    The references read them at once: what a token's logits are does not depend on that.
    """

    n_last: int
    """Of the columns, so many are read one by one."""

    @property
    def _tail(self) -> Batch:
        last = slice(-self.n_last, None)
        ids, mask = self.batch.input_ids[:, last], self.batch.attention_mask[:, last]
        return replace(self.batch, input_ids=ids, attention_mask=mask)

    def lead(self) -> _Led:
        """See `_Step.lead`."""
        batch, firings = self.batch, Firings(self.oracles, REFERENCE)
        wanted = batch.wanted
        wanted[:, : -self.n_last] = False
        references = [runner for runner in self.here if runner.name in self.oracles]
        inputs = (batch.input_ids, batch.attention_mask)
        logits = {of.name: of.logits(*inputs, wanted) for of in references}
        nearby = self.comparison.nearby(batch)
        seen = Seen(
            self._tail.wanted,
            {name: of.last(self.n_last) for name, of in nearby.items()},
            {name: of.new_zeros(0) for name, of in logits.items()},
        )
        return _Led(firings.since(batch), seen, logits)

    def follow(self, runner: Any, seen: Seen, reference: Reading) -> Any:
        """See `_Step.follow`."""
        batch, tail = self.batch, self._tail
        read = runner.decoded(batch.input_ids, batch.attention_mask, self.n_last)[seen.wanted]
        return self.comparison.parity_found(
            runner.name, tail, seen.wanted, reference.logits, read, seen.nearby
        )

    def take(self, found: Mapping[str, Any], engines: Mapping[str, Any]) -> None:
        """See `_Step.take`."""
        for name, parity in engines.items():
            self.comparison.parities[name].take(self._tail, parity)
        self.comparison.add_firings(found)


def _decoding(
    comparison: Comparison, here: Sequence[HookedRunner], oracles: Mapping[str, Oracle]
) -> list[_Step]:
    """What is read token by token, if there is anything."""
    asked = [p for p in comparison.prompts if p.source == "forget" and p.every_token]
    asked.sort(key=lambda prompt: len(prompt.ids))
    chosen = [
        prompt
        for form in FORMS
        for prompt in [p for p in asked if p.form == form][:DECODED_PROMPTS]
    ]
    if not chosen:
        return []
    batch = left_padded(chosen, pad_id=comparison.material.pad_id, last_only=False)
    affordable = DECODED_LOGITS // (len(chosen) * len(comparison.material.tokenizer))
    longest = batch.input_ids.shape[1] - 1
    n_last = min(max(FEWEST_DECODED, affordable), DECODED_TOKENS, longest)
    return [_Decoding("decoded", batch, comparison, here, oracles, n_last)]
