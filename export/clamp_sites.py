"""The clamps of a folder, as their tensors lie in its safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bake.tensors import DTYPES, StoredTensor

CLAMP_TENSORS = ("W_enc", "b_enc", "theta", "W_dec", "trigger", "route", "value", "scale")
"""What a clamp's tensors are called, in the order of the operator's inputs."""
TOPK_TENSORS = ("W_enc", "b_enc", "gain", "W_dec", "trigger", "route", "value", "scale")
"""The same of a TopK SAE's."""


@dataclass(frozen=True)
class ClampSite:
    """One clamp of a checkpoint: the rows of `SAEClamp`'s equation."""

    layer: int
    """Decoder layer of the base whose output is edited."""
    exempt_bos: bool
    W_enc: NDArray[np.float32]
    """[d, k]; of a TopK SAE those of the k features."""
    b_enc: NDArray[np.float32]
    """[k], like theta, trigger, value and scale; of a TopK SAE [d_sae]."""
    theta: NDArray[np.float32]
    """Of a TopK SAE none: `[0]`."""
    W_dec: NDArray[np.float32]
    """[k, d]."""
    trigger: NDArray[np.float32]
    route: NDArray[np.bool_]
    """[k, k]: row, the feature that is set; column, the feature that triggers it."""
    value: NDArray[np.float32]
    scale: NDArray[np.float32]
    topk: TopK | None = None
    tau: float | None = None
    """Of a sequence gate, the share of tokens that must have fired."""

    @property
    def said(self) -> dict[str, Any]:
        """What `config.sae_clamp` says of it."""
        own = {"layer": self.layer, "k": len(self.value), "exempt_bos": self.exempt_bos}
        gate = {} if self.tau is None else {"tau": self.tau}
        return own | gate | (self.topk.said if self.topk else {})


@dataclass(frozen=True)
class TopK:
    """What the clamp of a TopK SAE has besides."""

    topk: int
    """How many features are active on a token."""
    W_enc: StoredTensor
    """[d, d_sae], the k features first."""
    gain: NDArray[np.float32]
    """[d_sae]: what x @ W_enc is multiplied by."""

    @property
    def said(self) -> dict[str, Any]:
        """What `config.sae_clamp` says of it besides."""
        dtype = next(name for name, of in DTYPES.items() if of == self.W_enc.dtype)
        return {"topk": self.topk, "d_sae": self.W_enc.shape[1], "dtype": dtype}


def read_site(tensors: Mapping[str, StoredTensor], prefix: str, site: dict[str, Any]) -> ClampSite:
    """The clamp of one of a config's sites.

    Args:
        tensors: of the folder, by name.
        prefix: what stands before a layer's number in their names.
        site: of the config.

    Raises:
        KeyError, TypeError, ValueError: a tensor is missing, not finite, or of another shape.
    """
    layer, k = int(site["layer"]), int(site["k"])
    prefix = f"{prefix}{layer}.sae_clamp."
    names: tuple[str, ...] = CLAMP_TENSORS
    topk = None
    if "topk" in site:
        names = tuple(name for name in TOPK_TENSORS if name != "W_enc")
        stored = tensors[f"{prefix}W_enc"]
        gain = tensors[f"{prefix}gain"].array()
        topk = TopK(int(site["topk"]), stored, gain)
        if len(stored.shape) != 2 or topk.said != {key: site[key] for key in topk.said}:
            raise ValueError(f"{prefix}W_enc is of another shape or dtype than config.json says")
    arrays = {key: tensors[prefix + key].array() for key in names}
    if topk is not None:
        rows = (topk.W_enc.rows(*rows) for rows in topk.W_enc.blocks())
        arrays["W_enc"] = np.concatenate(
            [_finite(block, f"{prefix}W_enc")[:, :k] for block in rows]
        )
        arrays["theta"] = np.empty(0, np.float32)
        if {_finite(arrays.pop("gain"), f"{prefix}gain").shape, arrays["b_enc"].shape} != {
            topk.W_enc.shape[1:]
        }:
            raise ValueError(f"{prefix}* have other shapes than config.json says")
    for key, array in arrays.items():
        _finite(array, f"{prefix}{key}")
    if arrays["W_enc"].shape[1:] != (k,) or arrays["route"].shape != (k, k):
        raise ValueError(f"{prefix}* have other shapes than config.json says")
    return ClampSite(layer, bool(site["exempt_bos"]), **arrays, topk=topk, tau=site.get("tau"))


def _finite(array: NDArray[Any], name: str) -> NDArray[Any]:
    if not np.isfinite(array).all():
        raise ValueError(f"{name} is not finite")
    return array
