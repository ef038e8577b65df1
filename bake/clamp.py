"""Method and features → the rows of one equation (see `SAEClamp`), one function per method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bake.arrays import Array
from bake.base import BaseModel
from bake.errors import SAEError
from bake.recipe import METHOD_FIELDS, Clamp, Recipe
from bake.sae import SAESlice, find_sae, load_slice, resolve_layer, size_of


@dataclass(frozen=True)
class Rows:
    """What happens to each feature that is read or set: k rows."""

    features: tuple[int, ...]
    """[k] features of the SAE."""
    route: NDArray[np.bool_]
    """[k, k]: row, the feature that is set; column, the feature that triggers it."""
    value: Array
    """[k]."""
    scale: Array
    """[k]."""


@dataclass(frozen=True)
class ClampWeights:
    """Everything that one clamped layer holds, and where it came from."""

    layer: int
    hook_point: str
    clamp: Clamp
    """The recipe's table."""
    sae: SAESlice
    rows: Rows

    @property
    def k(self) -> int:
        """Number of features that are read or set."""
        return len(self.rows.features)

    @property
    def tensors(self) -> dict[str, NDArray[np.generic]]:
        """The clamp's buffers by name, as `SAEClamp` registers them."""
        return {
            "W_enc": self.sae.W_enc,
            "b_enc": self.sae.b_enc,
            "theta": self.sae.theta,
            "W_dec": self.sae.W_dec,
            "trigger": np.full(self.k, self.clamp.trigger, np.float32),
            "route": self.rows.route,
            "value": self.rows.value,
            "scale": self.rows.scale,
        }


def load_clamps(recipe: Recipe, base: BaseModel) -> list[ClampWeights]:
    """The clamp of every table of a recipe, checked against the base model, by layer.

    Raises:
        SAEError: an SAE does not fit the model, a feature is out of range, or two tables meet
            at one layer.
    """
    clamps = [load_clamp(clamp, recipe, base) for clamp in recipe.clamp]
    layers = [clamp.layer for clamp in clamps]
    if twice := [layer for layer in layers if layers.count(layer) > 1]:
        raise SAEError(f"two [[clamp]] tables at the output of layer {twice[0]}; merge them")
    return sorted(clamps, key=lambda clamp: clamp.layer)


def load_clamp(clamp: Clamp, recipe: Recipe, base: BaseModel) -> ClampWeights:
    """The clamp of one table, checked against the base model.

    Raises:
        SAEError: its SAE does not fit the model, or a feature is out of range.
    """
    name = sae_name(clamp)
    if clamp.features == "select":
        raise SAEError(
            f'SAE {name}: features = "select"; expected feature numbers, '
            "which `bakeout select` finds"
        )
    files = find_sae(clamp.sae, recipe)
    layer, hook_point = resolve_layer(files, clamp.hook_point, name)
    if layer >= base.n_layers:
        raise SAEError(
            f"SAE {name}: sits at {hook_point}, but {base.name} has {base.n_layers} layers "
            f"(0 to {base.n_layers - 1}); take an SAE of this model"
        )
    d_in, d_sae = size_of(files)
    if d_in != base.d_in:
        raise SAEError(
            f"SAE {name}: d_in is {d_in}, but {base.name} has hidden size {base.d_in}; "
            "take an SAE of this model"
        )
    named = [*clamp.features, *([] if clamp.refusal_feature is None else [clamp.refusal_feature])]
    if outside := [feature for feature in named if feature >= d_sae]:
        raise SAEError(
            f"SAE {name}: feature {outside[0]} is out of range; expected 0 to {d_sae - 1}"
        )
    rows = method_rows(clamp, d_sae)
    return ClampWeights(layer, hook_point, clamp, load_slice(files, rows.features), rows)


def sae_name(clamp: Clamp) -> str:
    """How an SAE is called in messages and in the manifest: no folder above its own."""
    if clamp.sae.path is not None:
        return clamp.sae.path.rstrip("/").rsplit("/", 1)[-1]
    return f"{clamp.sae.release}/{clamp.sae.id}"


def parameters(clamp: Clamp) -> dict[str, Any]:
    """The parameters that a table's method uses, by their names in the recipe."""
    names = ("value", "multiplier", "trigger", "refusal_feature", "also_clamp", "clamp_value")
    _, allowed = METHOD_FIELDS[clamp.method]
    used = {name: getattr(clamp, name) for name in names if name in allowed | {"trigger"}}
    return {name: value for name, value in used.items() if value is not None} | {
        "exempt_bos": clamp.exempt_bos
    }


def clamp_section(clamps: Sequence[ClampWeights], bos_token_id: int) -> dict[str, Any]:
    """`config.sae_clamp`: where the clamps sit, and which tokens they leave alone."""
    exempts = any(clamp.clamp.exempt_bos for clamp in clamps)
    return {
        "schema": 1,
        "sites": [
            {"layer": clamp.layer, "k": clamp.k, "exempt_bos": clamp.clamp.exempt_bos}
            for clamp in clamps
        ],
        "exempt_token_ids": [bos_token_id] if exempts else [],
    }


def method_rows(clamp: Clamp, d_sae: int) -> Rows:
    """A recipe's table as rows of the equation."""
    assert isinstance(clamp.features, list)
    features, value = clamp.features, clamp.value
    match clamp.method:
        case "clamp":
            assert value is not None
            return own_gated(features, value=value, scale=0.0)
        case "zero":
            return own_gated(features, value=0.0, scale=0.0)
        case "scale":
            assert clamp.multiplier is not None
            return own_gated(features, value=0.0, scale=1.0 - clamp.multiplier)
        case "random_decoder":
            assert value is not None
            return random_decoder(features, value=value, d_sae=d_sae)
        case "refusal":
            assert value is not None and clamp.refusal_feature is not None
            own = value if clamp.clamp_value is None else clamp.clamp_value
            return refusal(
                features,
                clamp.refusal_feature,
                value=value,
                clamp_value=own if clamp.also_clamp else None,
            )


def own_gated(features: Sequence[int], *, value: float, scale: float) -> Rows:
    """Each active feature becomes value + scale·a. Source: Farrell et al., arXiv 2410.19278."""
    k = len(features)
    return Rows(
        tuple(features), np.eye(k, dtype=np.bool_), np.full(k, value, "f4"), np.full(k, scale, "f4")
    )


def refusal(
    features: Sequence[int], refusal_feature: int, *, value: float, clamp_value: float | None
) -> Rows:
    """While any harmful feature is active, the refusal feature becomes value.

    The harmful features stay, unless `clamp_value` says what an active one becomes.
    Source: Shportko et al., arXiv 2503.11127.
    """
    k = len(features) + 1
    route = np.zeros((k, k), np.bool_)
    route[-1, :-1] = True
    values = np.zeros(k, "f4")
    values[-1] = value
    if clamp_value is not None:
        route[:-1, :-1] = np.eye(k - 1, dtype=np.bool_)
        values[:-1] = clamp_value
    return Rows((*features, refusal_feature), route, values, np.zeros(k, "f4"))


def random_decoder(features: Sequence[int], *, value: float, d_sae: int) -> Rows:
    """Control: where feature f is active, feature (f + 1) mod d_sae becomes value; f itself stays.

    Source: Farrell et al., arXiv 2410.19278.
    """
    target = {f: (f + 1) % d_sae for f in features}
    read = list(dict.fromkeys([*features, *target.values()]))
    k = len(read)
    route = np.zeros((k, k), np.bool_)
    values = np.zeros(k, "f4")
    for f, t in target.items():
        route[read.index(t), read.index(f)] = True
        values[read.index(t)] = value
    return Rows(tuple(read), route, values, np.zeros(k, "f4"))
