"""The layers of a family without a norm after its MLP."""

from __future__ import annotations

import numpy as np
import pytest

from bake.errors import ExportError
from export.carriers.compiled.alarms import with_alarms
from export.carriers.compiled.rule import Measured, choose_setting
from export.carriers.compiled.stock_layers import gelu, logic_of, wanted_change
from export.carriers.compiled.unnormed_layers import MOST_NODES, action_layer, flag_layer, square
from tests.layers import EPS, D, a_site, a_stream, random_streams, run_mlp, widen


@pytest.mark.parametrize("spread", [3.0, 100.0])
def test_the_square_is_the_square(spread: float) -> None:
    b, a = square(0.4, 0.4 * spread)
    r = np.geomspace(0.4, 0.4 * spread, 200)
    q = 1 / r
    found = (gelu(-np.outer(q, b)) * -a).sum(axis=-1) * q
    assert np.allclose(found, r**2, rtol=2e-7)
    assert (a > 0).all() and len(b) < MOST_NODES


@pytest.mark.parametrize("kind", ["clamp", "scale", "next"])
def test_two_layers_are_the_clamp(kind: str) -> None:
    site, x = a_site(7, kind), random_streams(1000)
    logic = logic_of(site)
    stream, place = a_stream(len(logic.flags))
    measured = Measured(x[:300], x[:0])
    setting = choose_setting(site, logic, stream, measured, "float32", post_norm=False)
    low, high = measured.rms
    layer_a = flag_layer(site, logic, stream, place, setting, (low / 4, high * 4))
    layer_b = action_layer(site, logic, stream, place, setting)
    layer_b = with_alarms(layer_b, site, logic, stream, setting)
    wide = widen(x, stream)
    after = run_mlp(wide, layer_a, EPS)
    assert (
        np.array_equal(after[:, :D], wide[:, :D])
        and np.abs(after[:, place.reference :]).max() < 1e-4
    )
    change = run_mlp(after, layer_b, EPS)[:, :D] / stream.scale - x
    expected = wanted_change(site, x)
    error = np.linalg.norm(change - expected, axis=-1)
    assert np.linalg.norm(expected, axis=-1).max() > 1
    assert np.sort(error)[-3] < 1e-4
    spared = widen(x, stream, exempt=True)
    assert np.array_equal(run_mlp(run_mlp(spared, layer_a, EPS), layer_b, EPS), spared)


def test_any_of_several_triggers_is_refused() -> None:
    site, x = a_site(4, "refusal"), random_streams(50)
    logic = logic_of(site)
    stream, place = a_stream(len(logic.flags))
    setting = choose_setting(site, logic, stream, Measured(x, x[:0]), "float32", post_norm=False)
    with pytest.raises(ExportError, match=r"any of 3, .*this family has none"):
        action_layer(site, logic, stream, place, setting)
