"""All engines over the same prompts, batch by batch, and what that shows about each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from bake.questions.answers import Answers
from bake.questions.loss import LossSum, text_rows
from bake.questions.prompts import QUESTION_FORMS, Batch, Prompt, left_padded
from verify.compare.distances import Distances
from verify.compare.firing import FeatureWatch, FiredExamples, fired_on
from verify.compare.parity_sum import ParitySum, answer_flips
from verify.compare.sensitivity import Nearby
from verify.engines.runners import DecodingRunner, Runner
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
their last tokens."""


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
    """Per engine, that of its reference to roundings of the engine's size; the reference's own is
    its sensitivity to its own. Empty where only answers are looked at."""
    answers: dict[str, Answers] = field(init=False)
    losses: dict[str, LossSum] = field(init=False)
    parities: dict[str, ParitySum] = field(init=False)
    after: list[int] = field(default_factory=list)
    """Per token of text, whether it was predicted at or after a firing in its sequence."""
    windows: list[int] = field(default_factory=list)
    """Per window of text, how many tokens' loss was taken."""
    fired: dict[str, int] = field(default_factory=dict)
    """Per reference, on how many tokens its clamps fired."""
    fired_by_layer: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.answers = {name: Answers(self.material.letters) for name in self.names}
        self.losses = {name: LossSum() for name in self.names}
        self.parities = {}
        for name in self.names if self.parity else ():
            if not self._refers(name):
                distances = Distances(self.sensitivities[name])
                self.parities[name] = ParitySum(distances=distances)

    def _refers(self, name: str) -> bool:
        """Whether others are compared with this one."""
        return name == REFERENCE or name in self.against.values()

    def reference_of(self, name: str) -> str:
        """What an engine is compared with; a reference with itself."""
        return name if self._refers(name) else self.against.get(name, REFERENCE)

    def nearby(self, batch: Batch) -> dict[str, Nearby]:
        """What the references know of a batch, which was their last forward, for each engine."""
        if not self.parity:
            return {}
        known = {of.name: of.nearby(batch) for of in self.sensitivities.values()}
        return {engine: known[of.name] for engine, of in self.sensitivities.items()}

    def found(
        self, batch: Batch, logits: Mapping[str, Tensor], nearby: Mapping[str, Nearby]
    ) -> dict[str, Any]:
        """What every engine's logits of a batch say, as JSON data; changes nothing."""
        return {
            name: {
                "answers": self.answers[name].found(batch, logits[name]),
                "losses": LossSum.found(batch, logits[name]),
                "parity": self.parity_found(name, batch, logits, nearby),
            }
            for name in self.names
        }

    def parity_found(
        self,
        name: str,
        batch: Batch,
        logits: Mapping[str, Tensor],
        nearby: Mapping[str, Nearby],
    ) -> list[Any] | None:
        """One engine's logits against its reference's, as JSON data; None of a reference."""
        if name not in self.parities:
            return None
        reference = self.reference_of(name)
        return self.parities[name].found(batch, logits[reference], logits[name], nearby[name])

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
        self.windows += [len(batch.prompts[row].ids) - 1 for row in text_rows(batch)]
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
                tokens_fired=self.fired[name],
                worst=None,
                flips=(),
            )
        reference, tokenizer = self.reference_of(name), self.material.tokenizer
        parity = self.parities[name]
        flips = answer_flips(self.answers[reference], self.answers[name], self.material.questions)
        assert parity.distances is not None
        return parity.result(
            tokens_fired=0 if name == BASE else self.fired[reference],
            flips=flips,
            tokenizer=tokenizer,
            rounding=parity.distances.result(flips, self._asked, self.examples.prompts, tokenizer),
        )

    @cached_property
    def _asked(self) -> dict[tuple[str, str, int], Prompt]:
        """Every prompt that asks a question, by source, form and row."""
        return {(of.source, of.form, of.row): of for of in self.prompts if of.item >= 0}


# --------------------------------------------------------------------------- the way through


def compare(
    here: Sequence[Runner],
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
    prompts = comparison.prompts
    total = sum(len(prompt.ids) for prompt in prompts)
    done = 0
    waiting: list[tuple[str, Batch, Future[Any]]] = []  # of the batch before, while one is run

    def finish() -> None:
        for name, batch, counting in waiting:
            comparison.take(batch, journal.once(name, counting.result))
        waiting.clear()

    with ThreadPoolExecutor(len(elsewhere) + 1) as pool:
        for number, batch in enumerate(comparison.material.batches(prompts)):
            name = f"batch {number}"
            if journal.has(name):
                comparison.take(batch, journal.once(name, dict))
            else:
                inputs = (batch.input_ids, batch.attention_mask, batch.last_only)
                pending = {runner.name: pool.submit(runner.logits, *inputs) for runner in elsewhere}
                firings = _Firings(oracles)
                logits = {runner.name: runner.logits(*inputs) for runner in here}
                logits |= {name: answer.result() for name, answer in pending.items()}
                firing, nearby = firings.since(batch), comparison.nearby(batch)
                finish()
                counting = pool.submit(_found, comparison, batch, logits, nearby, firing)
                waiting.append((name, batch, counting))
            done += sum(len(prompt.ids) for prompt in batch.prompts)
            progress("compare", done / total)
        finish()
    if comparison.parity:
        _compare_decoding(here, elsewhere, oracles, comparison, journal)


def _found(
    comparison: Comparison,
    batch: Batch,
    logits: Mapping[str, Tensor],
    nearby: Mapping[str, Nearby],
    firing: dict[str, Any],
) -> dict[str, Any]:
    return {"engines": comparison.found(batch, logits, nearby), **firing}


class _Firings:
    """What oracles do from now on."""

    def __init__(self, oracles: Mapping[str, Oracle]) -> None:
        self._oracles = oracles
        self._tokens = {name: oracle.tokens_fired for name, oracle in oracles.items()}
        self._by_layer = dict(oracles[REFERENCE].fired_by_layer)

    def since(self, batch: Batch) -> dict[str, Any]:
        """On how many tokens they fired since; and on which of a batch, their last one."""
        reference = self._oracles[REFERENCE]
        return {
            "tokens": {
                name: oracle.tokens_fired - self._tokens[name]
                for name, oracle in self._oracles.items()
            },
            "by_layer": {
                str(layer): n - self._by_layer[layer]
                for layer, n in reference.fired_by_layer.items()
            },
            **fired_on(reference, batch),
        }


def _compare_decoding(
    here: Sequence[Runner],
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
        for form in QUESTION_FORMS
        for prompt in [p for p in asked if p.form == form][:DECODED_PROMPTS]
    ]
    if not chosen:
        return
    batch = left_padded(chosen, pad_id=comparison.material.pad_id, last_only=False)
    n_last = min(DECODED_TOKENS, batch.input_ids.shape[1] - 1)
    tail = replace(
        batch,
        input_ids=batch.input_ids[:, -n_last:],
        attention_mask=batch.attention_mask[:, -n_last:],
    )

    def decode() -> dict[str, Any]:
        firings = _Firings(oracles)
        whole = {
            runner.name: runner.logits(batch.input_ids, batch.attention_mask, last_only=False)
            for runner in here
            if runner.name != BASE
        }
        logits = {name: of[:, -n_last:] for name, of in whole.items()}
        nearby = {name: of.last(n_last) for name, of in comparison.nearby(batch).items()}
        parities = {}
        for runner in elsewhere:
            logits[runner.name] = runner.decoded(batch.input_ids, batch.attention_mask, n_last)
            parities[runner.name] = comparison.parity_found(runner.name, tail, logits, nearby)
        return {"parities": parities, **firings.since(batch)}

    found = journal.once("decoded", decode)
    for name, parity in found["parities"].items():
        comparison.parities[name].take(tail, parity)
    for name, n in found["tokens"].items():
        comparison.fired[name] += n
    for layer, n in found["by_layer"].items():
        comparison.fired_by_layer[int(layer)] += n
