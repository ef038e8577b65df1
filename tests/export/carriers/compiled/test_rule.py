"""The rule that chooses the layers' numbers, and the bound of what they leave."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bake.errors import ExportError
from export.carriers.compiled.rule import (
    Measured,
    choose_setting,
    error_bound,
    largest_change,
    power,
    summary,
)
from export.carriers.compiled.stock_layers import logic_of, wanted_change
from tests.layers import EPS, D, a_site, a_stream, both_layers, random_streams, run_mlp, widen


def test_power() -> None:
    assert [power(v) for v in (1.0, 1.01, 0.3, 64.0)] == [1.0, 2.0, 0.5, 64.0]


def test_numbers_are_powers_of_two_and_follow_the_measurement() -> None:
    site, x = a_site(5), random_streams(100)
    logic = logic_of(site)
    stream, _ = a_stream(5)
    for dtype in ("float32", "bfloat16"):
        setting = choose_setting(site, logic, stream, Measured(x, x[:0]), dtype)
        for number in (*setting.zeta, setting.sharpness, setting.gain_a, setting.step):
            assert math.frexp(number)[0] == 0.5
        assert math.frexp(setting.gain_b - 1)[0] == 0.5
        assert setting.gain_a == 2.0**-8 and math.frexp(setting.loud)[0] == 0.5
        larger = choose_setting(site, logic, stream, Measured(8 * x, x[:0]), dtype)
        assert larger.sharpness == 8 * setting.sharpness
        assert summary(setting, Measured(x, x[:0]))["zeta"] == [
            min(setting.zeta),
            max(setting.zeta),
        ]


def test_what_a_dtype_cannot_hold_is_refused() -> None:
    site, x = a_site(3), random_streams(50)
    logic = logic_of(site)
    stream, _ = a_stream(3)
    with pytest.raises(ExportError, match=r"float16 ends at 65504.*--dtype bfloat16"):
        choose_setting(site, logic, stream, Measured(x, x[:0]), "float16")


@pytest.mark.parametrize("kind", ["clamp", "scale", "refusal", "refusal and clamp", "next"])
def test_the_bound_holds_and_is_no_empty_one(kind: str) -> None:
    site, x = a_site(7, kind), random_streams(3000)
    logic = logic_of(site)
    stream, _, layer_a, layer_b = both_layers(site, x)
    setting = choose_setting(site, logic, stream, Measured(x, x[:0]), "float32")
    after = run_mlp(run_mlp(widen(x, stream), layer_a, EPS), layer_b, EPS)
    change = wanted_change(site, x)
    error = np.linalg.norm(after[:, :D] / stream.scale - x - change, axis=-1)
    bound = error_bound(site, logic, setting, stream, x, "float32")
    assert (error <= bound).all()
    size = np.linalg.norm(change, axis=-1)
    assert np.median(bound) < 1e-3 * np.median(size[size > 0])
    assert size.max() <= largest_change(site, logic, np.linalg.norm(x, axis=-1).max())
    coarse = error_bound(site, logic, setting, stream, x, "bfloat16")
    assert (coarse >= bound).all()
