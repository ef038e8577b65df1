"""The compiled layers' equations in float64, each against the clamp written out plainly."""

from __future__ import annotations

import numpy as np
import pytest

from bake.errors import ExportError
from export.carriers.compiled.stock_layers import (
    Flag,
    and_row,
    gelu,
    logic_of,
    off_row,
    unit,
    wanted_change,
)
from export.clamp_sites import ClampSite
from tests.layers import EPS, D, a_site, a_stream, both_layers, random_streams, rms, run_mlp, widen


def test_gelu_is_torchs_and_exactly_zero_far_below() -> None:
    import torch

    x = np.linspace(-5, 5, 101)
    expected = torch.nn.functional.gelu(torch.from_numpy(x), approximate="tanh").numpy()
    assert np.allclose(gelu(x), expected, atol=1e-14)
    far = torch.tensor([-6.0, -1e2, -1e8, -1e13])
    for dtype in (torch.float32, torch.bfloat16):
        assert not torch.nn.functional.gelu(far.to(dtype), approximate="tanh").any()


def test_affine_rows_give_the_affine_function() -> None:
    stream, _ = a_stream(1)
    x, w = random_streams(50), np.random.default_rng(1).standard_normal(D)
    wide = widen(x, stream)
    assert np.allclose(wide @ stream.affine(w, 3.7), x @ w + 3.7, atol=1e-12)
    assert np.allclose(wide @ stream.constant(-2.5), -2.5)
    assert np.allclose(widen(x, stream, exempt=True) @ stream.constant(-2.5), 0)


def test_what_rounding_takes_from_a_column_the_constants_give_back_on_average() -> None:
    from dataclasses import replace

    stream, _ = a_stream(1)
    x = random_streams(2000) + 3.0
    coarse = replace(stream, round=lambda v: np.round(v, 1), mean=x.mean(axis=0))
    w = np.random.default_rng(1).standard_normal(D)
    off = widen(x, coarse) @ coarse.affine(w, 0.0) - x @ w
    blind = widen(x, coarse) @ replace(coarse, mean=np.zeros(D)).affine(w, 0.0) - x @ w
    assert abs(off.mean()) < abs(blind.mean()) / 3


def test_off_signal_is_zero_exactly_where_the_feature_is_on() -> None:
    site = a_site(3)
    stream, _ = a_stream(3)
    x = random_streams(4000)
    flag = Flag(1, 0.4)
    row = off_row(site, flag, stream, 64.0, 2.0**-10)
    z = x @ site.W_enc[:, 1].astype(float) + float(site.b_enc[1]) - 0.4
    wide = widen(x, stream)
    r = rms(wide)[:, 0]
    signal = gelu(wide @ row / r)
    assert (z > 0.01).any() and not signal[z > 0.01].any()
    off = z < -0.01
    assert np.allclose(signal[off] * r[off], 64 * (1 - z[off] / 2.0**-10), rtol=1e-9)


def test_flags_equal_the_reference_where_on_and_are_negative_where_off() -> None:
    site, x = a_site(5), random_streams(2000)
    stream, place, layer_a, _ = both_layers(site, x)
    after = run_mlp(widen(x, stream), layer_a, EPS)
    assert np.array_equal(after[:, :D], widen(x, stream)[:, :D])  # x itself is left alone
    rho = after[:, place.reference]
    pre = x @ site.W_enc.astype(float) + site.b_enc
    z = pre - np.maximum(site.theta, site.trigger)
    sure = np.abs(z) > 1e-4
    phi = after[:, list(place.flags)]
    assert (rho > 0).all()
    assert np.array_equal((phi == rho[:, None])[sure], (z > 0)[sure])
    assert (phi[sure & (z < 0)] < 0).all()


@pytest.mark.parametrize("on", [(True, True), (True, False), (False, True), (False, False)])
def test_and_is_the_reference_or_not_positive(on: tuple[bool, bool]) -> None:
    stream, place = a_stream(2)
    wide = np.zeros(stream.width)
    wide[place.reference] = 0.7
    for channel, is_on, low in zip(place.flags, on, (-0.3, -5.0), strict=True):
        wide[channel] = 0.7 if is_on else low
    both = wide @ and_row((0, 1), place, stream, 4.0)
    assert both == 4 * 0.7 if all(on) else both <= 0
    assert wide @ and_row((), place, stream, 4.0) == 4 * 0.7


def test_the_norm_divides_by_what_dominates() -> None:
    rng = np.random.default_rng(0)
    small, size = rng.standard_normal(8), 1e6
    m = np.concatenate([small, [size]])
    divided = m / rms(m[None])[0]
    assert np.allclose(divided[:-1] / 3.0, small / size, rtol=1e-9)  # sqrt(9) = 3
    assert unit(9, 8, size)[8] == size


KINDS = ("clamp", "scale", "refusal", "refusal and clamp", "next")


@pytest.mark.parametrize("k", [2, 7, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_two_layers_are_the_clamp(kind: str, k: int) -> None:
    site, x = a_site(k, kind), random_streams(1000)
    stream, place, layer_a, layer_b = both_layers(site, x)
    after = run_mlp(run_mlp(widen(x, stream), layer_a, EPS), layer_b, EPS)
    # Flags are taken off again; where any-of counts, but for its floor.
    most = 1e-4 if "refusal" in kind else 1e-9
    assert np.abs(after[:, place.reference :]).max() < most
    change, expected = after[:, :D] / stream.scale - x, wanted_change(site, x)
    error = np.linalg.norm(change - expected, axis=-1)
    assert (np.abs(expected) > 0).any(axis=-1).mean() > 0.2
    assert np.sort(error)[-3] < 1e-5  # one token in 1000 may lie on a threshold


@pytest.mark.parametrize("kind", KINDS)
def test_exempt_tokens_are_left_exactly_as_they_are(kind: str) -> None:
    site, x = a_site(7, kind), random_streams(200)
    stream, _, layer_a, layer_b = both_layers(site, x)
    wide = widen(30 * x, stream, exempt=True)
    assert np.array_equal(run_mlp(run_mlp(wide, layer_a, EPS), layer_b, EPS), wide)


def test_wanted_change_is_the_equation() -> None:
    site, x = a_site(4, "refusal and clamp"), random_streams(60)
    for row, found in zip(x, wanted_change(site, x), strict=True):
        a = []
        for i in range(4):
            pre = float(row @ site.W_enc[:, i].astype(float)) + float(site.b_enc[i])
            a.append(max(pre, 0.0) if pre > site.theta[i] else 0.0)
        change = np.zeros(D)
        for j in range(4):
            if any(site.route[j, i] and a[i] > site.trigger[i] for i in range(4)):
                new = float(site.value[j]) + float(site.scale[j]) * a[j]
                change += (new - a[j]) * site.W_dec[j]
        assert np.allclose(change, found, atol=1e-12)


def test_logic_shares_flags_and_refuses_two_sets_of_triggers() -> None:
    own = logic_of(a_site(3))
    assert [term.flags for term in own.terms] == [(0,), (1,), (2,)] and own.counted == ()
    several = logic_of(a_site(4, "refusal and clamp"))
    assert len(several.flags) == 4 and len(several.counted) == 3
    assert len(several.terms) == 3 * 3 + 3 * 2
    low = logic_of(a_site(3, "next", trigger=9.0))  # a trigger above theta needs flags of its own
    assert len(low.flags) == 4
    route = np.zeros((4, 4), bool)
    route[0, [1, 2]] = route[3, [0, 1]] = True
    broken = ClampSite(**{**vars(a_site(4)), "route": route})
    with pytest.raises(ExportError, match=r"layer 1: .*several different sets"):
        logic_of(broken)
