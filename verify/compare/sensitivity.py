"""How far one rounding moves a reference's logits: the scale by which distances are judged."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from bake.questions.prompts import Prompt
from bake.rounding import BAR, DRAWS
from verify.compare.logits import compare_logits, max_abs_difference
from verify.engines.runners import HookedRunner
from verify.journal import Journal

if TYPE_CHECKING:
    from torch import Tensor

    from bake.questions.prompts import Batch
    from verify.material import Material
    from verify.reference.oracle import Oracle

MOST_SAMPLED, FEWEST_SAMPLED, SAMPLED_SHARE = 1024, 256, 1 / 24
"""How many tokens show how sensitive a reference is in general: a share of those that are compared,
but not fewer than these, nor more."""
SAMPLED_LOGITS = 1 << 27
"""How many logits of them are looked at: of a large vocabulary not every token's."""
EXAMPLE_TOKENS = 512
"""About how many tokens show the smallest fault that would be seen."""
TYPICAL = 0.9
"""The share of them that is less sensitive than the token that stands for all: whose own draws come
out small is not held to less, for a few draws are few."""


Places = Mapping[Prompt, Sequence[int]]
"""Tokens: positions in each of some prompts, from 0 (BOS), in order."""


@dataclass(frozen=True)
class Nearby:
    """What a reference knows of a batch's tokens, whatever the engine."""

    edges: Tensor
    """[batch, seq]: how close the nearest gate is to its other side, in roundings."""
    fired: Tensor
    """[batch, seq] bool: a clamp acted."""

    @property
    def apart(self) -> Tensor:
        """[batch, seq] bool: edge tokens and what follows them."""
        return (self.edges <= BAR).cumsum(dim=-1) > 0

    def last(self, n: int) -> Nearby:
        """The same with edges carried along, of the last n columns."""
        import torch

        edges = torch.cummin(self.edges, dim=-1).values
        return Nearby(edges[:, -n:], self.fired[:, -n:])


@dataclass(frozen=True)
class _Seen:
    """What a few prompts showed."""

    tokens: list[list[float]]
    """Per prompt and place: how far one rounding moves the logits there."""
    kl: float
    """Sum over tokens and draws of KL(reference ‖ disturbed reference), in nats."""
    gates: dict[str, list[float]]
    """By layer: (sum of squares, how many) of the moves of its gates, in roundings of what the
    clamp reads."""


class Sensitivity:
    """One reference, disturbed by one rounding of what every matrix, norm and layer gives.

    Args:
        reference: its name.
        oracle: it.
        epsilon: the relative size of the rounding.
        material: how prompts are put into batches.
        journal: of a run that was interrupted, or empty.
        prompts: of which a sample is looked at, at once.
    """

    def __init__(
        self,
        reference: str,
        oracle: Oracle,
        epsilon: float,
        material: Material,
        journal: Journal,
        prompts: Sequence[Prompt],
    ) -> None:
        import torch

        self.name = f"{reference} {epsilon:.3g}"
        """Of the reference, and what it was disturbed by."""
        self.epsilon = epsilon
        self.oracle = oracle
        self._runner = HookedRunner(reference, oracle.model, oracle)
        self._material, self._journal = material, journal
        self._tokens: dict[tuple[int, ...], float] = {}  # by a token and all before it
        self._smallest_fault: float | None = None
        seen = self._look(_places(sample(prompts), len(material.tokenizer)))
        tokens = torch.tensor([token for found in seen for row in found.tokens for token in row])
        self.typical = max(float(tokens.quantile(TYPICAL)), 1e-30)
        """How far one rounding moves a token's logits; one token in ten is moved further."""
        self.largest = float(tokens.max())
        """How far it moves the most sensitive token that was looked at."""
        self.mean_kl = sum(found.kl for found in seen) / (DRAWS * len(tokens))
        """KL(reference ‖ disturbed reference), in nats per token."""
        self._amplified = {site.layer: _root_mean_square(seen, site.layer) for site in oracle.sites}

    def measure(self, places: Places) -> None:
        """Look at some tokens themselves, those that were not looked at yet."""
        unknown = {
            prompt: [at for at in positions if prompt.ids[: at + 1] not in self._tokens]
            for prompt, positions in places.items()
        }
        self._look({prompt: positions for prompt, positions in unknown.items() if positions})

    def at(self, prompt: Prompt, position: int) -> float:
        """How far one rounding moves a token's logits; what is typical where it is not more, or
        where the token was not looked at.
        """
        return max(self.typical, self._tokens.get(prompt.ids[: position + 1], 0.0))

    def nearby(self, batch: Batch) -> Nearby:
        """What is known of a batch's tokens from the reference's last forward, which was of it."""
        fired = self.oracle.last_fired
        assert fired is not None
        return Nearby(self._edges(batch), fired.cpu())

    def _edges(self, batch: Batch) -> Tensor:
        """How close the nearest gate is to its other side: [batch, seq], in roundings. Infinite at
        padding.
        """
        import torch

        nearest = torch.full(batch.input_ids.shape, torch.inf, dtype=torch.float64)
        for layer, gates in self.oracle.last_gates.items():
            rounding = self.epsilon * self._amplified[layer] * gates.spread
            found = gates.margin.abs() / rounding
            nearest = nearest.minimum(found.nan_to_num(nan=0.0).amin(dim=-1).cpu())
        return nearest.masked_fill(~batch.attention_mask.bool(), torch.inf)

    def smallest_fault(self, prompts: Sequence[Prompt]) -> float | None:
        """The smallest share of what the clamp does to the logits that would be out of tolerance if
        it were missing: the median over the tokens of some prompts on which the clamp fired.
        """
        import torch

        if self._smallest_fault is not None:
            return self._smallest_fault
        base = HookedRunner("base", self.oracle.model)

        def shares(batch: Batch) -> list[float]:
            inputs = (batch.input_ids, batch.attention_mask)

            def fired(_: object = None) -> Tensor:  # on the rows that were shown last
                assert self.oracle.last_fired is not None
                return self.oracle.last_fired.cpu()

            edited = self._runner.read(*inputs, fired, batch.scored & False).logits
            places = fired()
            effect = max_abs_difference(edited, base.logits(*inputs, places))
            found = []
            for (row, column), here in zip(places.nonzero().tolist(), effect.tolist(), strict=True):
                prompt = batch.prompts[row]
                position = column - (places.shape[1] - len(prompt.ids))
                found.append(BAR * self.at(prompt, position) / max(here, 1e-300))
            return found

        found: list[float] = []
        for batch in self._material.batches(_first_tokens(prompts)):
            name = f"smallest fault {self.name} {batch.digest}"
            found += self._journal.once(name, partial(shares, batch))
        self._smallest_fault = float(torch.tensor(found).median()) if found else None
        return self._smallest_fault

    def _look(self, places: Places) -> list[_Seen]:
        """Disturb the reference on some prompts, read as far as the last place in them."""
        seen = []
        known: dict[Prompt, list[int]] = {}
        for prompt, positions in places.items():  # those that begin alike may be one by now
            wanted = known.setdefault(_until(prompt, positions), [])
            wanted[:] = sorted({*wanted, *positions})
        batches, pieces = list(self._material.batches(list(known))), []
        for batch in batches:
            looked_at = [known[prompt] for prompt in batch.prompts]
            at = hashlib.sha256(repr(looked_at).encode()).hexdigest()[:16]
            name = f"sensitivity {self.name} {batch.digest} {at}"
            pieces.append((name, partial(self._disturb, batch, looked_at)))
        self._journal.shared.ahead(dict(pieces))
        for batch, (name, disturb) in zip(batches, pieces, strict=True):
            found = _Seen(**self._journal.shared.once(name, disturb))
            for prompt, moved in zip(batch.prompts, found.tokens, strict=True):
                for position, far in zip(known[prompt], moved, strict=True):
                    self._tokens[prompt.ids[: position + 1]] = far
            seen.append(found)
        return seen

    def _disturb(self, batch: Batch, places: Sequence[Sequence[int]]) -> dict[str, Any]:
        """What `_Seen` holds, of one batch and places in its prompts."""
        import torch

        real = batch.attention_mask.bool()
        wanted = torch.zeros_like(real)
        for row, (prompt, positions) in enumerate(zip(batch.prompts, places, strict=True)):
            wanted[row, torch.tensor(positions) + (real.shape[1] - len(prompt.ids))] = True
        inputs = (batch.input_ids, batch.attention_mask, wanted)
        logits, gates = self._runner.logits(*inputs), dict(self.oracle.last_gates)
        moved = torch.zeros(len(logits))
        kl = 0.0
        shifts = {str(layer): [0.0, 0.0] for layer in gates}
        for draw in range(DRAWS):
            with self.oracle.disturbed(draw, self.epsilon):
                other = self._runner.logits(*inputs)
            found = compare_logits(logits, other)
            own = self.epsilon * found.largest  # the logits are rounded too
            moved = moved.maximum(found.distance).maximum(own)
            kl += float(found.kl.sum())
            for layer, before in gates.items():
                shift = self.oracle.last_gates[layer].margin - before.margin
                kept = (shift / (self.epsilon * before.spread))[real.to(shift.device)]
                kept = kept[kept.isfinite()]  # an exempt token's gates never are
                shifts[str(layer)][0] += float(kept.square().sum())
                shifts[str(layer)][1] += kept.numel()
        moved = moved.nan_to_num(nan=0.0, posinf=0.0)
        tokens = [
            of.tolist() for of in torch.split(moved, [len(positions) for positions in places])
        ]
        return {"tokens": tokens, "kl": kl, "gates": shifts}


def sample(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Prompts evenly from all that are compared at every token."""
    asked = [prompt for prompt in prompts if prompt.every_token] or list(prompts)
    total = sum(len(prompt.ids) for prompt in asked)
    n_tokens = min(MOST_SAMPLED, max(FEWEST_SAMPLED, SAMPLED_SHARE * total))
    step = max(1.0, total / n_tokens)
    return [asked[int(i * step)] for i in range(int((len(asked) - 1) / step) + 1)]


def _places(prompts: Sequence[Prompt], vocab_size: int) -> Places:
    """The tokens of a sample: of a large vocabulary, evenly some of them."""
    n_tokens = sum(len(prompt.ids) if prompt.every_token else 1 for prompt in prompts)
    step = max(1, math.ceil(n_tokens * vocab_size / SAMPLED_LOGITS))
    return {
        prompt: range(
            (len(prompt.ids) - 1) % step if prompt.every_token else len(prompt.ids) - 1,
            len(prompt.ids),
            step,
        )
        for prompt in prompts
    }


def _until(prompt: Prompt, positions: Sequence[int]) -> Prompt:
    """A prompt as far as the last of some positions: what follows does not move them."""
    return replace(prompt, ids=prompt.ids[: positions[-1] + 1], every_token=True, choice=None)


def _first_tokens(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The first of some prompts, about `EXAMPLE_TOKENS` tokens."""
    chosen: list[Prompt] = []
    for prompt in prompts:
        if chosen and sum(len(of.ids) for of in [*chosen, prompt]) > EXAMPLE_TOKENS:
            continue
        chosen.append(replace(prompt, every_token=True, choice=None))
    return chosen


def _root_mean_square(seen: Sequence[_Seen], layer: int) -> float:
    """By how much what lies before a clamp amplifies the rounding of what it reads; at least 1."""
    squares = sum(found.gates[str(layer)][0] for found in seen)
    n = sum(found.gates[str(layer)][1] for found in seen)
    return max(1.0, (squares / n) ** 0.5) if n else 1.0
