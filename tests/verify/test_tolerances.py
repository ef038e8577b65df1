"""What is out of tolerance: by what was measured of rounding, never by a constant on a logit."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from bake.rounding import BAR, EPSILON
from tests.reports import FLIP, ROUNDING, full_report
from verify.compare.loss_split import LossHistogram, LossPart, LossSplit
from verify.engines.engine_names import engine_of
from verify.report.findings import EngineReport, Failure, Parity, Witnessed
from verify.report.measures import LossAdded
from verify.tolerances import (
    TYPICAL_BAR,
    kl_bar,
    loss_failures,
    parity_failures,
    silent_clamps,
    unit_of,
    unlearning_failures,
    witness_failures,
)

BF16 = replace(ROUNDING, unit=EPSILON["bfloat16"], sensitivity=0.2, sensitivity_kl=1e-3)
PARITY = Parity(3.0, 30.0, 2e-6, 0.99, 1000, 45, None, (FLIP,), rounding=ROUNDING)


def what(engine: str = "checkpoint", **changes: Any) -> list[tuple[Any, ...]]:
    rounding = replace(ROUNDING, **changes)
    found = parity_failures(engine, replace(PARITY, rounding=rounding), 12)
    return [(failure.what, failure.measured, failure.bar) for failure in found]


def test_what_rounding_explains_passes_wherever_it_was_measured() -> None:
    assert what() == what(worst=BAR) == what(mean_kl=kl_bar(ROUNDING)) == []
    assert what(worst=0.0, at=None) == []
    # Another machine's float32 is ten times as sensitive: the same ratio, the same verdict.
    assert what(sensitivity=1e-4, at=replace(ROUNDING.at, abs_logit=4e-4)) == []  # type: ignore[type-var]


def test_a_token_further_out_fails_in_logits_and_names_its_place() -> None:
    (found,) = what(worst=80.0)
    assert found == ("max_abs_logit", 4e-5, pytest.approx(4e-6))
    (failure,) = parity_failures(
        "checkpoint", replace(PARITY, rounding=replace(ROUNDING, worst=80.0)), 12
    )
    assert str(failure).endswith('worst at retain row 7 (plain), token 12 "▁the", 80 roundings')
    (found,) = what(worst=math.inf, at=replace(ROUNDING.at, abs_logit=math.inf))  # type: ignore[type-var]
    assert found == ("max_abs_logit", math.inf, BAR * 1e-5)


def test_the_average_fails_where_no_token_does() -> None:
    bar = TYPICAL_BAR**2 * 1e-12
    assert what(mean_kl=1.1 * bar) == [("mean_kl", 1.1 * bar, bar)]
    assert what(mean_kl=math.inf) == [("mean_kl", math.inf, bar)]


def test_flips_that_rounding_does_not_explain_fail() -> None:
    assert what(flips=2) == [("answer_flips", 2, 0)]


def test_too_many_edge_tokens_are_a_failure_of_their_own() -> None:
    (found,) = what(tokens=400, edge_tokens=600)
    assert found == ("tokens within rounding of a gate's edge, or after one", 600, 500)
    # In 16 bits that is no news: all tokens are averaged, and float32 is looked at, too.
    parity = replace(PARITY, rounding=replace(BF16, tokens=10, edge_tokens=990), mean_kl=8e-3)
    exact = replace(ROUNDING, worst=9.0)
    assert list(parity_failures("checkpoint", parity, 12)) == []
    (failure,) = parity_failures("checkpoint", replace(parity, float32=exact), 12)
    assert failure.what == "max_abs_logit, in float32"
    (failure,) = parity_failures("checkpoint", replace(parity, mean_kl=1e-2), 12)
    assert (failure.what, failure.bar) == ("mean_kl", kl_bar(BF16))


def test_nothing_that_fired_was_judged() -> None:
    (found,) = what(tokens_fired=0)
    assert found == ("tokens_fired away from a gate's edge", 0, "at least 1")


def test_compiled_layers_have_edges_of_their_own() -> None:
    parity = replace(PARITY, flips=(FLIP,) * 3)
    assert list(parity_failures("compiled", parity, 150)) == []
    (failure,) = parity_failures("compiled", parity, 149)
    assert (failure.what, failure.measured, failure.bar) == ("answer_flips", 3, 2)
    assert list(parity_failures("compiled", replace(parity, flips=(FLIP,)), 1)) == []
    assert list(parity_failures("checkpoint", parity, 1)) == []


def test_a_reference_is_not_judged() -> None:
    assert list(parity_failures("reference", replace(PARITY, rounding=None), 12)) == []


def test_which_engines_are_held_and_what_their_rounding_is() -> None:
    names = ("checkpoint", "onnx", "compiled", "adapter", "onnx-fp16", "onnx-int4", "base")
    assert [engine_of(name).held for name in names] == [True] * 4 + [False] * 3
    assert unit_of("onnx", "float32") == unit_of("checkpoint", "float32") == EPSILON["float32"]
    assert unit_of("compiled", "bfloat16") == EPSILON["bfloat16"]
    assert unit_of("onnx-fp16", "float32") == EPSILON["float16"]
    assert unit_of("onnx-int4", "float32") == EPSILON["int4"]


@pytest.mark.parametrize(("right", "n", "fails"), [(3, 8, False), (4, 8, True), (26, 100, True)])
def test_rounded_weights_may_remember_an_answer_more(right: int, n: int, fails: bool) -> None:
    reference = full_report().engines[1]
    was = 2 / 8 if n == 8 else 20 / 100
    sides = [
        replace(reference, name=name, forget=replace(reference.forget, plain=share, chat=0.0))  # type: ignore[type-var]
        for name, share in (("reference", was), ("onnx-int8", right / n))
    ]
    assert bool(unlearning_failures(sides[1], sides[0], n)) is fails


def test_loss_before_any_firing_may_move_by_rounding_only() -> None:
    def failures(largest: float) -> list[Failure]:
        before, after = LossPart(10, 0.0, largest), LossPart(1, 0.5, 0.5)
        detail = LossAdded(LossSplit(before, after), LossHistogram(), rounding=1e-3)
        return list(loss_failures(EngineReport("checkpoint", loss_detail=detail)))

    assert failures(0.0) == failures(1e-3) == []
    assert [failure.bar for failure in failures(1.1e-3)] == [1e-3]
    assert failures(math.nan)


def test_witnesses_are_held_to_what_was_measured_at_export() -> None:
    seen = Witnessed(tokens=12, max_abs_logit=8e-5, sensitivity=1e-5, effect=1.0)
    assert list(witness_failures("checkpoint", seen, "layer")) == []
    further = replace(seen, max_abs_logit=8.1e-5)
    (failure,) = witness_failures("checkpoint", further, "layer")
    assert (failure.what, failure.bar) == ("max_abs_logit", BAR * 1e-5)
    for engine, carrier in (("onnx-int4", "layer"), ("compiled", "compiled")):
        assert list(witness_failures(engine, further, carrier)) == []
    assert list(witness_failures("onnx-int4", replace(seen, effect=0.4), "layer"))
    assert list(witness_failures("checkpoint", replace(seen, effect=math.nan), "layer"))


def test_a_clamp_that_never_fired_is_a_failure() -> None:
    failures = silent_clamps([(3, 12), (5, 0)])
    assert [(f.kind, f.what, f.measured) for f in failures] == [
        ("parity", "tokens_fired at layer 5", 0)
    ]
