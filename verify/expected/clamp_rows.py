"""A clamp's tensors, by the whole SAE and the recipe's own numbers: what questions never touch is
compared too.

Folded here from what sae_lens loads, in float64; shares no arithmetic with `bake`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bake.recipe import Clamp
from bake.rounding import EPSILON
from verify.report.findings import Failure

if TYPE_CHECKING:
    from torch import Tensor

    from verify.reference.whole_sae import Site

Numbers = NDArray[Any]
FACTORS = 4.0
"""Roundings of a stored number by its own size, at most: an SAE's number is read in float32, is
multiplied by a factor that is itself rounded, and the product is rounded, here or by sae_lens; the
fourth is the folder's."""
SUMS = 8.0
"""The same of a sum, by the size of all that is added: both factors of every product are rounded as
above."""


@dataclass(frozen=True)
class Expected:
    """What one tensor of a clamp must hold, and how far rounding may move each number: float64."""

    value: Numbers
    bound: Numbers | float = 0.0


@dataclass(frozen=True)
class Edit:
    """What a recipe's table does: which features are read or set, and how."""

    features: tuple[int, ...]
    """[k], in the order of the tensors."""
    triggers: Mapping[int, tuple[int, ...]]
    """By the feature that is set, those any of which triggers it."""
    value: Mapping[int, float]
    """By the feature that is set: the constant part of what it becomes."""
    scale: Mapping[int, float]
    """And the factor on its activation."""


def expected_tensors(site: Site) -> dict[str, Expected]:
    """Every tensor of a clamp by its name in a folder."""
    edit = edit_of(site.clamp, int(site.sae.cfg.d_sae))
    features, u = list(edit.features), EPSILON["float32"]
    read = _read_topk if site.sae.cfg.architecture() == "topk" else _read
    route = np.array(
        [[i in edit.triggers.get(j, ()) for i in features] for j in features], np.bool_
    )
    trigger = np.full(len(features), site.clamp.trigger)
    value, scale = (np.array([of.get(j, 0.0) for j in features]) for of in (edit.value, edit.scale))
    return {
        **read(site.sae, features),
        "trigger": Expected(trigger, u * trigger),
        "route": Expected(route),
        "value": Expected(value, u * np.abs(value)),
        "scale": Expected(scale, u * np.abs(scale)),
    }


def tensor_failures(
    layer: int,
    expected_by_name: Mapping[str, Expected],
    found: Mapping[str, Numbers],
    engine: str,
    file: str,
) -> Iterator[Failure]:
    """What of a clamp's tensors is not the SAE's and the recipe's.

    Args:
        layer: of the clamp.
        expected_by_name: what `expected_tensors` gives.
        found: the folder's tensors by name.
        engine: that loads them.
        file: in which they lie.

    Returns:
        One failure of kind `integrity` for each tensor.
    """
    for name, expected in expected_by_name.items():
        where = f"{file}: {name} at layer {layer}"
        array = found.get(name)
        if array is None or array.shape != expected.value.shape:
            shape = None if array is None else str(list(array.shape))
            what = f"{where} has shape {shape}, expected {list(expected.value.shape)}"
            yield Failure("integrity", engine, what, shape, str(list(expected.value.shape)))
            continue
        dtype = "bool" if expected.value.dtype == np.bool_ else "float32"
        if str(array.dtype) != dtype:
            what = f"{where} is {array.dtype}, expected {dtype}"
            yield Failure("integrity", engine, what, str(array.dtype), dtype)
            continue
        off = np.abs(array.astype(np.float64) - expected.value.astype(np.float64))
        off[~np.isfinite(off)] = np.inf
        over = off - np.asarray(expected.bound)
        if (over > 0).any():
            at = np.unravel_index(int(over.argmax()), over.shape)
            measured, bar = float(array[at]), float(expected.value[at])
            place = ", ".join(str(int(i)) for i in at)
            what = (
                f"{where} is not the recipe's: [{place}] is {measured:.9g}, expected {bar:.9g} "
                f"({int((over > 0).sum())} of {over.size} numbers differ)"
            )
            yield Failure("integrity", engine, what, measured, bar)


# --------------------------------------------------------------------------- what is read


def _read(sae: Any, features: list[int]) -> dict[str, Expected]:
    """Encoder columns, biases, thresholds and decoder rows: pre = x @ W_enc + b_enc, a feature's
    activation is pre where pre > theta (and 0 where pre < 0).

    Source: sae_lens, `encode` of its standard, JumpReLU and gated SAEs.
    """
    u = EPSILON["float32"]
    W, rows = _numpy(sae.W_enc)[:, features], _numpy(sae.W_dec)[features]
    kind = sae.cfg.architecture()
    if kind == "gated":
        # It fires where x·W + b_gate > 0, with activation relu(x·W·e^r + b_mag). Times e^r:
        # pre - b_mag + b_gate·e^r > 0.
        gain = np.exp(_numpy(sae.r_mag)[features])
        bias, gate = _numpy(sae.b_mag)[features], _numpy(sae.b_gate)[features] * gain
        W = W * gain
        theta = Expected(bias - gate, SUMS * u * (np.abs(bias) + np.abs(gate)))
    else:
        bias = _numpy(sae.b_enc)[features]
        limit = _numpy(sae.threshold)[features] if kind == "jumprelu" else np.zeros_like(bias)
        theta = Expected(limit, FACTORS * u * np.abs(limit))
    size = np.abs(bias)
    if sae.cfg.apply_b_dec_to_input:  # (x - b_dec) @ W + b = x @ W + (b - b_dec @ W)
        b_dec = _numpy(sae.b_dec)
        bias, size = bias - b_dec @ W, size + np.abs(b_dec) @ np.abs(W)
    return {
        "W_enc": Expected(W, FACTORS * u * np.abs(W)),
        "b_enc": Expected(bias, SUMS * u * size),
        "theta": theta,
        "W_dec": Expected(rows, FACTORS * u * np.abs(rows)),
    }


def _read_topk(sae: Any, features: list[int]) -> dict[str, Expected]:
    """The whole encoder, the features in front: pre = (x @ W_enc) · gain + b_enc, and a feature's
    activation is pre where pre is among the k largest of all (and 0 where pre < 0).

    Source: sae_lens, `encode` and `decode` of its TopK SAE.
    """
    u, rest = EPSILON["float32"], np.ones(int(sae.cfg.d_sae), np.bool_)
    rest[features] = False
    order = [*features, *np.flatnonzero(rest).tolist()]
    gain = np.ones(len(order))
    if sae.cfg.rescale_acts_by_decoder_norm:
        gain = _numpy(sae.W_dec.norm(dim=-1))
    bias, size = _numpy(sae.b_enc), np.abs(_numpy(sae.b_enc))
    if sae.cfg.apply_b_dec_to_input:
        b_dec = _numpy(sae.b_dec)
        bias = bias - b_dec @ _numpy(sae.W_enc)
        size = size + np.abs(b_dec) @ np.abs(_numpy(sae.W_enc))
    rows = _numpy(sae.W_dec)[features] / gain[features, None]
    return {
        # As it is stored, so that nothing may differ.
        "W_enc": Expected(_numpy(sae.W_enc)[:, order]),
        "b_enc": Expected((bias * gain)[order], SUMS * u * (size * gain)[order]),
        "gain": Expected(gain[order], FACTORS * u * gain[order]),
        "W_dec": Expected(rows, FACTORS * u * np.abs(rows)),
    }


def _numpy(tensor: Tensor) -> Numbers:
    found: Numbers = tensor.detach().double().cpu().numpy()
    return found


# --------------------------------------------------------------------------- what is done


def edit_of(clamp: Clamp, d_sae: int) -> Edit:
    """What a table does, found by trying it on codes with one active feature.

    For any method whose every set feature becomes value + scale·a while any of its triggers is
    active: one trigger at a time says which, two activations of the set feature say both numbers.

    Args:
        clamp: the table, with its features named.
        d_sae: of the SAE.
    """
    import torch

    from verify.reference.editing import edit_code

    assert isinstance(clamp.features, list)
    read, n = clamp.features, len(clamp.features)
    low = 2.0 ** math.floor(math.log2(2 * clamp.trigger + 1))  # active, and so is twice as much
    places, rows = torch.tensor(read), torch.arange(n)

    def codes(count: int, others: float, idle: float = -1.0) -> Tensor:
        """[count, d_sae]: nothing active that is read."""
        rest = torch.full((count, d_sae), others, dtype=torch.float64)
        rest[:, places] = idle
        return rest

    # Each alone, twice, for a number may be what it becomes: what changes is what it triggers.
    changed = torch.zeros(n, d_sae, dtype=torch.bool)
    for active, others, idle in ((low, low, -1.0), (2 * low, 3 * low, -2.0)):
        alone = codes(n, others, idle)
        alone[rows, places] = active
        changed |= edit_code(alone, clamp) != alone
    triggers: dict[int, list[int]] = {}
    for i, j in changed.nonzero().tolist():
        triggers.setdefault(j, []).append(read[i])
    features = (*read, *(j for j in _in_order(changed, read) if j not in read))
    # Both numbers of each feature that is set, from two activations of it.
    pair = codes(2 * len(triggers), low)
    for row, (j, by) in enumerate(triggers.items()):
        pair[2 * row : 2 * row + 2, by[0] if j not in by else j] = low
        pair[2 * row : 2 * row + 2, j] = torch.tensor([low, 2 * low], dtype=torch.float64)
    after = edit_code(pair, clamp)
    values, scales = {}, {}
    for row, j in enumerate(triggers):
        first, second = after[2 * row : 2 * row + 2, j].tolist()
        scales[j] = (second - first) / low
        values[j] = first - scales[j] * low
    return Edit(features, {j: tuple(by) for j, by in triggers.items()}, values, scales)


def _in_order(changed: Tensor, read: list[int]) -> list[int]:
    """Features that are set, [k, d_sae] → by the first that triggers them."""
    found = (int(j) for row in changed for j in row.nonzero())
    return list(dict.fromkeys(j for j in found if j not in read))
