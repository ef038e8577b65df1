"""The clamp as the MLPs of two stock decoder layers: every equation, one function each.

A layer of Gemma 2 or 3 whose attention writes nothing (o_proj = 0) computes, on the widened
residual stream x̃ [D] (see `widening.py`),

    u = x̃ / r̃,  r̃ = rms(x̃)                      pre_feedforward_layernorm, gain 1 (but `alarms`)
    m = down @ (gelu(gate @ u) * (up @ u))        n neurons; gelu is the tanh form
    x̃ + gain * m / rms(m)                         post_feedforward_layernorm

x̃ holds s·x, and beside it channels that every token's embedding sets to κ, so any affine function
of x is a row: (w·x + b) / r̃ = row · u (`affine`). Exempt tokens have 0 there instead: then every
`up` of layer A is 0, no flag and no reference is written, and layer B writes exactly nothing. Two
facts carry the rest.

*gelu is exactly 0 below about -6*, in float32 and in bfloat16, and a monotone function above 0.
*The norm divides.* What stands in m beside a much larger number M arrives as its ratio to M, so
factors that all of m shares (powers of 1/r̃, a flag's unknown size) cancel.

**Layer A, flags** (`flag_layer`). For z_i = pre_i - max(theta_i, trigger_i, 0), the *off* signal
N_i = gelu(C·(1 - z_i/ζ_i)/r̃) is exactly 0 where z_i > ζ_i, however large z_i is, and grows without
bound where z_i < 0. With the reference R = gelu(C/r̃), channel i receives R - N_i and one more
channel R. After the norm these are φ_i and ρ, of unknown common size, but

    φ_i = ρ bit for bit     where feature i is on (z_i ≥ ζ_i and a little)
    φ_i ≤ 0                 where it is off (z_i ≤ 0)

No difference of two large numbers occurs anywhere, which is what makes bfloat16 work. Several
flags *and*-ed are φ_i + φ_j - ρ: again ρ bit for bit, or at most 0.

**Layer B, action** (`action_layer`). A neuron gelu(K·(and of flags)/r̃) · (affine of x)/r̃, written
along a decoder row, and a neuron gelu(K·ρ/r̃) · M/r̃ written into a channel of gain 0. Where the
flags hold, both gates are equal bit for bit, so that the norm's division leaves

    Δ_j = [gate_j]·value_j·W_dec_j + [gate_j and own_j]·(scale_j - 1)·pre_j·W_dec_j

Here own_j says pre_j > theta_j, where a_j = pre_j; else a_j = 0. By the same division it takes the
flags off again: a neuron gelu(K·ρ/r̃)·φ_i/r̃ for each, written as -φ_i. Nothing behind it sees them,
so that they may be as large as bfloat16 can say beside 1 (2⁻⁸), and no cast takes them away.

*Any of several triggers* cannot be a sum of flags, for the sum counts them: n. But everything may
be counted alike: when the divisor is the sum of the triggers' gates too, it is n·M and n cancels.
What is gated by a single feature j beside it (`also_clamp`) is counted with [i and j] over all i. A
floor, 2⁻¹¹ of one gate, keeps n = 0 from dividing 0 by 0.

Symbols: d width of the base, D of the widened stream, s its scale, n neurons, f flags.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bake.errors import ExportError
from bake.tensors import to_bits, to_float32
from export.clamp_sites import ClampSite

Array = NDArray[np.float64]

DIVISOR = 2.0**6
"""M: what the dividing neuron writes; large against the norm's eps, small for gradients' sake."""
FLOOR = 2.0**-11
"""Any-of: size of the divisor's floor beside one trigger's gate."""


# --------------------------------------------------------------------------- the stream


@dataclass(frozen=True)
class Stream:
    """The widened residual stream x̃ [D] = [s·x, constants, every site's flags], for one site."""

    d: int
    """Width of the base's residual stream."""
    width: int
    """D."""
    scale: float
    """s."""
    kappa: float
    """κ: what the constant channels hold, times `louder`."""
    constants: tuple[int, ...]
    """Channels that hold κ at every token that the site may edit, and 0 at those it may not."""
    round: Callable[[Array], Array]
    """To the nearest number of the weights' dtype."""
    mean: Array
    """[d] x on average; what rounding w takes from w·mean is given back with the constant part."""
    louder: float = 1.0
    """What the norm before a new layer multiplies them by: κ is what arrives behind it, r̃ aside."""

    @property
    def before(self) -> Array:
        """[D] what that norm multiplies by, in a layer that has no `alarms`."""
        gains = np.ones(self.width)
        gains[list(self.constants)] = self.louder
        return gains

    def affine(self, w: Array, b: float) -> Array:
        """The row [D] with row · x̃ = w·x + b for every token.

        The constant part is split over the constant channels, each holding what the ones before
        had to round off; all but the last are numbers of bfloat16, so that a cast to it takes
        little. Rows may be multiplied by powers of two afterwards, and by nothing else.
        """
        row = np.zeros(self.width)
        row[: self.d] = self.round(w / self.scale)
        left = (b + (w - row[: self.d] * self.scale) @ self.mean) / self.kappa
        *coarse, last = self.constants
        for channel in coarse:
            row[channel] = to_float32(to_bits(np.atleast_1d(left), "BF16"), "BF16")[0]
            left -= row[channel]
        row[last] = self.round(np.asarray(left))
        return row

    def constant(self, b: float) -> Array:
        """The row [D] with row · x̃ = b."""
        return self.affine(np.zeros(self.d), b)


@dataclass(frozen=True)
class MLP:
    """What a stock layer computes beside its attention, which writes nothing."""

    gate: Array
    """[n, D]."""
    up: Array
    """[n, D]."""
    down: Array
    """[D, n]."""
    gain: Array | None
    """[D]: 1 + w of post_feedforward_layernorm; None where the family has none."""
    before: Array
    """[D]: 1 + w of the norm before it."""


def gelu(x: Array) -> Array:
    """Tanh form, as `gelu_pytorch_tanh`."""
    with np.errstate(over="ignore"):
        y: Array = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return y


# --------------------------------------------------------------------------- what is to be computed


@dataclass(frozen=True)
class Flag:
    """`pre_feature > threshold`."""

    feature: int
    """Row of the site, 0 to k - 1."""
    threshold: float


@dataclass(frozen=True)
class Term:
    """One summand of Δ: [all flags] · (constant + slope·pre_target) · W_dec[target]."""

    flags: tuple[int, ...]
    target: int
    constant: float
    slope: float


@dataclass(frozen=True)
class Logic:
    """A site's Δ as a sum of terms over flags, and what it is divided by."""

    flags: tuple[Flag, ...]
    terms: tuple[Term, ...]
    counted: tuple[int, ...]
    """Flags whose number every term counts (any-of); empty where nothing is counted."""


def logic_of(site: ClampSite) -> Logic:
    """Read a clamp's rows as terms over flags.

    Raises:
        ExportError: two rows are triggered by two different sets of several features.
    """
    flags: dict[Flag, int] = {}

    def on(i: int) -> int:  # a_i > trigger_i; trigger_i ≥ 0
        threshold = max(float(site.theta[i]), float(site.trigger[i]), 0.0)
        return flags.setdefault(Flag(i, threshold), len(flags))

    def own(j: int) -> int:  # a_j = pre_j, else 0
        return flags.setdefault(Flag(j, max(float(site.theta[j]), 0.0)), len(flags))

    triggers = {j: tuple(np.flatnonzero(row).tolist()) for j, row in enumerate(site.route)}
    several = {found for found in triggers.values() if len(found) > 1}
    counted = several.pop() if several else ()
    terms = []
    for j, found in triggers.items():
        if not found:
            continue
        if several or (counted and found != counted and found[0] not in counted):
            raise ExportError(
                f"layer {site.layer}: its features are triggered by several different sets of "
                "features; expected one such set, which is what two stock layers hold. Use the "
                "checkpoint or the adapter"
            )
        gates: list[tuple[int, ...]] = [(i,) for i in found]
        if counted and found != counted:
            gates = [tuple(dict.fromkeys((found[0], i))) for i in counted]
        for gate in gates:
            held = tuple(on(i) for i in gate)
            value, slope = float(site.value[j]), float(site.scale[j]) - 1.0
            if j in gate:
                terms.append(Term(held, j, value, slope))
            else:
                terms.append(Term(held, j, value, 0.0))
                terms.append(Term(tuple(dict.fromkeys((*held, own(j)))), j, 0.0, slope))
    terms = [term for term in terms if term.constant or term.slope]
    return Logic(tuple(flags), tuple(terms), tuple(on(i) for i in counted))


def wanted_change(site: ClampSite, x: Array) -> Array:
    """Δ as the clamp itself computes it, in float64: x [n, d] → [n, d]."""
    pre = x @ site.W_enc.astype(np.float64) + site.b_enc
    a = np.where(pre > site.theta, np.maximum(pre, 0), 0)
    gate = ((a > site.trigger).astype(np.float64) @ site.route.T.astype(np.float64)) > 0
    edited = np.where(gate, site.value + site.scale * a, a)
    return (edited - a) @ site.W_dec.astype(np.float64)


# --------------------------------------------------------------------------- the two layers


@dataclass(frozen=True)
class Setting:
    """The numbers that `rule.py` chooses for one site."""

    zeta: tuple[float, ...]
    """[f] ζ: how far above its threshold a feature counts as on without doubt."""
    sharpness: float
    """C: the reference's gate is C/r̃."""
    gain_a: float
    """1 + w of layer A's norm on its channels: how small flags are written. Without norm: γ."""
    step: float
    """K."""
    gain_b: float
    """1 + w of layer B's norm on the base's channels, far above rms(Δ). Without norm: infinite."""
    loud: float
    """L of `alarms.py`."""
    loudest: float
    """What layer B reads of that channel at most."""


@dataclass(frozen=True)
class Place:
    """Where a site's flags lie in the stream."""

    reference: int
    """Channel of ρ."""
    flags: tuple[int, ...]
    """Channels of φ."""


def flag_layer(
    site: ClampSite, logic: Logic, stream: Stream, place: Place, setting: Setting
) -> MLP:
    """Layer A: the reference R into `reference` and every flag, minus N_i into flag i."""
    gates = [stream.constant(setting.sharpness)]
    gates += [
        off_row(site, flag, stream, setting.sharpness, zeta)
        for flag, zeta in zip(logic.flags, setting.zeta, strict=True)
    ]
    n = len(gates)
    down = np.zeros((stream.width, n))
    down[[place.reference, *place.flags], 0] = 1
    down[list(place.flags), np.arange(1, n)] = -1
    gain = np.zeros(stream.width)
    gain[[place.reference, *place.flags]] = setting.gain_a
    ups = np.stack([stream.constant(1.0)] * n)
    return MLP(np.stack(gates), ups, down, gain, stream.before)


def off_row(site: ClampSite, flag: Flag, stream: Stream, sharpness: float, zeta: float) -> Array:
    """The row [D] of C·(1 - z/ζ)."""
    w = site.W_enc[:, flag.feature].astype(np.float64)
    b = float(site.b_enc[flag.feature]) - flag.threshold
    return sharpness / zeta * stream.affine(-w, zeta - b)


def action_layer(
    site: ClampSite, logic: Logic, stream: Stream, place: Place, setting: Setting
) -> MLP:
    """Layer B: every term along its decoder row, what all of them are divided by, and what takes
    the flags off.
    """
    along = stream.scale * DIVISOR / (np.sqrt(stream.width) * setting.gain_b)
    divisor, floor = stream.constants[:2]  # gain 0: what is written there stays nowhere
    neurons = []
    for term in logic.terms:
        column = np.zeros(stream.width)
        column[: stream.d] = along * site.W_dec[term.target]
        w = term.slope * site.W_enc[:, term.target].astype(np.float64)
        b = term.slope * float(site.b_enc[term.target]) + term.constant
        gate = and_row(term.flags, place, stream, setting.step)
        neurons.append((gate, stream.affine(w, b), column))
    divisors: list[tuple[tuple[int, ...], int, float]] = [
        ((flag,), divisor, 1.0) for flag in logic.counted
    ] or [((), divisor, 1.0)]
    if logic.counted:
        divisors.append(((), floor, FLOOR))
    own = (place.reference, *place.flags)
    for flags, channel, size in divisors:
        gate = and_row(flags, place, stream, setting.step)
        one = stream.constant(1.0)
        neurons.append((gate, one, unit(stream.width, channel, DIVISOR * size)))
        back = -DIVISOR * size / (np.sqrt(stream.width) * setting.gain_b)
        for flag in own:
            up = unit(stream.width, flag, 1.0)
            neurons.append((gate, up, unit(stream.width, flag, back)))
    gain = np.zeros(stream.width)
    gain[[*range(stream.d), *own]] = setting.gain_b
    gates, ups, columns = (list(each) for each in zip(*neurons, strict=True))
    return MLP(np.stack(gates), np.stack(ups), np.stack(columns, axis=1), gain, stream.before)


def and_row(flags: Sequence[int], place: Place, stream: Stream, step: float) -> Array:
    """The row [D] of K·(φ_1 + … + φ_n - (n - 1)·ρ); of K·ρ where n is 0."""
    row = np.zeros(stream.width)
    row[[place.flags[flag] for flag in flags]] = step
    row[place.reference] = step * (1 - len(flags))
    return row


def unit(width: int, channel: int, size: float) -> Array:
    """A row [D] that reads one channel, or a column that writes it."""
    column = np.zeros(width)
    column[channel] = size
    return column
