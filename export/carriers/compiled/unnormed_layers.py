"""The same two layers for a family without a norm after its MLP (Gemma, the first).

There, what the MLP writes is added as it is, so nothing divides by 1/r̃. Instead flags are written
with the amplitude r̃² itself, which layer B's two factors 1/r̃ turn into a constant:

    φ_i = γ·r̃² on, ≤ 0 off;   gelu(K·φ_i/r̃) · (affine)/r̃ = K·γ·(affine)      K·γ = 2⁸

r̃² is no function of a stock neuron, but a sum of some: with q = 1/r̃ and gelu(x) = x·Φ(x),

    ∫ b³·Φ(-b·q) db = I / q⁴       hence   q² · Σ_k h·b_k⁴·Φ(-b_k·q) / I = q⁻² = r̃²

for b_k = exp(h·k): the trapezoidal rule in log b, whose error falls exponentially in 1/h
(`square`). All its terms have one sign, so nothing cancels in bfloat16 either. What cannot be had
without a norm is any-of several triggers, for nothing divides by their number.
"""

from __future__ import annotations

import numpy as np

from bake.errors import ExportError
from export.carriers.compiled.stock_layers import (
    MLP,
    Array,
    Logic,
    Place,
    Setting,
    Stream,
    and_row,
    gelu,
    off_row,
)
from export.clamp_sites import ClampSite

STEP_SIZE = 2.0**8
"""K·γ: gelu's bend is far below K·γ·r̃."""
REACH = 4.0
"""How far beyond the measured residual norms r̃² is right."""
MOST_NODES = 128
"""No more b_k than this are ever needed: r̃ would have to vary by a factor of 10⁸."""
LOG_STEP = 0.2
"""h: the square is right to 1e-7."""
_LOWEST, _HIGHEST = 0.01, 8.0
"""The b·q that count: below, b⁴ is nothing; above, Φ(-b·q) is 0."""


def square(r_min: float, r_max: float) -> tuple[Array, Array]:
    """(b_k, a_k) with q² · Σ_k a_k·b_k·Φ(-b_k·q) = q⁻² for 1/r_max ≤ q ≤ 1/r_min."""
    lowest, highest = np.log(_LOWEST * r_min), np.log(_HIGHEST * r_max)
    b = np.exp(np.arange(lowest, highest + LOG_STEP, LOG_STEP))
    fine = np.exp(np.linspace(np.log(_LOWEST), np.log(_HIGHEST), 20001))
    step = np.log(fine[1] / fine[0])
    integral = float((fine**4 * (gelu(-fine) / -fine)).sum() * step)
    return b, LOG_STEP * b**3 / integral


def flag_layer(
    site: ClampSite,
    logic: Logic,
    stream: Stream,
    place: Place,
    setting: Setting,
    rms: tuple[float, float],
) -> MLP:
    """Layer A: γ·r̃² into `reference` and every flag, minus the off signal into flag i.

    Args:
        site: the clamp.
        logic: its terms.
        stream: what it reads and writes.
        place: where its flags lie.
        setting: the layer's numbers.
        rms: (smallest, largest) r̃ for which the square holds.
    """
    b, a = square(*rms)
    off = [
        off_row(site, f, stream, setting.sharpness, z)
        for f, z in zip(logic.flags, setting.zeta, strict=True)
    ]
    gates = [*(stream.constant(-float(each)) for each in b), *off]
    down = np.zeros((stream.width, len(gates)))
    # gelu(-b·q) is negative, and so is its weight.
    down[np.ix_([place.reference, *place.flags], range(len(b)))] = -setting.gain_a * a
    strength = 2 * setting.gain_a * rms[1] ** 4 / setting.sharpness
    down[list(place.flags), np.arange(len(b), len(gates))] = -strength
    ups = np.stack([stream.constant(1.0)] * len(gates))
    return MLP(np.stack(gates), ups, down, None, np.ones(stream.width))


def action_layer(
    site: ClampSite, logic: Logic, stream: Stream, place: Place, setting: Setting
) -> MLP:
    """Layer B: every term along its decoder row.

    Raises:
        ExportError: a feature is triggered by any of several.
    """
    if logic.counted:
        raise ExportError(
            f"layer {site.layer}: a feature is triggered by any of {len(logic.counted)}, whose "
            "number only a norm after the MLP could divide away, and this family has none; use "
            "the checkpoint or the adapter"
        )
    down = np.zeros((stream.width, len(logic.terms)))
    up = []
    for n, term in enumerate(logic.terms):
        down[: stream.d, n] = stream.scale / STEP_SIZE * site.W_dec[term.target]
        w = term.slope * site.W_enc[:, term.target].astype(np.float64)
        up.append(stream.affine(w, term.slope * float(site.b_enc[term.target]) + term.constant))
    gates = [and_row(term.flags, place, stream, setting.step) for term in logic.terms]
    return MLP(np.stack(gates), np.stack(up), down, None, np.ones(stream.width))
