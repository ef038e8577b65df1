"""What the two layers that a clamp was compiled into may read and write at all.

Their numbers follow from what was measured at export, and are held by what the engine says. But
where they lie is known, so that nothing can hide between them that acts on other text: the first
layer reads the residual stream along the features' encoder columns alone, and writes flags; the
second reads flags, and along encoder columns, writes along decoder rows and takes flags off again.
It has neurons beside these that only coarse rounding wakes: a constant holds each of them down.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bake.rounding import EPSILON
from export.manifest import LayersEntry
from verify.expected.clamp_rows import expected_tensors
from verify.expected.weight_files import ADDED_SHARD
from verify.expected.widened_base import ALWAYS, CONSTANTS, Wide
from verify.report.findings import Failure

if TYPE_CHECKING:
    from verify.reference.whole_sae import Site

Rows = NDArray[np.float64]
ROUNDINGS = 3.0
"""Of its numbers, by which a row may be off its direction, against its length."""


@dataclass(frozen=True)
class Layer:
    """The MLP of an added layer, float64."""

    gate: Rows
    """[n, D]."""
    up: Rows
    """[n, D]."""
    down: Rows
    """[n, D], transposed."""
    gain: Rows | None
    """[D]: what the norm behind it multiplies by; None where the family has none."""
    before: Rows
    """[D]: what the norm before it multiplies by."""

    @property
    def written(self) -> Rows:
        """[D]: the largest number that is written into each channel."""
        most: Rows = np.abs(self.down).max(axis=0)
        return most if self.gain is None else np.abs(self.gain)


def added_failures(
    folder: Path, wide: Wide, sites: Sequence[Site], stated: Sequence[LayersEntry], prefix: str
) -> Iterator[Failure]:
    """What of the added layers reads or writes where a clamp does not.

    Args:
        folder: whose other tensors are the base's.
        wide: how it was widened.
        sites: of the recipe, by layer.
        stated: what the manifest says of their layers.
        prefix: before a layer's number in tensor names.
    """
    d, dtype = wide.base.d_in, str(wide.config["dtype"])
    first = wide.flags
    for site, entry in zip(sites, stated, strict=True):
        own = slice(first, first := first + 1 + entry.flags)
        if first > int(wide.config["hidden_size"]):
            what = f"manifest.json: {entry.flags} flags of layer {site.layer} do not fit the width"
            yield Failure("integrity", "compiled", what, entry.flags, None)
            return
        rows = expected_tensors(site)
        read, written = rows["W_enc"].value.T, rows["W_dec"].value
        flags, action = (_layer(folder, f"{prefix}{layer}.", wide) for layer in entry.layers)
        elsewhere = np.ones(int(wide.config["hidden_size"]), np.bool_)
        elsewhere[own] = False
        constants = elsewhere.copy()
        constants[: wide.flags] = False
        base = np.zeros_like(elsewhere)
        base[:d] = True
        beyond = np.ones_like(elsewhere)
        beyond[d : d + ALWAYS] = False
        usual = _norm_gains(wide, site)
        e = ROUNDINGS * EPSILON[dtype]
        told = {
            entry.layers[0]: {
                "its gates read other directions than the encoder's": _off(flags.gate, read, e),
                "its gates read flags": flags.gate[:, own].any() or flags.gate[:, constants].any(),
                "it multiplies by more than a constant": flags.up[:, base].any()
                or flags.up[:, own].any()
                or flags.up[:, constants].any(),
                "it writes beside its flags": flags.written[elsewhere].any(),
                "its norm favours a channel": (flags.before != usual).any(),
            },
            entry.layers[1]: {
                "its gates read more than flags": _mixed(action.gate, own, d),
                "its gates read other directions than the encoder's": _off(action.gate, read, e),
                "its gates read others' flags": action.gate[:, constants].any(),
                "its gates open by themselves": _open(action, own, wide),
                "its norm favours a channel": (action.before != usual)[beyond].any(),
                "it multiplies by other directions than the encoder's": _off(action.up, read, e),
                "it multiplies by flags": _erases_more(action, own)
                or action.up[:, constants].any(),
                "it writes other directions than the decoder's": _off(action.down, written, e),
                "it writes others' flags or constants": action.written[~base & elsewhere].any(),
            },
        }
        for layer, found in told.items():
            for what, wrong in found.items():
                if wrong:
                    text = f"{ADDED_SHARD}: layer {layer}, which holds a clamp: {what}"
                    yield Failure("integrity", "compiled", text, None, None)


def _layer(folder: Path, prefix: str, wide: Wide) -> Layer:
    from safetensors import safe_open

    with safe_open(folder / ADDED_SHARD, framework="pt") as tensors:

        def read(name: str) -> Rows:
            found: Rows = tensors.get_tensor(f"{prefix}{name}.weight").double().numpy()
            return found

        gate, up, down = (read(f"mlp.{name}_proj") for name in ("gate", "up", "down"))
        normed = wide.base.family.norms_after
        gain = wide.norm_adds + read("post_feedforward_layernorm") if normed else None
        before = wide.norm_adds + read(wide.norm_before)
    busy = gate.any(axis=1) | up.any(axis=1) | down.any(axis=0)
    return Layer(gate[busy], up[busy], down.T[busy], gain, before)


def _norm_gains(wide: Wide, site: Site) -> Rows:
    """[D]: what the norm before a clamp's layers multiplies by: 1, but for its own constants."""
    gains = np.ones(int(wide.config["hidden_size"]))
    first = wide.base.d_in + ALWAYS + CONSTANTS * wide.kinds.index(site.clamp.exempt_bos)
    gains[first : first + CONSTANTS] = wide.loudness(site.layer)
    return gains


def _mixed(gates: Rows, own: slice, d: int) -> bool:
    """Whether a gate, [n, D], reads flags and anything else; `own` and constants follow on `d`."""
    others = gates[:, : own.start].any(axis=1) | gates[:, own.stop :].any(axis=1)
    return bool((gates[:, own].any(axis=1) & others).any())


def _open(layer: Layer, own: slice, wide: Wide) -> bool:
    """Whether any gate that reads no flags is not held down by what every token holds, or all but
    the spared ones.
    """
    alarms = ~layer.gate[:, own].any(axis=1) & layer.gate.any(axis=1)
    d = wide.base.d_in
    reads = layer.gate[alarms, d : wide.flags] * layer.before[d : wide.flags]
    return bool((reads[:, :ALWAYS].sum(axis=1) >= 0).any() or (reads.sum(axis=1) >= 0).any())


def _erases_more(layer: Layer, own: slice) -> bool:
    """Whether a neuron multiplies by flags, or writes them, and does more than take one off."""
    ups, downs = layer.up[:, own], layer.down[:, own]
    busy = ups.any(axis=1) | downs.any(axis=1)
    same = (ups[busy] != 0) == (downs[busy] != 0)
    alone = [(rows[busy] != 0).sum(axis=1) == 1 for rows in (layer.up, layer.down)]
    return not (same.all() and alone[0].all() and alone[1].all())


def _off(rows: Rows, directions: Rows, tolerance: float) -> bool:
    """Whether any row, [n, D], has a part in the base's channels that is along none of some
    directions, [k, d]; a row that is along one may be of any size.
    """
    rows = rows[:, : directions.shape[1]]
    lengths = np.linalg.norm(rows, axis=1)
    rows, lengths = rows[lengths > 0], lengths[lengths > 0]
    units = directions / np.maximum(np.linalg.norm(directions, axis=1, keepdims=True), 1e-300)
    along = rows @ units.T  # [n, k]
    for row, length, shares in zip(rows, lengths, along, strict=True):
        best = int(np.abs(shares).argmax())
        if not np.linalg.norm(row - shares[best] * units[best]) <= tolerance * length:
            return True
    return False
