"""Sites, streams and stock layers to check the compiled equations with, in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from export.carriers.compiled.alarms import N_ALWAYS, with_alarms
from export.carriers.compiled.rule import Measured, choose_setting
from export.carriers.compiled.stock_layers import (
    MLP,
    Array,
    Place,
    Stream,
    action_layer,
    flag_layer,
    gelu,
    logic_of,
)
from export.clamp_sites import ClampSite

D, EPS = 32, 1e-6


def a_site(k: int, kind: str = "clamp", *, seed: int = 0, trigger: float = 0.2) -> ClampSite:
    """A random clamp of k features; of `refusal` kinds the last is the refusal feature."""
    rng = np.random.default_rng(seed)
    route = np.eye(k, dtype=bool)
    value, scale = np.full(k, -8.0, "f4"), np.zeros(k, "f4")
    if kind == "scale":
        value[:], scale[:] = 0, -7
    if kind.startswith("refusal"):
        route[-1] = [True] * (k - 1) + [False]
        route[:-1] = np.eye(k)[:-1] * (kind == "refusal and clamp")
    if kind == "next":
        route = np.eye(k, k, -1, dtype=bool)
    return ClampSite(
        layer=1,
        exempt_bos=True,
        W_enc=(0.3 * rng.standard_normal((D, k))).astype("f4"),
        b_enc=(0.1 * rng.standard_normal(k)).astype("f4"),
        theta=(np.abs(rng.standard_normal(k)) / 2 + 0.1).astype("f4"),
        W_dec=(0.3 * rng.standard_normal((k, D))).astype("f4"),
        trigger=np.full(k, trigger, "f4"),
        route=route,
        value=value,
        scale=scale,
    )


def a_stream(flags: int, louder: float = 1.0) -> tuple[Stream, Place]:
    """D = 32 and what the flags need, no dtype that rounds; constants that the norm before a layer
    has to make so much louder.
    """
    first = D + N_ALWAYS
    width = first + 2 + 1 + flags
    kappa = 2.0**-8 * math.sqrt(width)
    constants = (first, first + 1)
    scale, mean = math.sqrt(width / D), np.zeros(D)
    stream = Stream(D, width, scale, kappa, constants, lambda x: np.asarray(x), mean, louder)
    return stream, Place(first + 2, tuple(range(first + 3, first + 3 + flags)))


def widen(x: np.ndarray[Any, Any], stream: Stream, *, exempt: bool = False) -> Any:
    """Residual streams [n, D] as the wider model holds them: [n, width]."""
    wide = np.zeros((len(x), stream.width))
    wide[:, :D] = stream.scale * x
    wide[:, D : D + N_ALWAYS] = stream.kappa / stream.louder
    if not exempt:
        wide[:, list(stream.constants)] = stream.kappa / stream.louder
    return wide


def random_streams(n: int, seed: int = 5) -> Any:
    """[n, D] of very different norms."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, D)) * rng.uniform(0.5, 4, (n, 1))


def both_layers(site: ClampSite, x: Any, louder: float = 1.0) -> tuple[Stream, Place, MLP, MLP]:
    """The two layers that are a site's clamp, with numbers that suit the streams x."""
    logic = logic_of(site)
    stream, place = a_stream(len(logic.flags), louder)
    setting = choose_setting(site, logic, stream, Measured(x, x[:0]), "float32")
    arguments = (site, logic, stream, place, setting)
    action = with_alarms(action_layer(*arguments), site, logic, stream, setting)
    return stream, place, flag_layer(*arguments), action


def rms(x: Array) -> Array:
    """[..., D] → [..., 1]."""
    return np.sqrt((x**2).mean(-1, keepdims=True))


def run_mlp(x: Array, mlp: MLP, eps: float) -> Array:
    """A stock layer in float64: x̃ [..., D] → x̃ [..., D]."""
    u = mlp.before * x / np.sqrt(rms(x) ** 2 + eps)
    m = (gelu(u @ mlp.gate.T) * (u @ mlp.up.T)) @ mlp.down.T
    return x + (m if mlp.gain is None else mlp.gain * m / np.sqrt(rms(m) ** 2 + eps))
