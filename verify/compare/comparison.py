"""All engines over the same prompts, batch by batch, and what that shows about each."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from bake.questions.answers import Answers
from bake.questions.forms import FORMS
from bake.questions.loss import LossSum
from bake.questions.prompts import TEXT, Batch, Prompt, left_padded
from verify.compare.chosen import choose, share_compared
from verify.compare.distances import Distances
from verify.compare.firing import FeatureWatch, FiredExamples, Firings
from verify.compare.parity_sum import ParitySum, answer_flips
from verify.compare.sensitivity import Nearby
from verify.engines.heap import trim
from verify.engines.runners import DecodingRunner, HookedRunner, Reading, Runner
from verify.journal import Journal, Progress
from verify.material import Material
from verify.report.findings import Parity

if TYPE_CHECKING:
    from torch import Tensor

    from verify.compare.sensitivity import Sensitivity
    from verify.reference.oracle import Oracle

BASE, REFERENCE = "base", "reference"
DECODED_PROMPTS, DECODED_TOKENS = 4, 64
"""How many forget prompts of each form, the shortest, are read token by token, and how many of
their last tokens, at most."""
DECODED_LOGITS, FEWEST_DECODED = 1 << 25, 16
"""How many logits that may form, and how many tokens it is at least."""


@dataclass
class Comparison:
    """What every engine showed, collected batch by batch."""

    material: Material
    prompts: Sequence[Prompt]
    """What all of them are shown."""
    names: tuple[str, ...]
    """Of the engines."""
    parity: bool
    """Whether logits are compared."""
    against: Mapping[str, str]
    """The engines that are compared with another reference than `REFERENCE`, and with which."""
    examples: FiredExamples
    watch: FeatureWatch
    sensitivities: Mapping[str, Sensitivity]
    """Per engine that is held to rounding, that of its reference to roundings of the engine's size;
    the reference's own is its sensitivity to its own. Empty where only answers are looked at."""
    answers: dict[str, Answers] = field(init=False)
    losses: dict[str, LossSum] = field(init=False)
    parities: dict[str, ParitySum] = field(init=False)
    after: list[int] = field(default_factory=list)
    """Per token of text, whether it was predicted at or after a firing in its sequence."""
    windows: list[tuple[str, int]] = field(default_factory=list)
    """Per window of text, its form, and how many tokens' loss was taken."""
    fired: dict[str, int] = field(default_factory=dict)
    """Per reference, on how many tokens its clamps fired."""
    fired_by_layer: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.answers = {name: Answers(self.material.letters) for name in self.names}
        self.losses = {name: LossSum() for name in self.names}
        self.parities = {}
        for name in self.names if self.parity else ():
            if not self._refers(name):
                known = self.sensitivities.get(name)
                held = None if known is None else Distances(known)
                self.parities[name] = ParitySum(distances=held)

    def _refers(self, name: str) -> bool:
        """Whether others are compared with this one."""
        return name == REFERENCE or name in self.against.values()

    def reference_of(self, name: str) -> str:
        """What an engine is compared with; a reference with itself."""
        return name if self._refers(name) else self.against.get(name, REFERENCE)

    def nearby(self, batch: Batch) -> dict[str, Nearby]:
        """What the references know of a batch, their last forward, by engine held to rounding."""
        if not self.parity:
            return {}
        known = {of.name: of.nearby(batch) for of in self.sensitivities.values()}
        return {engine: known[of.name] for engine, of in self.sensitivities.items()}

    @cached_property
    def _share(self) -> float:
        """Of the tokens that could be compared, how many are."""
        return share_compared(self.prompts, len(self.material.tokenizer))

    def wanted(self, batch: Batch, oracle: Oracle) -> Tensor:
        """[batch, seq] bool: the tokens whose logits are needed, once the reference was run."""
        if not self.parity:
            return batch.ends
        assert oracle.last_fired is not None
        return choose(batch, oracle.last_fired, self._share)

    def found(
        self,
        name: str,
        batch: Batch,
        wanted: Tensor,
        reading: Reading,
        reference: Reading,
        nearby: Mapping[str, Nearby],
    ) -> dict[str, Any]:
        """What an engine's reading says beside its reference's, as JSON data; changes nothing."""
        ends = wanted.sum(dim=-1).cumsum(dim=-1) - 1  # among the wanted tokens
        at_ends = reading.logits if batch.of_choices else reading.logits[ends]
        ours, theirs = (of.losses if batch.of_choices else of.logits for of in (reference, reading))
        return {
            "answers": self.answers[name].found(batch, at_ends, reading.losses),
            "losses": [] if batch.of_choices else reading.losses.tolist(),
            "parity": self.parity_found(name, batch, wanted, ours, theirs, nearby),
        }

    def parity_found(
        self,
        name: str,
        batch: Batch,
        wanted: Tensor,
        ours: Tensor,
        theirs: Tensor,
        nearby: Mapping[str, Nearby],
    ) -> list[Any] | None:
        """One engine's logits, or losses of choices, against its reference's, as JSON data; None of
        a reference.
        """
        if name not in self.parities:
            return None
        return self.parities[name].found(batch, wanted, ours, theirs, nearby.get(name))

    def take(self, batch: Batch, found: Mapping[str, Any]) -> None:
        """Take in what was found for a batch: of every engine, and of the clamps."""
        for name, of in found["engines"].items():
            self.answers[name].take(batch, of["answers"])
            self.losses[name].losses += of["losses"]
            if of["parity"] is not None:
                self.parities[name].take(batch, of["parity"])
        for name, n in found["tokens"].items():
            self.fired[name] = self.fired.get(name, 0) + n
        for layer, n in found["by_layer"].items():
            self.fired_by_layer[int(layer)] = self.fired_by_layer.get(int(layer), 0) + n
        self.after += found["after"]
        texts = [prompt for prompt in batch.prompts if prompt.source == TEXT]
        self.windows += [(prompt.form, len(prompt.ids) - 1) for prompt in texts]
        self.examples.add(batch.prompts, found["positions"])
        self.watch.add(batch.prompts, found["active"])

    def parity_of(self, name: str) -> Parity:
        """One engine against its reference."""
        if self._refers(name):
            some = next(iter(self.parities.values()))
            return Parity(
                max_abs_logit=0.0,
                largest_logit=some.largest_logit,
                mean_kl=0.0,
                top1_agreement=1.0,
                tokens_compared=some.n_tokens,
                of_tokens=some.out_of,
                tokens_fired=self.fired[name],
                worst=None,
                flips=(),
            )
        reference, tokenizer = self.reference_of(name), self.material.tokenizer
        parity = self.parities[name]
        flips = answer_flips(self.answers[reference], self.answers[name], self.material.questions)
        rounding = None
        if parity.distances is not None:
            examples = self.examples.prompts
            rounding = parity.distances.result(flips, self._asked, examples, tokenizer)
        return parity.result(
            tokens_fired=0 if name == BASE else self.fired[reference],
            flips=flips,
            tokenizer=tokenizer,
            rounding=rounding,
        )

    @cached_property
    def _asked(self) -> dict[tuple[str, str, int], list[Prompt]]:
        """The prompts that ask each question, by source, form and row."""
        asked: dict[tuple[str, str, int], list[Prompt]] = {}
        for of in self.prompts:
            if of.item >= 0:
                asked.setdefault((of.source, of.form, of.row), []).append(of)
        return asked


# --------------------------------------------------------------------------- the way through


def compare(
    here: Sequence[HookedRunner],
    elsewhere: Sequence[DecodingRunner],
    oracles: Mapping[str, Oracle],
    comparison: Comparison,
    journal: Journal,
    progress: Progress,
) -> None:
    """Show every engine the same batches. Changes `comparison`.

    Args:
        here: engines that share this process's models, run one after another.
        elsewhere: engines that compute meanwhile, one thread each.
        oracles: by name, those of the references among `here`; the first is `REFERENCE`'s.
        comparison: what is collected.
        journal: holds the batches of a run that was interrupted.
        progress: told how far it is.
    """
    total, done = sum(len(prompt.ids) for prompt in comparison.prompts), 0
    waiting: list[tuple[str, Batch, Callable[[], Any]]] = []  # the batch before, while one is run

    def finish() -> None:
        for name, batch, result in waiting:
            comparison.take(batch, journal.once(name, result))
        waiting.clear()
        trim()

    with ThreadPoolExecutor(min(len(elsewhere) or 1, os.cpu_count() or 1)) as pool:
        for number, batch in enumerate(comparison.material.batches(comparison.prompts)):
            name = f"batch {number}"
            if journal.has(name):
                comparison.take(batch, journal.once(name, dict))
            else:
                reading = _Reading(batch, here, oracles, comparison)
                finish()
                waiting.append((name, batch, reading.go_on(elsewhere, pool)))
            done += sum(len(prompt.ids) for prompt in batch.prompts)
            progress("compare", done / total)
        finish()
    if comparison.parity:
        _compare_decoding(here, elsewhere, oracles, comparison, journal)


class _Reading:
    """All engines over one batch. The references are first: where they fired decides what is looked
    at, and what every other engine read is compared at once and let go of, for logits are large.

    While the other engines read the batch, the references go on with the next one.
    """

    def __init__(
        self,
        batch: Batch,
        here: Sequence[HookedRunner],
        oracles: Mapping[str, Oracle],
        comparison: Comparison,
    ) -> None:
        self._batch, self._comparison = batch, comparison
        firings = Firings(oracles, REFERENCE)
        choose = partial(comparison.wanted, batch, oracles[REFERENCE])
        inputs = (batch.input_ids, batch.attention_mask)
        references = {runner.name: runner for runner in here if runner.name in oracles}
        first = references.pop(REFERENCE).read(*inputs, choose, batch.scored)
        self._wanted = choose()
        self._inputs = (*inputs, self._wanted, batch.scored)
        others = {name: of.read(*self._inputs) for name, of in references.items()}
        self._references = {REFERENCE: first, **others}
        self._others = [runner for runner in here if runner.name not in oracles]
        self._firing, self._nearby = firings.since(batch), comparison.nearby(batch)

    def go_on(
        self, elsewhere: Sequence[DecodingRunner], pool: ThreadPoolExecutor
    ) -> Callable[[], dict[str, Any]]:
        """Let the other engines read it too; those that compute elsewhere are not waited for.

        Returns:
            What waits for them, and gives what all of it says as JSON data.
        """
        pending = {runner.name: pool.submit(self._look, runner) for runner in elsewhere}
        found = {name: self._compare(name, of) for name, of in self._references.items()}
        found |= {runner.name: self._look(runner) for runner in self._others}

        def result() -> dict[str, Any]:
            known = found | {name: of.result() for name, of in pending.items()}
            return {"engines": {n: known[n] for n in self._comparison.names}, **self._firing}

        return result

    def _look(self, runner: Runner) -> dict[str, Any]:
        return self._compare(runner.name, runner.read(*self._inputs))

    def _compare(self, name: str, reading: Reading) -> dict[str, Any]:
        ours = self._references[self._comparison.reference_of(name)]
        return self._comparison.found(name, self._batch, self._wanted, reading, ours, self._nearby)


def _compare_decoding(
    here: Sequence[HookedRunner],
    elsewhere: Sequence[DecodingRunner],
    oracles: Mapping[str, Oracle],
    comparison: Comparison,
    journal: Journal,
) -> None:
    """Let the folder's engines read some forget prompts token by token, from a cache.

    The references read them at once: what a token's logits are does not depend on that. Changes
    `comparison`.
    """
    asked = [p for p in comparison.prompts if p.source == "forget" and p.every_token]
    asked.sort(key=lambda prompt: len(prompt.ids))
    chosen = [
        prompt
        for form in FORMS
        for prompt in [p for p in asked if p.form == form][:DECODED_PROMPTS]
    ]
    if not chosen:
        return
    batch = left_padded(chosen, pad_id=comparison.material.pad_id, last_only=False)
    affordable = DECODED_LOGITS // (len(chosen) * len(comparison.material.tokenizer))
    n_last = min(max(FEWEST_DECODED, affordable), DECODED_TOKENS, batch.input_ids.shape[1] - 1)
    tail = replace(
        batch,
        input_ids=batch.input_ids[:, -n_last:],
        attention_mask=batch.attention_mask[:, -n_last:],
    )
    wanted = batch.wanted
    wanted[:, :-n_last] = False

    def decode() -> dict[str, Any]:
        firings = Firings(oracles, REFERENCE)
        inputs = (batch.input_ids, batch.attention_mask)
        logits = {
            runner.name: runner.logits(*inputs, wanted) for runner in here if runner.name != BASE
        }
        nearby = {name: of.last(n_last) for name, of in comparison.nearby(batch).items()}
        parities = {}
        for runner in elsewhere:
            decoded = runner.decoded(*inputs, n_last)[tail.wanted]
            ours = logits[comparison.reference_of(runner.name)]
            found = comparison.parity_found(runner.name, tail, tail.wanted, ours, decoded, nearby)
            parities[runner.name] = found
        return {"parities": parities, **firings.since(batch)}

    found = journal.once("decoded", decode)
    for name, parity in found["parities"].items():
        comparison.parities[name].take(tail, parity)
    for name, n in found["tokens"].items():
        comparison.fired[name] += n
    for layer, n in found["by_layer"].items():
        comparison.fired_by_layer[int(layer)] += n
