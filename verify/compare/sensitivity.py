"""How far one rounding moves a reference's logits: the scale by which distances are judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from bake.rounding import BAR, DRAWS
from verify.compare.logits import compare_logits, max_abs_difference
from verify.engines.runners import HookedRunner
from verify.journal import Journal

if TYPE_CHECKING:
    from torch import Tensor

    from bake.questions.prompts import Batch, Prompt
    from verify.material import Material
    from verify.reference.oracle import Oracle

SAMPLE_TOKENS = 1024
"""About how many tokens show how sensitive a reference is in general."""
LOOKED_DRAWS = 2 * DRAWS
"""How often the reference is disturbed on prompts that decide."""
TYPICAL = 0.9
"""The share of them that is less sensitive than the token that stands for all: whose own draws come
out small is not held to less, for a few draws are few."""


_Key = tuple[tuple[int, ...], bool]


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
    """Per prompt and token: how far one rounding moves its logits."""
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
        self._tokens: dict[_Key, list[float]] = {}
        self._looked: set[_Key] = set()
        self._batches = 0
        self._smallest_fault: float | None = None
        seen = self._look(sample(prompts), DRAWS)
        tokens = torch.tensor([token for found in seen for row in found.tokens for token in row])
        self.typical = max(float(tokens.quantile(TYPICAL)), 1e-30)
        """How far one rounding moves a token's logits; one token in ten is moved further."""
        self.largest = float(tokens.max())
        """How far it moves the most sensitive token that was looked at."""
        self.mean_kl = sum(found.kl for found in seen) / (DRAWS * len(tokens))
        """KL(reference ‖ disturbed reference), in nats per token."""
        self._amplified = {site.layer: _root_mean_square(seen, site.layer) for site in oracle.sites}

    def measure(self, prompts: Sequence[Prompt]) -> None:
        """Look at some prompts themselves, those that were not looked at yet."""
        self._look([of for of in prompts if _key(of) not in self._looked], LOOKED_DRAWS)

    def at(self, prompt: Prompt, position: int) -> float:
        """How far one rounding moves a token's logits; what is typical where it is not more, or
        where the prompt was not looked at.
        """
        own = self._tokens.get(_key(prompt))
        return self.typical if own is None else max(self.typical, own[position])

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
            inputs = (batch.input_ids, batch.attention_mask, batch.last_only)
            edited = self._runner.logits(*inputs)
            fired = self.oracle.last_fired
            assert fired is not None
            effect = max_abs_difference(edited, base.logits(*inputs))
            found = []
            for row, column in fired.cpu().nonzero().tolist():
                prompt = batch.prompts[row]
                position = column - (fired.shape[1] - len(prompt.ids))
                here = effect[row, 0 if batch.last_only else column]
                found.append(BAR * self.at(prompt, position) / max(float(here), 1e-300))
            return found

        found: list[float] = []
        for number, batch in enumerate(self._material.batches(prompts)):
            name = f"smallest fault {self.name} {number}"
            found += self._journal.once(name, partial(shares, batch))
        self._smallest_fault = float(torch.tensor(found).median()) if found else None
        return self._smallest_fault

    def _look(self, prompts: Sequence[Prompt], draws: int) -> list[_Seen]:
        """Disturb the reference on some prompts."""
        seen = []
        for batch in self._material.batches(prompts):
            name = f"sensitivity {self.name} {self._batches}"
            disturb = partial(self._disturb, batch, draws)
            found = _Seen(**self._journal.once(name, disturb))
            self._batches += 1
            for prompt, tokens in zip(batch.prompts, found.tokens, strict=True):
                self._tokens[_key(prompt)] = tokens
                if draws == LOOKED_DRAWS:
                    self._looked.add(_key(prompt))
            seen.append(found)
        return seen

    def _disturb(self, batch: Batch, draws: int) -> dict[str, Any]:
        """What `_Seen` holds, of one batch."""
        inputs = (batch.input_ids, batch.attention_mask, batch.last_only)
        logits, gates = self._runner.logits(*inputs), dict(self.oracle.last_gates)
        real = batch.attention_mask.bool()
        counted = real[:, -1:] if batch.last_only else real
        moved = logits.new_zeros(counted.shape)
        kl = 0.0
        shifts = {str(layer): [0.0, 0.0] for layer in gates}
        for draw in range(draws):
            with self.oracle.disturbed(draw, self.epsilon):
                other = self._runner.logits(*inputs)
            found = compare_logits(logits, other, counted)
            own = self.epsilon * found.largest  # the logits are rounded too
            moved[counted] = moved[counted].maximum(found.distance).maximum(own)
            kl += float(found.kl.sum())
            for layer, before in gates.items():
                shift = self.oracle.last_gates[layer].margin - before.margin
                kept = (shift / (self.epsilon * before.spread))[real.to(shift.device)]
                kept = kept[kept.isfinite()]  # an exempt token's gates never are
                shifts[str(layer)][0] += float(kept.square().sum())
                shifts[str(layer)][1] += kept.numel()
        moved = moved.nan_to_num(nan=0.0, posinf=0.0)
        if batch.last_only:
            tokens = [[0.0] * (len(p.ids) - 1) + [float(moved[row, 0])] for row, p in _rows(batch)]
        else:
            tokens = [moved[row, real[row]].tolist() for row, _ in _rows(batch)]
        return {"tokens": tokens, "kl": kl, "gates": shifts}


def sample(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Prompts evenly from all that are compared at every token, about `SAMPLE_TOKENS` tokens."""
    asked = [prompt for prompt in prompts if prompt.every_token] or list(prompts)
    total = sum(len(prompt.ids) for prompt in asked)
    step = max(1.0, total / SAMPLE_TOKENS)
    return [asked[int(i * step)] for i in range(int((len(asked) - 1) / step) + 1)]


def _key(prompt: Prompt) -> _Key:
    return prompt.ids, prompt.every_token


def _rows(batch: Batch) -> list[tuple[int, Prompt]]:
    return list(enumerate(batch.prompts))


def _root_mean_square(seen: Sequence[_Seen], layer: int) -> float:
    """By how much what lies before a clamp amplifies the rounding of what it reads; at least 1."""
    squares = sum(found.gates[str(layer)][0] for found in seen)
    n = sum(found.gates[str(layer)][1] for found in seen)
    return max(1.0, (squares / n) ** 0.5) if n else 1.0
