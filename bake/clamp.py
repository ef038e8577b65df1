"""A recipe's clamps as tensors: the SAE's few features, and what happens to each of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bake.base import BaseModel
from bake.errors import SAEError
from bake.methods import METHODS, Rows
from bake.recipe import Clamp, Recipe
from bake.sae.folding import SAESlice, load_slice, size_of
from bake.sae.layouts import SAEFiles, find_sae, resolve_layer
from bake.tensors import DTYPES, n_bytes


@dataclass(frozen=True)
class ClampWeights:
    """Everything that one clamped layer holds, and where it came from."""

    layer: int
    hook_point: str
    clamp: Clamp
    """The recipe's table."""
    sae: SAESlice
    rows: Rows
    hook_point_from: str = "SAE"
    """Who says where it sits: the SAE (its config, or its folders' names), or only the recipe."""

    @property
    def k(self) -> int:
        """Number of features that are read or set."""
        return len(self.rows.features)

    @property
    def site(self) -> dict[str, Any]:
        """What `config.sae_clamp` says of it."""
        said: dict[str, Any] = {"layer": self.layer, "k": self.k}
        said["exempt_bos"] = self.clamp.exempt_bos
        if self.clamp.tau is not None:
            said["tau"] = self.clamp.tau
        if (whole := self.sae.whole) is None:
            return said
        dtype = next(name for name, stored in DTYPES.items() if stored == whole.dtype)
        return {**said, "topk": whole.topk, "d_sae": whole.shape[1], "dtype": dtype}

    @property
    def n_bytes(self) -> int:
        """Of all its buffers."""
        whole = self.sae.whole
        encoder = 0 if whole is None else n_bytes(whole.shape, whole.dtype)
        return encoder + sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def tensors(self) -> dict[str, NDArray[np.generic]]:
        """The clamp's buffers by name, as `SAEClamp` registers them; of a TopK SAE without the
        encoder, `sae.whole`.
        """
        whole = self.sae.whole
        read = {"W_enc": self.sae.W_enc, "b_enc": self.sae.b_enc, "theta": self.sae.theta}
        return {
            **({"b_enc": self.sae.b_enc, "gain": whole.gain} if whole else read),
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
    if twice := [layer for layer, n in Counter(layers).items() if n > 1]:
        raise SAEError(f"two [[clamp]] tables at the output of layer {twice[0]}; merge them")
    return sorted(clamps, key=lambda clamp: clamp.layer)


def load_clamp(clamp: Clamp, recipe: Recipe, base: BaseModel) -> ClampWeights:
    """The clamp of one table, checked against the base model.

    Raises:
        SAEError: its SAE does not fit the model, or a feature is out of range.
    """
    if clamp.features == "select":
        raise SAEError(
            f'SAE {sae_name(clamp)}: features = "select"; expected feature numbers, '
            "which `bakeout select` finds"
        )
    site = find_site(clamp, recipe, base)
    rows = site.rows(clamp)
    piece = load_slice(site.files, rows.features)
    _check_finite(site, rows, piece)
    says = "recipe" if site.files.hook_point is None else "SAE"
    return ClampWeights(site.layer, site.hook_point, clamp, piece, rows, says)


def _check_finite(site: SAESite, rows: Rows, piece: SAESlice) -> None:
    """Raise SAEError where what the clamp writes, (value + scale · a) · decoder row, is beyond
    float32 for activations of 1.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        factor = np.abs(rows.value) + np.abs(rows.scale)
        largest = (factor[:, None] * np.abs(piece.W_dec)).sum(0, dtype=np.float32).max(initial=0)
    if not np.isfinite(largest):
        said = {key: getattr(site.clamp, key) for key in ("value", "multiplier", "clamp_value")}
        stated = ", ".join(f"{key} {number}" for key, number in said.items() if number is not None)
        raise SAEError(
            f"SAE {site.name}: {stated}, times the SAE's decoder rows, is beyond float32; expected "
            "a product that float32 holds. Name a smaller number in the recipe"
        )


@dataclass(frozen=True)
class SAESite:
    """A table's SAE: its files, and the layer whose output it reads."""

    clamp: Clamp
    files: SAEFiles
    layer: int
    hook_point: str
    d_in: int
    d_sae: int

    @property
    def name(self) -> str:
        """Of the SAE."""
        return sae_name(self.clamp)

    def rows(self, clamp: Clamp) -> Rows:
        """What a table over this SAE does with each feature.

        Raises:
            SAEError: a feature is out of range.
        """
        assert isinstance(clamp.features, list)
        named = [*clamp.features, clamp.refusal_feature or 0]
        if outside := [feature for feature in named if feature >= self.d_sae]:
            raise SAEError(
                f"SAE {self.name}: feature {outside[0]} is out of range; expected 0 to "
                f"{self.d_sae - 1}"
            )
        return METHODS[clamp.method].rows(clamp, self.d_sae)


def find_site(clamp: Clamp, recipe: Recipe, base: BaseModel) -> SAESite:
    """Locate a table's SAE and check that it belongs to the model.

    Raises:
        SAEError: it is missing, of another model, or does not say where it sits.
    """
    name, files = sae_name(clamp), find_sae(clamp.sae, recipe)
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
    return SAESite(clamp, files, layer, hook_point, d_in, d_sae)


def sae_name(clamp: Clamp) -> str:
    """How an SAE is called in messages and in the manifest: no folder above its own."""
    if clamp.sae.path is not None:
        return clamp.sae.path.rstrip("/").rsplit("/", 1)[-1]
    return f"{clamp.sae.release}/{clamp.sae.id}"


def clamp_section(clamps: Sequence[ClampWeights], bos_token_id: int) -> dict[str, Any]:
    """`config.sae_clamp`: where the clamps sit, and which tokens they leave alone."""
    exempts = any(clamp.clamp.exempt_bos for clamp in clamps)
    gated = any(clamp.clamp.tau is not None for clamp in clamps)
    return {
        "schema": 2 if gated else 1,  # 1 is read by code that knows no sequence gate
        "sites": [clamp.site for clamp in clamps],
        "exempt_token_ids": [bos_token_id] if exempts else [],
    }
