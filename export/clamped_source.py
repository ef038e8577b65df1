"""A clamped checkpoint on disk, as the other exports read it: headers and the clamp's tensors."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bake.errors import FolderError
from bake.families import FAMILIES, Family
from bake.tensors import StoredTensor
from export.carriers.checkpoint import GUARD
from export.clamped import AGAIN, CLAMP_TENSORS, Clamped, open_clamped
from export.manifest import Manifest

_AS_RUN = (
    *("head_dim", "layer_types", "num_key_value_heads", "query_pre_attn_scalar", "rms_norm_eps"),
)
"""Fields, besides the activation's, that transformers fills or reads otherwise than they stand."""


@dataclass(frozen=True)
class ClampSite:
    """One clamp of a checkpoint: the rows of `SAEClamp`'s equation."""

    layer: int
    """Decoder layer of the base whose output is edited."""
    exempt_bos: bool
    W_enc: NDArray[np.float32]
    """[d, k]."""
    b_enc: NDArray[np.float32]
    """[k], like theta, trigger, value and scale."""
    theta: NDArray[np.float32]
    W_dec: NDArray[np.float32]
    """[k, d]."""
    trigger: NDArray[np.float32]
    route: NDArray[np.bool_]
    """[k, k]: row, the feature that is set; column, the feature that triggers it."""
    value: NDArray[np.float32]
    scale: NDArray[np.float32]


@dataclass(frozen=True)
class ClampedSource:
    """A clamped checkpoint, checked for completeness; no weight of the base was read."""

    folder: Path
    model_type: str
    """The base's: gemma, gemma2, gemma3_text or gemma3."""
    config: dict[str, Any] = field(repr=False)
    """The base's config.json: no clamp, no guard before the activation, and what transformers
    makes of it in the fields of `_AS_RUN`."""
    manifest: Manifest = field(repr=False)
    tensors: dict[str, StoredTensor] = field(repr=False)
    """The base's tensors by name."""
    sites: tuple[ClampSite, ...]
    """By layer."""
    exempt_token_ids: tuple[int, ...]
    """Tokens that a site with `exempt_bos` leaves alone."""

    @property
    def family(self) -> Family:
        """The base's."""
        return FAMILIES[self.model_type]

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name

    @property
    def base_files(self) -> list[str]:
        """The base's weight files."""
        return sorted({tensor.file.name for tensor in self.tensors.values()})

    @property
    def size(self) -> int:
        """Bytes of the base's weight files."""
        return sum((self.folder / name).stat().st_size for name in self.base_files)


def open_source(folder: Path) -> ClampedSource:
    """Open a clamped checkpoint.

    Raises:
        FolderError: it is none, is incomplete or damaged, or carries the clamp otherwise.
    """
    clamped = open_clamped(folder)
    section = clamped.config.sae_clamp
    try:
        sites = [_read_site(clamped, site) for site in section["sites"]]
        exempt = tuple(int(token) for token in section["exempt_token_ids"])
    except (KeyError, TypeError, ValueError) as error:
        raise FolderError(
            f"{folder}: its clamp cannot be read ({type(error).__name__}: {error}); {AGAIN}"
        ) from error
    model_type = clamped.config.model_type.removeprefix("clamped_")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return ClampedSource(
        folder=folder,
        model_type=model_type,
        config=_stock_config(config, clamped.config, model_type),
        manifest=clamped.manifest,
        tensors={n: t for n, t in clamped.tensors.items() if ".sae_clamp." not in n},
        sites=tuple(sorted(sites, key=lambda site: site.layer)),
        exempt_token_ids=exempt,
    )


def _read_site(clamped: Clamped, site: dict[str, Any]) -> ClampSite:
    layer, k = int(site["layer"]), int(site["k"])
    prefix = f"{clamped.layer_prefix}{layer}.sae_clamp."
    arrays = {key: clamped.tensors[prefix + key].array() for key in CLAMP_TENSORS}
    for key, array in arrays.items():
        if not np.isfinite(array).all():
            raise ValueError(f"{prefix}{key} is not finite")
    if arrays["W_enc"].shape[1:] != (k,) or arrays["route"].shape != (k, k):
        raise ValueError(f"{prefix}* have other shapes than config.json says")
    return ClampSite(layer, bool(site["exempt_bos"]), **arrays)


def _stock_config(config: dict[str, Any], loaded: Any, model_type: str) -> dict[str, Any]:
    """The base's config: stock names, the guard taken off the activation, and what transformers
    runs where the JSON leaves it open or says it in an older release's way.
    """
    config = {key: config[key] for key in config if key not in ("auto_map", "sae_clamp")}
    config |= {"model_type": model_type, "architectures": [FAMILIES[model_type].architecture]}
    text = config.get("text_config", config)
    for name in ("hidden_activation", "hidden_act"):
        if isinstance(text.get(name), str):
            text[name] = text[name].removeprefix(GUARD)
    for name in (FAMILIES[model_type].activation_field, *_AS_RUN):
        runs = getattr(loaded.get_text_config(), name, None)
        if runs is not None:
            text[name] = runs
    return config
