"""Whether a folder's files are what its recipe, its base and the whole SAE make of them.

What questions never touch is compared here: every number of the clamp, every key of a config, every
tensor. Nothing is run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.base import INDEX, BaseModel, find_base
from bake.errors import FolderError, short
from bake.recipe import Recipe
from export.carriers.carriers import CARRIERS
from export.clamped import read_config
from export.code_check import PEFT_TYPE, PEFT_TYPES
from export.manifest import AGAIN, Manifest, read_json
from verify.clamped_folder import RECIPE, base_failures, stored_recipe
from verify.expected.added_layers import added_failures
from verify.expected.clamp_rows import Expected, expected_tensors, tensor_failures
from verify.expected.compiled_places import compiled_places, stock_config
from verify.expected.expected_config import (
    Placed,
    adapter_config,
    checkpoint_config,
    compiled_config,
    differences,
    past_the_clamp,
)
from verify.expected.own_files import as_damaged, data_failures, graph_clamps
from verify.expected.trained_weights import trained_failures
from verify.expected.weight_files import (
    CLAMP_SHARD,
    checkpoint_map,
    compiled_map,
    first_rows_digest,
    header_of,
    placed_failures,
)
from verify.expected.widened_base import Wide, widened_failures
from verify.report.findings import Failure

if TYPE_CHECKING:
    from verify.engines.onnx_files import Graph
    from verify.reference.whole_sae import Site

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ENCODERS = ("float32", "bfloat16", "float16")
"""What the encoder of a TopK SAE may be stored in."""


@dataclass(frozen=True)
class Checked:
    """A folder whose files have the hashes that its manifest states, and what it was made from."""

    folder: Path
    manifest: Manifest
    recipe: Recipe
    """With its features named."""
    sites: Sequence[Site]
    """Of the recipe, by layer."""
    graphs: Sequence[Graph] = ()
    """Of the folder."""

    @cached_property
    def base(self) -> BaseModel:
        """The recipe's."""
        return find_base(self.recipe)

    @property
    def engine(self) -> str:
        """What loads the folder in torch."""
        return CARRIERS[self.manifest.carrier].engine

    @property
    def layers(self) -> list[int]:
        """That are clamped, ascending."""
        return [site.layer for site in self.sites]

    @cached_property
    def expected(self) -> dict[int, dict[str, Expected]]:
        """By layer, the clamp's tensors."""
        return {site.layer: expected_tensors(site) for site in self.sites}

    @cached_property
    def places(self) -> list[Placed]:
        """Where the clamps sit."""
        return [self._place(site) for site in self.sites]

    def _place(self, site: Site) -> Placed:
        k, clamp = len(self.expected[site.layer]["value"].value), site.clamp
        place = Placed(site.layer, k, clamp.exempt_bos, tau=clamp.tau)
        cfg = site.sae.cfg
        if cfg.architecture() != "topk":
            return place
        config = read_config(self.folder, self.manifest.carrier)
        stated = [of for of in config["sae_clamp"]["sites"] if of["layer"] == site.layer]
        # In what its numbers, which are compared, are stored is the folder's affair.
        dtype = stated[0].get("dtype") if stated else None
        known = dtype if dtype in ENCODERS else ENCODERS[0]
        return replace(place, topk=int(cfg.k), d_sae=int(cfg.d_sae), dtype=known)

    @property
    def prefix(self) -> str:
        """What stands before a layer's number in the base's tensor names."""
        return self.base.layer_prefix


def recipe_failures(checked: Checked) -> list[Failure]:
    """What of a folder is not what its recipe makes of base and SAE.

    Raises:
        BakeoutError: a file cannot be read.
    """
    found = [*_origin(checked), *base_failures(checked.recipe, checked.manifest)]
    # Further comparisons read what earlier ones found whole.
    carrier = CARRIERS[checked.manifest.carrier]
    by = _checkpoint if carrier.own_code else _adapter if carrier.over_base else _compiled
    by = _trained if carrier.trained else by
    with as_damaged(checked.folder):
        found = found or list(by(checked))
        return found or list(
            data_failures(checked.folder, checked.manifest, checked.graphs, checked.base)
        )


# --------------------------------------------------------------------------- by carrier


def _checkpoint(checked: Checked) -> Iterator[Failure]:
    folder, engine = checked.folder, checked.engine
    expected = checkpoint_config(checked.base, checked.recipe, checked.places)
    yield from differences(engine, "config.json", read_json(folder / "config.json"), expected)
    if INDEX not in checked.manifest.files:  # rounded graphs alone
        for site in checked.sites:
            for graph in checked.graphs:
                file = f"{graph.path.name}_data"
                layer, expected = site.layer, checked.expected[site.layer]
                found = graph_clamps(graph, layer)
                yield from tensor_failures(layer, expected, found, graph.name, file)
        return
    base, clamps = checked.base, {}
    for layer, tensors in checked.expected.items():
        for name, tensor in tensors.items():
            key = f"{checked.prefix}{layer}.sae_clamp.{name}"
            clamps[key] = tensor.value.size * _width(checked, layer, name)
    size = sum((base.folder / shard).stat().st_size for shard in base.shards)
    where = checkpoint_map(base, clamps)
    moved = list(placed_failures(folder, engine, where, size + sum(clamps.values())))
    yield from moved
    if not moved:
        yield from _clamps(checked, CLAMP_SHARD, f"{checked.prefix}{{}}.sae_clamp.")


def _adapter(checked: Checked) -> Iterator[Failure]:
    folder, base, stated = checked.folder, checked.base, checked.manifest.base
    found = read_json(folder / ADAPTER_CONFIG)
    found.pop("base_sha256", None)  # was compared with the base's files
    if found.get("peft_type") in PEFT_TYPES:  # any of them loads it
        found["peft_type"] = PEFT_TYPE
    expected = adapter_config(
        base, checked.places, stated.model, stated.revision, first_rows_digest(base)
    )
    yield from differences(checked.engine, ADAPTER_CONFIG, found, expected)
    before = f"base_model.model.model.{base.family.backbone}layers.{{}}.sae_clamp_site."
    yield from _clamps(checked, ADAPTER_WEIGHTS, before)


def _compiled(checked: Checked) -> Iterator[Failure]:
    folder, base, engine = checked.folder, checked.base, checked.engine
    compiled = checked.manifest.compiled
    if compiled is None:
        raise FolderError(f"{folder}: its manifest does not say how it was compiled; {AGAIN}")
    if INDEX not in checked.manifest.files:
        raise FolderError(
            f"{folder}: holds rounded graphs of a compiled checkpoint and not its weights, from "
            "which its numbers follow; use --only parity choices loss, or verify the compiled "
            "folder that it was exported from"
        )
    config = read_json(folder / "config.json")
    mlp, own = config.get("intermediate_size"), base.config.get("intermediate_size")
    # As wide as the two layers need, and never narrower than the base.
    wider = mlp if type(mlp) is int and type(own) is int and mlp > own and mlp % 8 == 0 else own
    places = compiled_places(base, checked.layers)
    expected = compiled_config(base, compiled, places, int(wider or 0))
    changed = list(differences(engine, "config.json", config, expected))
    yield from changed
    names = compiled_map(base, places)
    where = {name: file for name, (file, _) in names.items()}
    size = sum(
        entry["data_offsets"][1] - entry["data_offsets"][0]
        for file in sorted(set(where.values()))
        for entry in (header_of(folder / file) if (folder / file).is_file() else {}).values()
    )
    moved = list(placed_failures(folder, engine, where, size))
    yield from moved
    if changed or moved:
        return
    spares = sorted({place.exempt_bos for place in checked.places})
    scalar = base.config.get("query_pre_attn_scalar")
    if scalar is None and base.family.layers_27b is not None:
        scalar = stock_config(base).query_pre_attn_scalar
    wide = Wide(base, config, (base.bos_token_id,), tuple(spares), scalar)
    stated = [layer for site in compiled.sites for layer in site.layers]
    added = len(places.clamping) + len(places.idle)
    told = (stated, compiled.idle, compiled.layers_added)
    if told != (places.clamping, places.idle, added):
        what = (
            f"manifest.json: its clamps are layers {stated}, expected {places.clamping}; layers "
            f"{compiled.idle} of {compiled.layers_added} more are idle, expected {places.idle} of "
            f"{added}"
        )
        yield Failure("integrity", engine, what, str(stated), str(places.clamping))
        return
    widened = list(widened_failures(folder, wide, names, places))
    yield from widened
    if not widened:
        yield from added_failures(folder, wide, checked.sites, compiled.sites, checked.prefix)


def _trained(checked: Checked) -> Iterator[Failure]:
    yield from trained_failures(checked.folder, checked.base, checked.engine)


def _clamps(checked: Checked, file: str, before: str) -> Iterator[Failure]:
    """The clamps' tensors in a file of their own; `before` is what their names begin with, with a
    place for the layer.
    """
    from safetensors.torch import load_file

    loaded = load_file(checked.folder / file)
    tensors = {name: of.float() if of.is_floating_point() else of for name, of in loaded.items()}
    stored = {name: str(of.dtype).removeprefix("torch.") for name, of in loaded.items()}
    known = set()
    for layer, expected in checked.expected.items():
        begin = before.format(layer)
        known |= {begin + name for name in expected}
        found = {
            name.removeprefix(begin): tensor.numpy()
            for name, tensor in tensors.items()
            if name.startswith(begin)
        }
        yield from tensor_failures(layer, expected, found, checked.engine, file)
        for name in (name for name in expected if name in found):
            dtype, held = _dtype(checked, layer, name), stored[begin + name]
            if held != dtype:
                what = f"{file}: {name} at layer {layer} is {held}, expected {dtype}"
                yield Failure("integrity", checked.engine, what, held, dtype)
    for name in sorted(set(tensors) - known):
        yield Failure("integrity", checked.engine, f"{file}: holds {name}, unknown", name, None)


def _dtype(checked: Checked, layer: int, name: str) -> str:
    """What a tensor of a clamp is stored in."""
    place = next(of for of in checked.places if of.layer == layer)
    if name == "W_enc" and place.dtype is not None:
        return place.dtype
    return "bool" if name == "route" else "float32"


def _width(checked: Checked, layer: int, name: str) -> int:
    """Bytes of one number of a tensor of a clamp."""
    return {"bool": 1, "float32": 4}.get(_dtype(checked, layer, name), 2)


# --------------------------------------------------------------------------- where it came from


def _origin(checked: Checked) -> Iterator[Failure]:
    """What manifest and stored recipe say of the clamps: a card is made of it."""
    base, named = checked.base, checked.manifest.base.model
    if base.revision is not None and "/" in named and named != base.name:  # both are of the hub
        what = f"manifest.json: its base is {short(named)}, expected {base.name}"
        yield Failure("integrity", checked.engine, what, short(named), base.name)
    stated = {clamp.layer: clamp for clamp in checked.manifest.clamps}
    for site, place in zip(checked.sites, checked.places, strict=True):
        clamp = stated.pop(site.layer, None)
        expected = {
            "method": site.clamp.method,
            "features": list(site.features),
            "parameters": site.clamp.parameters,
            "k": place.k,
            **past_the_clamp(checked.base, site.layer),
        }
        at = f"manifest.json, clamp at layer {site.layer}"
        found: Mapping[str, Any] = {}
        if clamp is not None:
            found = {key: getattr(clamp, key) for key in expected}
        yield from differences(checked.engine, at, _floats(found), _floats(expected))
    for layer in stated:
        what = f"manifest.json: a clamp at layer {layer}, which the recipe has not"
        yield Failure("integrity", checked.engine, what, layer, None)
    yield from _stored(checked)


def _stored(checked: Checked) -> Iterator[Failure]:
    """What the folder's recipe.toml says that the user's recipe does not; its [verify] and
    [select] tables, and where things lie, are the user's own affair.
    """
    stored = stored_recipe(checked.folder)
    if stored is None:
        return
    theirs, ours = stored.clamp, checked.recipe.clamp
    if len(theirs) != len(ours):
        what = f"{RECIPE}: has {len(theirs)} clamps, expected {len(ours)}"
        yield Failure("integrity", checked.engine, what, len(theirs), len(ours))
        return
    for pair in zip(theirs, ours, strict=True):
        both = (
            _floats({"method": of.method, "features": of.features, **of.parameters}) for of in pair
        )
        yield from differences(checked.engine, f"{RECIPE}, [[clamp]]", *both)


def _floats(of: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers of a recipe as JSON and TOML have them: -6 and -6.0 are one value."""
    if isinstance(parameters := of.get("parameters"), Mapping):
        of = {**of, "parameters": _floats(parameters)}
    return {
        key: float(value) if type(value) is int and key not in ("k", "refusal_feature") else value
        for key, value in of.items()
    }
