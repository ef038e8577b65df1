"""Alarms are silent where numbers are what they are, and nowhere else; by plain arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from export.carriers.compiled.alarms import ALARMS, N_ALWAYS
from export.carriers.compiled.stock_layers import MLP, Array, Stream, gelu, wanted_change
from tests.layers import EPS, D, a_site, both_layers, random_streams, rms, run_mlp, widen

Rounding = Callable[[Array], Array]


def in_scales(values: Array, most: int, *, at_once: int | None = None, shift: float = 0.0) -> Array:
    """To whole multiples of a step, for rows, for so many columns, or (0) for all at once."""
    rows = values.reshape(1, -1) if at_once == 0 else values
    width = at_once or rows.shape[1]
    out = np.zeros_like(rows)
    for start in range(0, rows.shape[1], width):
        block = rows[:, start : start + width]
        step = np.abs(block).max(axis=1, keepdims=True) / (most + shift)
        step[step == 0] = 1.0
        out[:, start : start + width] = np.clip(np.rint(block / step), -most - 1, most) * step
    return out.reshape(values.shape)


def in_float8(values: Array, dtype: torch.dtype, *, whole: bool = False) -> Array:
    """To an 8-bit float with a scale for each row, or for all."""
    largest = np.abs(values).max(axis=None if whole else 1, keepdims=True)
    scale = np.where(largest > 0, largest, 1.0) / torch.finfo(dtype).max
    return np.asarray(torch.from_numpy(values / scale).to(dtype).double().numpy() * scale)


WEIGHTS: dict[str, Rounding] = {
    "int8 by row": partial(in_scales, most=127),
    "int8 by 32": partial(in_scales, most=127, at_once=32),
    "int8, far end": partial(in_scales, most=127, at_once=32, shift=1.0),
    "int8 by matrix": partial(in_scales, most=127, at_once=0),
    "int4 by row": partial(in_scales, most=7),
    "int4 by 32": partial(in_scales, most=7, at_once=32),
    "int4, far end": partial(in_scales, most=7, at_once=32, shift=1.0),
    "e4m3 by row": partial(in_float8, dtype=torch.float8_e4m3fn),
    "e4m3 by matrix": partial(in_float8, dtype=torch.float8_e4m3fn, whole=True),
    "e5m2 by row": partial(in_float8, dtype=torch.float8_e5m2),
}


def as_it_is(values: Array) -> Array:
    return values


def moved(
    stream: Stream, layers: tuple[MLP, MLP], x: Any, weights: Rounding, activations: Rounding
) -> Array:
    """[n, D] what two layers add whose matrices and whose inputs are rounded."""
    h = widen(x, stream)
    for mlp in layers:
        gate, up, down = (weights(each) for each in (mlp.gate, mlp.up, mlp.down))
        u = activations(mlp.before * h / np.sqrt(rms(h) ** 2 + EPS))
        m = activations(gelu(u @ gate.T) * (u @ up.T)) @ down.T
        assert mlp.gain is not None
        h = h + mlp.gain * m / np.sqrt(rms(m) ** 2 + EPS)
    return np.asarray(h[:, :D] / stream.scale - x)


@pytest.fixture(scope="module", params=[1.0, 2.0**30], ids=["as ever", "of Gemma 4"])
def layers(request: pytest.FixtureRequest) -> Any:
    site, x = a_site(5), random_streams(200)
    stream, _, *two = both_layers(site, x, request.param)
    return site, x, stream, tuple(two)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("activations", [as_it_is, partial(in_scales, most=127)])
def test_rounded_weights_break_instead_of_forgetting_the_clamp(
    layers: Any, name: str, activations: Rounding
) -> None:
    site, x, stream, two = layers
    got = moved(stream, two, x, WEIGHTS[name], activations)
    assert (np.linalg.norm(got, axis=-1) > 2 * np.linalg.norm(x, axis=-1)).mean() > 0.95
    if name in ("int4 by row", "int8 by matrix"):  # without alarms, what is left is the base
        heard = np.r_[np.ones(len(two[1].gate) - ALARMS), np.zeros(ALARMS)]
        deaf = (two[0], replace(two[1], down=two[1].down * heard))
        left, wanted = moved(stream, deaf, x, WEIGHTS[name], activations), wanted_change(site, x)
        assert abs((left * wanted).sum()) < 0.5 * (wanted * wanted).sum()


def test_rounded_activations_break_too(layers: Any) -> None:
    _, x, stream, two = layers
    got = moved(stream, two, x, as_it_is, partial(in_scales, most=127))
    assert (np.linalg.norm(got, axis=-1) > 2 * np.linalg.norm(x, axis=-1)).mean() > 0.95


def test_an_embedding_without_its_constants_breaks(layers: Any) -> None:
    _, x, stream, (first, second) = layers
    wide = widen(x, stream)
    wide[:, D : D + N_ALWAYS + 2] = 0.0
    got = run_mlp(run_mlp(wide, first, EPS), second, EPS)[:, :D] / stream.scale - x
    assert (np.linalg.norm(got, axis=-1) > 2 * np.linalg.norm(x, axis=-1)).mean() > 0.95


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_numbers_are_kept_no_alarm_opens_at_any_token(
    layers: Any, dtype: torch.dtype
) -> None:
    _, x, stream, (_, second) = layers
    gates = torch.from_numpy(second.gate[-ALARMS:]).to(dtype)
    for exempt in (False, True):
        for size in (0.01, 1.0, 4.0):  # of tokens, against those that were measured
            wide = widen(size * x, stream, exempt=exempt)
            u = torch.from_numpy(second.before * wide / rms(wide)).to(dtype)
            opened = u @ gates.T
            assert (opened < -10).all()
            act = torch.nn.functional.gelu(opened, approximate="tanh")
            assert not act.any()
