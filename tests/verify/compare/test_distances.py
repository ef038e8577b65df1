"""The worst token, found without looking at every one."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from bake.questions.prompts import Batch, Choice, Prompt, left_padded
from bake.rounding import BAR
from tests.logits import PARITY_VOCAB, TokenNames, forget_prompt, random_logits
from verify.compare.distances import ENOUGH, MOST_LOOKED, Distances
from verify.compare.parity_sum import ParitySum
from verify.compare.sensitivity import Nearby
from verify.report.findings import Flip, Rounding


class Known:
    """A sensitivity of which every token's own is known, but told only where it is looked at."""

    name, epsilon, mean_kl = "reference", 2.0**-24, 1e-9

    def __init__(self, own: float = 1.0, typical: float = 1.0) -> None:
        self.own, self.typical = own, typical
        self.looked: dict[Prompt, list[int]] = {}

    def measure(self, places: Mapping[Prompt, Sequence[int]]) -> None:
        for prompt, positions in places.items():
            assert list(positions) == sorted(set(positions)) and prompt not in self.looked
            self.looked[prompt] = list(positions)

    def at(self, prompt: Prompt, position: int) -> float:
        known = position in self.looked.get(prompt, [])
        return max(self.typical, self.own * (1 + prompt.row % 3) if known else 0.0)

    def smallest_fault(self, prompts: Sequence[Prompt]) -> float | None:
        return None


def batch_of(n: int, length: int = 5, *, last_only: bool = False) -> Batch:
    prompts = [forget_prompt(row + 1, (2, *range(40, 38 + length), row % 50)) for row in range(n)]
    return left_padded(prompts, pad_id=0, last_only=last_only)


def nearby(batch: Batch, *edges: tuple[int, int]) -> Nearby:
    distance = torch.full(batch.input_ids.shape, torch.inf)
    for place in edges:
        distance[place] = BAR
    return Nearby(distance, torch.ones(batch.input_ids.shape, dtype=torch.bool))


def add(
    parity: ParitySum, batch: Batch, reference: torch.Tensor, engine: torch.Tensor, known: Nearby
) -> None:
    wanted = batch.wanted
    parity.take(batch, parity.found(batch, wanted, reference[wanted], engine[wanted], known))


def judged(
    known: Known, batch: Batch, errors: dict[tuple[int, int], float], *edges: tuple[int, int]
) -> tuple[Rounding, ParitySum]:
    """An engine whose logits are off at some places of a batch."""
    reference = random_logits(*batch.input_ids.shape, PARITY_VOCAB)
    engine = reference.clone()
    for (row, column), error in errors.items():
        engine[row, column, 3] = engine[row, column, 3] + error
    sensitivity: Any = known
    parity = ParitySum(distances=Distances(sensitivity))
    add(parity, batch, reference, engine, nearby(batch, *edges))
    assert parity.distances is not None
    prompts = {(of.source, of.form, of.row): [of] for of in batch.prompts}
    flips = [Flip("forget", "chat", 1, "?", "A", "B", "A")]
    return parity.distances.result(flips, prompts, [], TokenNames()), parity


def test_the_worst_is_the_one_of_all_tokens_not_the_one_with_the_largest_distance() -> None:
    known, batch = Known(own=4.0), batch_of(12)
    errors = {(row, 2): 20.0 + row for row in range(12)}
    found, _ = judged(known, batch, errors)
    worst = max(error / (4.0 * (1 + (row + 1) % 3)) for (row, _), error in errors.items())
    assert found.worst == pytest.approx(worst, rel=1e-5)
    assert found.at is not None and (found.at.row - 1) % 3 == 2 and found.at.position == 2
    assert found.at.abs_logit == pytest.approx(found.worst * 4.0, rel=1e-5)


def test_nobody_looks_where_all_are_near() -> None:
    known, batch = Known(), batch_of(40)
    near = 0.999 * ENOUGH
    found, _ = judged(known, batch, {(row, 1): near - 0.01 * row for row in range(40)})
    assert known.looked == {} and found.worst == pytest.approx(near, rel=1e-5)
    found, _ = judged(known, batch, {(3, 1): 0.5})
    assert found.worst == pytest.approx(0.5, rel=1e-5)
    assert found.at is not None and (found.at.row, found.at.position) == (4, 1)


def test_only_what_is_far_is_looked_at_and_only_there() -> None:
    known, batch = Known(own=2.0), batch_of(4)
    errors = {(0, 1): 9.0, (0, 3): 3.9, (1, 4): 30.0, (1, 2): 29.0, (3, 3): 3.5}
    found, _ = judged(known, batch, errors)
    assert known.looked == {batch.prompts[0]: [1], batch.prompts[1]: [2, 4]}
    # Prompt 2's own sensitivity is 6, prompt 1's is 4: there its near token is left at what is
    # typical, which is 1.
    assert found.worst == pytest.approx(30.0 / 6, rel=1e-5)
    assert found.at is not None and (found.at.row, found.at.position) == (2, 4)
    known = Known(own=10.0)
    found, _ = judged(known, batch, errors)
    assert found.worst == pytest.approx(3.9, rel=1e-5)  # the far ones are nearer than that one
    assert found.at is not None and (found.at.row, found.at.position) == (1, 3)


def test_a_hopeless_one_is_looked_at_once_and_a_crowd_not_for_ever() -> None:
    known, batch = Known(), batch_of(2 * MOST_LOOKED)
    found, _ = judged(known, batch, {(row, 1): 1e5 for row in range(2 * MOST_LOOKED)})
    assert found.worst >= 1e5 / 3 and len(known.looked) <= 8
    known = Known(own=1e3)
    found, _ = judged(known, batch, {(row, 1): 50.0 for row in range(2 * MOST_LOOKED)})
    assert len(known.looked) == MOST_LOOKED and found.worst == pytest.approx(50.0, rel=1e-5)


def test_edge_tokens_and_what_follows_them_are_counted_apart() -> None:
    batch = batch_of(4)
    found, parity = judged(Known(), batch, {(1, 2): 70.0, (1, 4): 90.0, (1, 1): 4.5}, (1, 2))
    assert (found.tokens, found.edge_tokens) == (17, 3)
    assert found.edge_max_abs_logit == pytest.approx(90.0, rel=1e-5)
    assert parity.max_abs_logit == pytest.approx(90.0, rel=1e-5) and parity.n_tokens == 20
    assert found.worst == pytest.approx(4.5 / 3, rel=1e-5)  # its own sensitivity is 3
    assert found.at is not None and (found.at.row, found.at.position) == (2, 1)
    assert found.tokens_fired == 17


def test_flips_are_explained_by_their_own_token() -> None:
    batch = batch_of(3)
    assert judged(Known(), batch, {(0, 4): 1.0})[0].flips == 0
    assert judged(Known(own=0.0), batch, {(0, 4): 9.0})[0].flips == 1
    found, _ = judged(Known(), batch, {(0, 4): 9.0}, (0, 3))
    assert (found.flips, found.edge_flips) == (0, 1)


@pytest.mark.parametrize(
    ("errors", "edges", "own", "flips", "edge_flips"),
    [
        ({(1, 2): 1.9 * BAR}, (), 0.0, 0, 0),  # a loss moves by up to twice what a logit does
        ({(1, 2): 2.1 * BAR}, (), 0.0, 1, 0),
        ({(1, 2): -2.1 * BAR}, (), 0.0, 1, 0),
        ({(3, 3): math.nan}, (), 0.0, 1, 0),
        ({(1, 2): 2.1 * BAR}, (), 2.0, 0, 0),  # the token itself is more sensitive
        ({(5, 2): 2.1 * BAR}, (), 0.0, 0, 0),  # of another question
        ({(1, 3): 2.1 * BAR}, ((1, 2),), 0.0, 0, 1),
        ({(1, 3): 2.1 * BAR}, ((5, 2),), 0.0, 1, 0),
    ],
)
def test_flips_of_choices_are_explained_by_any_token_of_theirs(
    errors: dict[tuple[int, int], float],
    edges: tuple[tuple[int, int], ...],
    own: float,
    flips: int,
    edge_flips: int,
) -> None:
    prompts = [
        Prompt(
            *("forget", "cloze", 1 + row // 4, (2, 50 + row, 60, 70, 80)),
            every_token=False,
            item=row // 4,
            choice=Choice(row % 4, n_tokens=2, n_characters=5),
        )
        for row in range(8)
    ]
    batch, known = left_padded(prompts, pad_id=0, last_only=True), Known(own)
    sensitivity: Any = known
    parity = ParitySum(distances=Distances(sensitivity))
    rows, columns = batch.scored.nonzero().unbind(-1)
    reference = torch.rand(len(rows), dtype=torch.float64)
    engine = reference.clone()
    for (row, column), error in errors.items():
        engine[(rows == row) & (columns == column)] += error
    parity.take(
        batch,
        json.loads(
            json.dumps(parity.found(batch, batch.wanted, reference, engine, nearby(batch, *edges)))
        ),
    )
    asked = {("forget", "cloze", 1): prompts[:4], ("forget", "cloze", 2): prompts[4:]}
    flip = Flip("forget", "cloze", 1, "?", "A", "B", "A")
    assert parity.distances is not None
    found = parity.distances.result([flip], asked, [], TokenNames())
    assert (found.flips, found.edge_flips) == (flips, edge_flips)
    assert (found.tokens, found.worst, parity.n_tokens) == (0, 0.0, 0)  # no logits were compared
    if own:
        assert known.looked == {prompts[1]: [2]}


def test_the_last_token_is_the_last_position() -> None:
    batch = batch_of(3, last_only=True)
    sensitivity: Any = Known(own=0.0)
    parity = ParitySum(distances=Distances(sensitivity))
    reference = random_logits(3, 5, PARITY_VOCAB)
    engine = reference.clone()
    engine[2, 4, 1] += 12.0
    engine[:, :4] += 50.0 * random_logits(3, 4, PARITY_VOCAB)
    add(parity, batch, reference, engine, nearby(batch))
    assert parity.distances is not None
    found = parity.distances.result([], {}, [], TokenNames())
    assert found.worst == pytest.approx(12.0, rel=1e-5)
    assert found.at is not None and (found.at.row, found.at.position) == (3, 4)


def test_what_is_not_finite_is_infinitely_far() -> None:
    found, _ = judged(Known(), batch_of(2), {(0, 1): math.nan})
    assert found.worst == found.mean_kl == math.inf
    assert found.at is not None and found.at.abs_logit == math.inf
