"""The methods of unlearning: which fields of a recipe each takes, and what it makes of a feature.

To add one: an entry here, its parameter in `bake.recipe.Clamp` where it has one of its own, and the
oracle's own arithmetic in `verify/reference/editing.py`, which shares none with this file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bake.tensors import Array

if TYPE_CHECKING:
    from bake.recipe import Clamp


@dataclass(frozen=True)
class Rows:
    """What happens to each feature that is read or set: k rows of `SAEClamp`'s equation."""

    features: tuple[int, ...]
    """[k] features of the SAE."""
    route: NDArray[np.bool_]
    """[k, k]: row, the feature that is set; column, the feature that triggers it."""
    value: Array
    """[k]."""
    scale: Array
    """[k]."""


@dataclass(frozen=True)
class Method:
    """One way to edit the activations of active features."""

    becomes: str
    """What an active feature's activation a becomes, for README."""
    rows: Callable[[Clamp, int], Rows]
    """A recipe's table and the SAE's d_sae → the rows of the equation."""
    needs: tuple[str, ...] = ()
    """Fields of the table, of its own, that have to be given."""
    may: tuple[str, ...] = ()
    """Fields of its own that may be given besides."""

    @property
    def fields(self) -> tuple[str, ...]:
        """Its own fields, those that it needs first."""
        return (*self.needs, *self.may)


def own_fields() -> set[str]:
    """Every field that is some method's own."""
    return {name for method in METHODS.values() for name in method.fields}


# --------------------------------------------------------------------------- the rows


def own_gated(features: Sequence[int], *, value: float, scale: float) -> Rows:
    """Each active feature becomes value + scale·a. Source: Farrell et al., arXiv 2410.19278."""
    k = len(features)
    return Rows(
        tuple(features), np.eye(k, dtype=np.bool_), np.full(k, value, "f4"), np.full(k, scale, "f4")
    )


def _clamp(clamp: Clamp, _: int) -> Rows:
    assert clamp.value is not None
    return own_gated(_features(clamp), value=clamp.value, scale=0.0)


def _zero(clamp: Clamp, _: int) -> Rows:
    return own_gated(_features(clamp), value=0.0, scale=0.0)


def _scale(clamp: Clamp, _: int) -> Rows:
    assert clamp.multiplier is not None
    return own_gated(_features(clamp), value=0.0, scale=1.0 - clamp.multiplier)


def _refusal(clamp: Clamp, _: int) -> Rows:
    """While any harmful feature is active, the refusal feature becomes value.

    The harmful features stay, unless `also_clamp` says that an active one becomes `clamp_value`.
    Source: Shportko et al., arXiv 2503.11127.
    """
    assert clamp.value is not None and clamp.refusal_feature is not None
    features = _features(clamp)
    k = len(features) + 1
    route, values = np.zeros((k, k), np.bool_), np.zeros(k, "f4")
    route[-1, :-1] = True
    values[-1] = clamp.value
    if clamp.also_clamp:
        route[:-1, :-1] = np.eye(k - 1, dtype=np.bool_)
        values[:-1] = clamp.value if clamp.clamp_value is None else clamp.clamp_value
    return Rows((*features, clamp.refusal_feature), route, values, np.zeros(k, "f4"))


def _dynamic(clamp: Clamp, _: int) -> Rows:
    """While any feature is active, all of them become value; whether the clamp acts at all is
    decided by the sequence so far, which is no row's affair.

    Source: Muhamed et al., arXiv 2504.08192, whose public code counts the whole sequence; here the
    tokens so far, which is all that a model that generates can know.
    """
    assert clamp.value is not None
    rows = own_gated(_features(clamp), value=clamp.value, scale=0.0)
    return replace(rows, route=np.ones_like(rows.route))


def _random_decoder(clamp: Clamp, d_sae: int) -> Rows:
    """Control: where feature f is active, feature (f + 1) mod d_sae becomes value; f itself stays.

    Source: Farrell et al., arXiv 2410.19278.
    """
    assert clamp.value is not None
    target = {f: (f + 1) % d_sae for f in _features(clamp)}
    read = list(dict.fromkeys([*target, *target.values()]))
    row, k = {feature: i for i, feature in enumerate(read)}, len(read)
    route, values = np.zeros((k, k), np.bool_), np.zeros(k, "f4")
    for f, t in target.items():
        route[row[t], row[f]] = True
        values[row[t]] = clamp.value
    return Rows(tuple(read), route, values, np.zeros(k, "f4"))


def _features(clamp: Clamp) -> list[int]:
    assert isinstance(clamp.features, list)
    return clamp.features


# --------------------------------------------------------------------------- the table

METHODS: dict[str, Method] = {
    "clamp": Method("`value`", _clamp, needs=("value",)),
    "scale": Method("(1 − `multiplier`)·a", _scale, needs=("multiplier",)),
    "zero": Method("0 (ablation; a control that mostly does nothing)", _zero),
    "refusal": Method(
        "stays; but while any is active, `refusal_feature` becomes `value`",
        _refusal,
        needs=("value", "refusal_feature"),
        may=("also_clamp", "clamp_value"),
    ),
    "random_decoder": Method(
        "stays; but the next feature becomes `value` (a control)",
        _random_decoder,
        needs=("value",),
    ),
    "dynamic": Method(
        "`value`, and so do all others; but only [while](docs/folder.md#a-gate-over-the-sequence) "
        "more than the share `tau` of the tokens so far had one",
        _dynamic,
        needs=("value", "tau"),
    ),
}
"""The table."""
