"""Which numbers the two layers of a site get, and how far they may be off: the rule and its bound.

Measured: residual streams x [n, d] at the hook point, exempt tokens apart. X is the largest |x|,
r = |x| / sqrt(d) what the layers' norm sees, w_i an encoder column, b_i its bias less threshold.

    ζ_i     2⁻²² · (|w_i|·X + |b_i|)        a few times float32's own rounding of pre; a feature
                                            less than ζ_i above its threshold is clamped in part
    C       16 · r_max                      gelu's bend is narrower than ζ/3
    gain_a  2⁻⁸                             the smallest 1 + w that is no 0 in bfloat16, whatever
                                            the folder is stored in: a cast keeps it
    K       256 · r_max / ρ_min             gelu's bend again, and any-of's floor; of a stream
                                            smaller than its flags, theirs counts (gain_a);
                                            ρ_min = gain_a·sqrt(D/f)·2⁻²³
    gain_b  2¹⁰ · rms(Δ), Δ by its bound;   the norm divides by M up to (rms(Δ)/gain_b)²/2;
            2⁴ · X·s/sqrt(D) at least       an alarm writes gain_b·sqrt(D): 16 times all of x̃
    L       4 · X·s/κ, 2¹⁰ at least         a channel above all others (`alarms.py`)

Without a norm after the MLP: gain_a = γ = 2⁻¹⁷ · r_min³/(4·r_max)⁴ · 2⁻²² / sqrt(f), so that flags
disturb later norms by at most 2⁻³³, and K = 2⁸/γ.

All are rounded to powers of two (gain_b to one more than such), so that multiplying by them rounds
nothing. A token beyond what was measured costs accuracy gradually: no step depends on a maximum.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bake.errors import ExportError
from export.carriers.compiled.stock_layers import (
    FLOOR,
    Array,
    Logic,
    Setting,
    Stream,
    wanted_change,
)
from export.carriers.compiled.unnormed_layers import REACH, STEP_SIZE
from export.clamp_sites import ClampSite

FINEST = 2.0**-22
"""ζ against the largest pre-activation."""
BEND = 16.0
"""C against r_max."""
STEP = 256.0
"""K·ρ/r̃ at least."""
GAIN_A = 2.0**-8
"""gain_a with a norm after the MLP."""
LEAST_LOUD = 2.0**10
"""L at least: with less than 2⁹ an alarm that reads `quiet` is not held down."""
FLOAT16_MAX = 65504.0


@dataclass(frozen=True)
class Measured:
    """Residual streams at a hook point."""

    x: Array
    """[n, d] of tokens that the clamp may edit."""
    exempt: Array
    """[m, d] of tokens that it may not; m may be 0."""

    @property
    def largest(self) -> float:
        """X."""
        return float(np.linalg.norm(self.x, axis=-1).max())

    @property
    def rms(self) -> tuple[float, float]:
        """(r_min, r_max)."""
        r = np.linalg.norm(self.x, axis=-1) / math.sqrt(self.x.shape[-1])
        return float(r.min()), float(r.max())


def power(value: float) -> float:
    """The next power of two that is not smaller."""
    return 2.0 ** math.ceil(math.log2(value))


def choose_setting(
    site: ClampSite,
    logic: Logic,
    stream: Stream,
    measured: Measured,
    dtype: str,
    *,
    post_norm: bool = True,
) -> Setting:
    """The rule of this module.

    Args:
        site: the clamp.
        logic: its terms.
        stream: what it reads and writes.
        measured: on what the numbers rest.
        dtype: of weights and activations.
        post_norm: whether the family norms what an MLP writes.

    Raises:
        ExportError: the dtype cannot hold the numbers.
    """
    r_min, r_max = measured.rms
    features = [flag.feature for flag in logic.flags]
    norms = np.linalg.norm(site.W_enc[:, features].astype(np.float64), axis=0)
    biases = np.abs(site.b_enc[features] - np.array([flag.threshold for flag in logic.flags]))
    zeta = [
        power(FINEST * max(w * measured.largest + b, 2.0**-40) / 2)
        for w, b in zip(norms, biases, strict=True)
    ]
    sharpness = power(BEND * r_max)
    # Exempt tokens are held down where an encoder column reads them at 2⁻⁶.
    spared = np.linalg.norm(measured.exempt, axis=-1).max(initial=0.0) / 32
    loud = 4 * stream.scale * max(measured.largest, float(spared)) / stream.kappa
    loud = power(max(loud, LEAST_LOUD))
    loudest = loud * stream.kappa / r_min
    if dtype == "float16" and (largest := sharpness / FINEST / r_max) > FLOAT16_MAX:
        raise ExportError(
            f"layer {site.layer}: float16 ends at {FLOAT16_MAX:.0f}, and the flags need "
            f"{largest:.1e}; pass --dtype bfloat16 or --dtype float32"
        )
    if not post_norm:
        # The largest flag is 2·gain_a·(REACH·r_max)⁴/r_min² / FINEST.
        small = 2.0**-17 * r_min**3 / (REACH * r_max) ** 4 * FINEST / math.sqrt(len(features))
        gain_a = power(small) / 2
        return Setting(tuple(zeta), sharpness, gain_a, STEP_SIZE / gain_a, math.inf, loud, loudest)
    root = math.sqrt(stream.width)
    floor = GAIN_A * root / math.sqrt(len(features)) * FINEST / 2
    step = power(STEP * math.hypot(r_max, GAIN_A) / floor)
    change = largest_change(site, logic, measured.largest)
    garbage = stream.scale * max(2.0**10 * change, 2.0**4 * measured.largest) / root
    gain_b = 1 + power(max(garbage, 16.0))
    return Setting(tuple(zeta), sharpness, GAIN_A, step, gain_b, loud, loudest)


def largest_change(site: ClampSite, logic: Logic, x_norm: float) -> float:
    """A bound of |Δ| [d], by the triangle inequality over every term at once."""
    return float(
        sum(
            np.linalg.norm(site.W_dec[t.target])
            * (
                abs(t.constant)
                + abs(t.slope)
                * (np.linalg.norm(site.W_enc[:, t.target]) * x_norm + abs(site.b_enc[t.target]))
            )
            for t in logic.terms
        )
        / max(len(logic.counted), 1)
    )


def error_bound(
    site: ClampSite, logic: Logic, setting: Setting, stream: Stream, x: Array, dtype: str
) -> Array:
    """How far the two layers' result may be from h' = x + Δ, for each token.

    Rounding: u of the dtype for every stored number (weights, normed inputs, the outputs of
    gate, up and their product, the sum), and float32's inside of a matrix product. A flag within
    its rounding of the threshold, or less than ζ above it, may come out either way: the whole of
    its terms counts. To first order in u.

    Args:
        site: the clamp.
        logic: its terms.
        setting: the layers' numbers.
        stream: what they read and write.
        x: [n, d], float64, none of them exempt.
        dtype: of weights and activations.

    Returns:
        [n] bounds of |h'_compiled - h'|, in the units of x.
    """
    amplitude = 12 if math.isfinite(setting.gain_b) else 32  # without norm flags carry a size
    u = {"float32": 2.0**-24, "bfloat16": 2.0**-8}[dtype]
    inner = 2.0**-24 * math.sqrt(stream.width)
    x_norm = np.linalg.norm(x, axis=-1)
    W_enc, b_enc = site.W_enc.astype(np.float64), site.b_enc.astype(np.float64)
    pre = x @ W_enc + b_enc
    reads = np.linalg.norm(W_enc, axis=0) * x_norm[:, None]  # bounds |w|·|x|
    pre_error = (3 * u + 4 * inner) * (reads + np.abs(b_enc))
    total = np.zeros(len(x))
    count = np.zeros(len(x))
    doubtful = np.zeros((len(x), len(logic.flags)), bool)
    for f, (flag, zeta) in enumerate(zip(logic.flags, setting.zeta, strict=True)):
        z = pre[:, flag.feature] - flag.threshold
        noise = pre_error[:, flag.feature] + 3 * u * abs(flag.threshold)
        doubtful[:, f] = (z > -zeta / 2 - noise) & (z < 1.5 * zeta + noise)
        count += (f in logic.counted) & (z > 0) & ~doubtful[:, f]
    for term in logic.terms:
        flags = list(term.flags)
        z = pre[:, [logic.flags[f].feature for f in flags]]
        maybe = ((z > [logic.flags[f].threshold for f in flags]) | doubtful[:, flags]).all(-1)
        size = np.abs(term.constant + term.slope * pre[:, term.target])
        slope_error = abs(term.slope) * pre_error[:, term.target]
        rounding = (amplitude * u + 4 * inner) * (size + abs(term.constant)) + slope_error
        doubt = doubtful[:, flags].any(-1)
        error = np.where(doubt, size + rounding, rounding) * np.linalg.norm(site.W_dec[term.target])
        total += np.where(maybe, error, 0) / np.maximum(count, 1)
    change = np.linalg.norm(wanted_change(site, x), axis=-1)
    ratio = stream.scale * change / (math.sqrt(stream.width) * setting.gain_b)
    floor = len(logic.counted) > 0 and FLOOR**2
    taken_off = 0.0 if math.isinf(setting.gain_b) else (setting.gain_a / setting.gain_b) ** 2
    bound: Array = total + change * (ratio**2 + floor + taken_off) + 2 * u * (x_norm + change)
    return bound


def summary(setting: Setting, measured: Measured) -> dict[str, Any]:
    """The numbers as the manifest states them."""
    r_min, r_max = measured.rms
    numbers = asdict(setting)
    if not math.isfinite(setting.gain_b):  # a family without that norm; JSON has no infinity
        del numbers["gain_b"]
    return {
        **numbers,
        "zeta": [min(setting.zeta), max(setting.zeta)],
        "residual_rms": [r_min, r_max],
    }
