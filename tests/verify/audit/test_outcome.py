"""The worst case of a sweep, its interval, and what stands beside it."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from statistics import mean, stdev

import pytest

from verify.audit.attempts import Attempt, Need, Scores
from verify.audit.outcome import comes_back, interval_over, sweeps_of, told_by
from verify.report.intervals import wilson
from verify.report.measures import Share

BEFORE = Scores({"chat": Share(12, 40)}, {"chat": Share(50, 50)})


def attempt(
    name: str, right: int, *, kept: int = 50, steps: int = 10, seed: int = 0, **more: object
) -> Attempt:
    scores = Scores({"chat": Share(right, 40)}, {"chat": Share(kept, 50)})
    return Attempt(name, "tries {steps} steps", scores, steps=steps, seed=seed, **more)  # type: ignore[arg-type]


def test_the_worst_keeps_utility() -> None:
    attempts = [
        attempt("a", 20, steps=10),
        attempt("a", 30, steps=50),
        attempt("a", 40, steps=150, kept=40),  # 0.8 of what was
    ]
    (sweep,) = sweeps_of(attempts, BEFORE, "chat")
    assert sweep.worst is not None
    assert (sweep.worst.steps, sweep.worst.right) == (50, Share(30, 40))
    assert [point.keeps for point in sweep.curve] == [True, True, False]
    assert sweep.does == "tries 50 steps"
    (useless,) = sweeps_of(attempts[2:], BEFORE, "chat")
    assert useless.worst is None
    assert useless.accuracy == 0


def test_one_useless_seed_makes_a_point_useless() -> None:
    attempts = [attempt("a", 40, seed=seed, kept=40 if seed == 2 else 50) for seed in range(3)]
    (sweep,) = sweeps_of(attempts, BEFORE, "chat")
    assert sweep.worst is None


def test_only_what_was_tried_with_all_seeds_counts() -> None:
    lucky = attempt("a", 39, settings={"rate": 1})
    sound = [attempt("a", 20 + seed, seed=seed, settings={"rate": 2}) for seed in range(3)]
    (sweep,) = sweeps_of([lucky, *sound], BEFORE, "chat")
    assert sweep.attempts == 4
    assert sweep.worst is not None
    assert sweep.worst.settings == {"rate": 2}
    assert (sweep.worst.right, sweep.worst.seeds) == (Share(63, 120), 3)


def test_the_same_attempt_made_twice_counts_once() -> None:
    (sweep,) = sweeps_of([attempt("a", 20), attempt("a", 20)], BEFORE, "chat")
    assert (sweep.attempts, sweep.curve[0].right) == (1, Share(20, 40))


@pytest.mark.parametrize(
    ("needs", "apart"), [("base", True), ("same facts", True), ("other facts", False)]
)
def test_what_needs_the_base_or_the_facts_stands_apart(needs: Need, apart: bool) -> None:
    (sweep,) = sweeps_of([attempt("a", 20, needs=(needs,))], BEFORE, "chat")
    assert sweep.apart == apart
    (control,) = sweeps_of([attempt("a", 20, control=True)], BEFORE, "chat")
    assert control.apart


def test_an_interval_is_the_wider_of_both() -> None:
    alike = [Share(20, 40)] * 3
    assert interval_over(alike) == wilson(60, 120)
    spread = [Share(10, 40), Share(20, 40), Share(30, 40)]
    each = [0.25, 0.5, 0.75]
    half = 4.303 * stdev(each) / 3**0.5
    low, high = interval_over(spread)
    assert low == max(0.0, mean(each) - half)
    assert high == min(1.0, mean(each) + half)
    for right, n in product((0, 3), (5, 9)):
        assert interval_over([Share(right, n)]) == wilson(right, n)


def test_back_is_what_lies_above_the_interval_before() -> None:
    (much,) = sweeps_of([attempt("a", 35)], BEFORE, "chat")
    (little,) = sweeps_of([attempt("a", 14)], BEFORE, "chat")
    assert much.worst is not None
    assert little.worst is not None
    assert comes_back(much.worst.interval, Share(12, 40), 0.25)
    assert not comes_back(little.worst.interval, Share(12, 40), 0.25)


def test_prompts_lead_where_they_tell_and_others_are_kept() -> None:
    few = {"chat": Share(1, 12)}
    base = Scores(few, {}, open=Share(32, 50), generic=Share(50, 60))
    before = Scores(few, {}, open=Share(9, 50), generic=Share(50, 60))
    assert told_by(base, before, "chat").lead == "open"
    for other in (None, Share(0, 60)):  # nothing tells whether a model is of use
        assert told_by(base, replace(before, generic=other), "chat").lead == "chat"
    asked = {"chat": Share(100, 120)}
    assert told_by(replace(base, forget=asked), before, "chat").lead == "chat"


def test_what_was_not_asked_makes_no_point() -> None:
    none = [
        Attempt("a", "", Scores(open=share), seed=n) for n, share in enumerate((None, Share(0, 0)))
    ]
    some = Attempt("a", "", Scores(open=Share(3, 4)), seed=2)
    (sweep,) = sweeps_of([*none, some], BEFORE, "open")
    assert sweep.worst is not None
    assert (sweep.worst.seeds, sweep.worst.right) == (1, Share(3, 4))
    (nothing,) = sweeps_of(none, BEFORE, "open")
    assert nothing.worst is None and not nothing.curve
