"""An engine's distances to its reference, token by token, against what one rounding moves.

Every token's largest |Δlogit| is divided by the token's own sensitivity to rounding. To measure
that for all of them would cost several runs of the reference, so it is measured where it decides:
no token is held to less than what is typical, and those that are furthest beyond that are looked at
themselves, worst first, until no other can be worse or all others are near.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bake.questions.prompts import Batch, Prompt
from bake.rounding import BAR
from verify.compare.sensitivity import Nearby, Sensitivity
from verify.report.findings import Flip, Rounding, WorstItem

if TYPE_CHECKING:
    from torch import Tensor

AT_ONCE = 8
"""How many prompts are looked at together."""
MOST_LOOKED = 32
"""Most prompts that are looked at for one engine."""
ENOUGH = BAR / 2
"""A token this near, in roundings, need not be looked at."""
HOPELESS = 10 * BAR
"""A token this far out settles it: nobody looks for a worse one."""


@dataclass
class Distances:
    """One engine's, collected batch by batch."""

    sensitivity: Sensitivity
    """Of its reference, to roundings of the engine's size."""
    n_tokens: int = 0
    """That are judged: all but those that are apart."""
    n_fired: int = 0
    """Of these, on how many a clamp acted."""
    total_kl: float = 0.0
    """Of these."""
    n_apart: int = 0
    """Edge tokens, and what follows them."""
    max_apart: float = 0.0
    """Largest |Δlogit| there."""
    worst: tuple[Prompt, int, float] | None = None
    """(prompt, position, |Δlogit|) of the judged token that is furthest from the reference."""
    beyond: dict[tuple[Prompt, int], float] = field(default_factory=dict)
    """|Δlogit| of the judged tokens that are further from it than is typical of one rounding."""
    edge: set[tuple[Prompt, int]] = field(default_factory=set)
    """Where answers are predicted, and apart."""
    choices: dict[tuple[Prompt, int], float] = field(default_factory=dict)
    """The same as `beyond` of choices' tokens, whose losses are known but not their logits: at
    least how far these are from the reference."""

    def found(
        self, batch: Batch, places: Tensor, differences: Tensor, kl: Tensor, nearby: Nearby
    ) -> list[Any]:
        """What some tokens show, as JSON data; changes nothing.

        Args:
            batch: that they are of.
            places: [n, 2], (row, column) in the batch.
            differences: [n] largest |Δlogit|.
            kl: [n] nats.
            nearby: of the batch.
        """
        rows, columns = places.unbind(-1)
        apart = nearby.apart[rows, columns]
        judged = ~apart
        tokens = []
        further = judged & (differences > self.sensitivity.typical)
        for index in further.nonzero().flatten().tolist():
            row, position = place_in_prompt(batch, *places[index].tolist())
            tokens.append([row, position, float(differences[index])])
        worst = None
        if judged.any():
            index = int(differences.masked_fill(apart, -1.0).argmax())
            row, position = place_in_prompt(batch, *places[index].tolist())
            worst = [row, position, float(differences[index])]
        final = batch.input_ids.shape[1] - 1
        ends = [row for row, column in places[apart].tolist() if column == final]
        return [
            int(judged.sum()),
            int((judged & nearby.fired[rows, columns]).sum()),
            float(kl[judged].sum()),
            int(apart.sum()),
            float(differences[apart].max()) if apart.any() else 0.0,
            worst,
            tokens,
            ends,
        ]

    def take(self, batch: Batch, found: Sequence[Any]) -> None:
        """Take in what `found` gave."""
        n_tokens, n_fired, kl, n_apart, max_apart, worst, tokens, ends = found
        self.n_tokens += n_tokens
        self.n_fired += n_fired
        self.total_kl += kl
        self.n_apart += n_apart
        self.max_apart = max(self.max_apart, max_apart)
        if worst is not None and (self.worst is None or worst[2] > self.worst[2]):
            self.worst = (batch.prompts[worst[0]], worst[1], worst[2])
        for row, position, distance in tokens:
            place = (batch.prompts[row], position)
            self.beyond[place] = max(distance, self.beyond.get(place, 0.0))
        self.edge |= {(batch.prompts[row], len(batch.prompts[row].ids) - 1) for row in ends}

    def choices_found(
        self, batch: Batch, ours: Tensor, theirs: Tensor, nearby: Nearby
    ) -> list[Any]:
        """What the losses of choices' tokens show, as JSON data; changes nothing.

        Args:
            batch: of choices.
            ours: [m] nats, the reference's.
            theirs: [m] nats.
            nearby: of the batch.
        """
        places = batch.scored.nonzero()
        # A loss is a difference of two terms, each of which moves by at most as much as a logit.
        differences = ((ours - theirs).abs() / 2).nan_to_num(nan=math.inf, posinf=math.inf)
        apart = nearby.apart[places[:, 0], places[:, 1]]
        further = ~apart & (differences > self.sensitivity.typical)
        tokens = [
            [*place_in_prompt(batch, *places[index].tolist()), float(differences[index])]
            for index in further.nonzero().flatten().tolist()
        ]
        return [tokens, [list(place_in_prompt(batch, *at)) for at in places[apart].tolist()]]

    def take_choices(self, batch: Batch, found: Sequence[Any]) -> None:
        """Take in what `choices_found` gave."""
        tokens, apart = found
        for row, position, distance in tokens:
            self.choices[batch.prompts[row], position] = distance
        self.edge |= {(batch.prompts[row], position) for row, position in apart}

    # ----------------------------------------------------------------------- the result

    def result(
        self,
        flips: Sequence[Flip],
        prompts: Mapping[tuple[str, str, int], Sequence[Prompt]],
        examples: Sequence[Prompt],
        tokenizer: Any,
    ) -> Rounding:
        """The finished comparison. Looks at some prompts of the reference itself.

        Args:
            flips: answers that differ.
            prompts: those that ask a question, by source, form and row.
            examples: prompts on which a clamp fired.
            tokenizer: names the worst token.
        """
        worst, place, distance = self._worst()
        flipped = [prompts[flip.source, flip.form, flip.row] for flip in flips]
        answers = [[(of, at) for of in asked for at in of.answer_places] for asked in flipped]
        self._look_at_choices([place for places in answers for place in places])
        edge = [any(place in self.edge for place in places) for places in answers]
        far = [any(self.roundings(*place) > BAR for place in places) for places in answers]
        kl = self.total_kl / self.n_tokens if self.n_tokens else 0.0
        kl = math.inf if math.isnan(kl) else kl
        return Rounding(
            unit=self.sensitivity.epsilon,
            sensitivity=self.sensitivity.typical,
            sensitivity_kl=self.sensitivity.mean_kl,
            tokens=self.n_tokens,
            tokens_fired=self.n_fired,
            worst=worst,
            at=None if place is None else worst_item(*place, distance, tokenizer),
            mean_kl=kl,
            flips=sum(out and not at for out, at in zip(far, edge, strict=True)),
            edge_tokens=self.n_apart,
            edge_max_abs_logit=self.max_apart,
            edge_flips=sum(edge),
            smallest_fault=self.sensitivity.smallest_fault(examples),
        )

    def roundings(self, prompt: Prompt, position: int) -> float:
        """A judged token's distance, in roundings; 0 where it is not beyond what is typical."""
        at = (prompt, position)
        distance = self.beyond.get(at, self.choices.get(at, 0.0))
        return distance / self.sensitivity.at(prompt, position)

    def _look_at_choices(self, places: Sequence[tuple[Prompt, int]]) -> None:
        """Look at some tokens of choices themselves, where that may decide."""
        bounds = (BAR * self.sensitivity.typical, HOPELESS * self.sensitivity.typical)
        looked: dict[Prompt, list[int]] = {}
        for prompt, position in places:
            if bounds[0] < self.choices.get((prompt, position), 0.0) < bounds[1]:
                looked.setdefault(prompt, []).append(position)
        if looked:
            self.sensitivity.measure(dict(list(looked.items())[:MOST_LOOKED]))

    def _worst(self) -> tuple[float, tuple[Prompt, int] | None, float]:
        """(distance in roundings, where, |Δlogit|) of the token that is furthest out."""
        if self.worst is None:
            return 0.0, None, 0.0
        prompt, position, distance = self.worst
        if not self.beyond:
            return distance / self.sensitivity.typical, (prompt, position), distance
        typical = self.sensitivity.typical
        far = {place: of for place, of in self.beyond.items() if of > ENOUGH * typical}
        places: dict[Prompt, list[int]] = {}
        for prompt, position in sorted(far, key=lambda place: -far[place]):
            places.setdefault(prompt, []).append(position)
        waiting = list(places)[:MOST_LOOKED]  # the prompts, the one that may be worst first
        worst = 0.0
        for start in range(0, len(waiting), AT_ONCE):
            looked = waiting[start : start + AT_ONCE]
            if worst > HOPELESS or far[looked[0], places[looked[0]][0]] <= worst * typical:
                break
            self.sensitivity.measure({prompt: sorted(places[prompt]) for prompt in looked})
            found = [self.roundings(prompt, at) for prompt in looked for at in places[prompt]]
            worst = max(worst, *found)
        at = max(self.beyond, key=lambda place: self.roundings(*place))
        return self.roundings(*at), at, self.beyond[at]


def place_in_prompt(batch: Batch, row: int, column: int) -> tuple[int, int]:
    """(row, position from BOS) of a column of a batch; its padding stands in front."""
    return row, column - (batch.input_ids.shape[1] - len(batch.prompts[row].ids))


def worst_item(prompt: Prompt, position: int, distance: float, tokenizer: Any) -> WorstItem:
    """A token, as a report names it."""
    return WorstItem(
        source=prompt.source,
        form=prompt.form,
        row=prompt.row,
        position=position,
        token=tokenizer.convert_ids_to_tokens(prompt.ids[position]),
        abs_logit=distance,
    )
