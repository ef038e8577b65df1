"""What engines show over the same prompts, collected batch by batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from bake.questions.answers import Answers
from bake.questions.loss import LossSum
from bake.questions.prompts import TEXT, Batch, Prompt
from verify.compare.chosen import choose, share_compared
from verify.compare.distances import Distances
from verify.compare.firing import FeatureWatch, FiredExamples
from verify.compare.parity_sum import ParitySum, answer_flips
from verify.compare.sensitivity import Nearby
from verify.engines.runners import Reading
from verify.material import Material
from verify.report.findings import Parity

if TYPE_CHECKING:
    from torch import Tensor

    from verify.compare.sensitivity import Sensitivity
    from verify.reference.oracle import Oracle

BASE, REFERENCE = "base", "reference"


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
        self.add_firings(found)
        self.after += found["after"]
        texts = [prompt for prompt in batch.prompts if prompt.source == TEXT]
        self.windows += [(prompt.form, len(prompt.ids) - 1) for prompt in texts]
        self.examples.add(batch.prompts, found["positions"])
        self.watch.add(batch.prompts, found["active"])

    def add_firings(self, found: Mapping[str, Any]) -> None:
        """Count on how many tokens the clamps fired."""
        for name, n in found["tokens"].items():
            self.fired[name] = self.fired.get(name, 0) + n
        for layer, n in found["by_layer"].items():
            self.fired_by_layer[int(layer)] = self.fired_by_layer.get(int(layer), 0) + n

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
