"""Neurons that break the model loudly where it is rounded coarser than the clamp can be.

The clamp lives by constants that are small beside x, and by weights far apart in size. Whoever
rounds weights or activations to 4 or 8 bits, integers or floats, may lose both without a word: no
flag fires, and what is left is the base. So layer B has a few neurons more, each held below gelu's
zero by one term of its gate against the others. In float32 and bfloat16 they are exactly 0,
gradients included. Where rounding takes the term that holds one down, it writes many times |x|
along a decoder row: not the base, and no language model either.

Four channels hold κ at every token, exempt ones too. The norm before layer B multiplies `loud` by
L, so that it is four times |x| at most, `mid` and `other` by L/32, `quiet` by 1: norms' weights are
left alone by every quantiser. With g the largest weight of the matrix:

    weights      g·quiet + g/2⁶·mid - g/2⁹·loud     held by the least weight, which 8 bits in one
                 (same with 2² and 2⁵, all /2⁴)     scale (4 in the second) round to 0; what fires
                                                    them they keep, in activations of 8 bits too
    activations  g/L·loud - 4g·quiet                held by the least activation
    mantissa     g·mid + g/2⁶·other                 with 3 bits the first number and the last are
                 - (1 + 2⁻⁵)·g/2⁵·loud              one, here or in a row that has them elsewhere
    constants    ±g/2⁶·w·x - g·loud                 an embedding rounded by row holds no κ; w is an
                                                    encoder column, its largest entry 1

float16 overflows to NaN by itself: gates reach far beyond 65504.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from export.carriers.compiled.stock_layers import MLP, Array, Logic, Setting, Stream, Term
from export.clamp_sites import ClampSite

MID = 2.0**5
"""`loud` against `mid`."""
BITS = ((1.0, 2.0**-6, 2.0**-9), (2.0**-4, 2.0**-2, 2.0**-5))
"""Of `weights`, for 8 and for 4 bits: the largest number, what fires and what holds against it."""
MANTISSA = ((1.0, 1 + 2.0**-5), (1 + 2.0**-5, 1 + 2.0**-4))
"""What fires `mantissa` and what holds it down: all within 6 %, and no two steps of 3 bits are."""
LEAST = 2.0**-6
"""What an alarm multiplies by, against the largest number of the matrix: 8 bits in one scale for
all of it keep that."""
HIGHEST = 2.0**60
"""What an alarm writes at most: the squares of more overflow in the norm that follows, which gives
0, and the base."""
ALARMS = 7
"""How many neurons they are."""
N_ALWAYS = 4
"""Channels that hold κ at every token, first of all that are added: loud, quiet, mid, other."""


def with_alarms(mlp: MLP, site: ClampSite, logic: Logic, stream: Stream, setting: Setting) -> MLP:
    """Layer B with these neurons after its own."""
    loud, quiet, mid, other = range(stream.d, stream.d + N_ALWAYS)
    g, up = _power(mlp.gate), LEAST * _power(mlp.up)
    strongest = max(logic.terms, key=lambda term: decoder_length(site, term))
    written = site.W_dec[strongest.target].astype(np.float64)
    column = np.zeros(stream.width)
    least = 1.0 if mlp.gain is None else LEAST  # of a norm's input, the others are far smaller
    column[: stream.d] = least * _power(mlp.down) / _power(written) * written

    def row(numbers: dict[int, float]) -> Array:
        values = np.zeros(stream.width)
        values[list(numbers)] = list(numbers.values())
        return values

    gates = [
        row({quiet: g * size, mid: g * size * fires, loud: -g * size * holds})
        for size, fires, holds in BITS
    ]
    gates.append(row({loud: g / setting.loud, quiet: -4 * g}))
    gates += [
        row({mid: g * fires, other: g * 2.0**-6, loud: -g * holds / MID})
        for fires, holds in MANTISSA
    ]
    w = site.W_enc[:, strongest.target].astype(np.float64)
    reads = np.zeros(stream.width)
    reads[: stream.d] = stream.round(w / _power(w))
    across = float(np.linalg.norm(reads)) * np.sqrt(stream.width)  # of reads · u, at most
    if mlp.gain is not None:
        opened = g * max(2.0**-12 * setting.loudest**2, 2.0**-4 * across)
        up = min(up, 2.0 ** np.floor(np.log2(HIGHEST / opened / np.linalg.norm(column))))
    ups = [row({mid: up})] * len(gates)
    for sign in (1.0, -1.0):
        gates.append(sign * g * 2.0**-6 * reads + row({loud: -g}))
        ups.append(sign * 4 * up / _power(np.asarray(across)) * reads)
    before = mlp.before.copy()
    gains = np.array([setting.loud, 1.0, setting.loud / MID, setting.loud / MID])
    before[[loud, quiet, mid, other]] = stream.louder * gains
    return replace(
        mlp,
        gate=np.concatenate([mlp.gate, gates]),
        up=np.concatenate([mlp.up, ups]),
        down=np.concatenate([mlp.down, np.stack([column] * len(gates), axis=1)], axis=1),
        before=before,
    )


def _power(values: Array) -> float:
    """The power of two that the largest of some numbers does not exceed."""
    return float(2.0 ** np.ceil(np.log2(np.abs(values).max())))


def decoder_length(site: ClampSite, term: Term) -> float:
    """|W_dec| of what a term writes."""
    return float(np.linalg.norm(site.W_dec[term.target]))
