"""An audited folder as a model that can be trained, in this process.

Its weights are loaded by stock transformers, or by bakeout's own modeling file where they are a
clamped checkpoint's; never by a file of the folder.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from bake.base import find_base, open_base
from bake.errors import FolderError, RecipeError
from bake.files.scratch import Scratch
from bake.new_folder import MANIFEST
from bake.recipe import Recipe
from bake.stock import decoder_layers, load_base, load_model, placed
from bake.strangers.model_view import show_adapter
from export.carriers.carriers import CARRIERS
from export.clamped import clamped_layers, read_config
from export.code_check import check_code
from export.manifest import Manifest
from verify.clamped_folder import check_base
from verify.engines.onnx_files import Graph, find_graphs, graph_failures
from verify.engines.torch_worker import by_path
from verify.engines.what_loads import MODELING, loading_class
from verify.evidence.integrity import check_integrity, code_failures
from verify.expected.own_files import own_failures
from verify.report.findings import Failure

DTYPE = "float32"
"""In which everything is trained and asked: in 16 bits small steps are rounded away."""
_SIZES = ("vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim")
"""Fields of a config in which a folder and its base agree."""
_LEAST = ("num_hidden_layers", "hidden_size")
"""Those in which a folder may be larger: layers that compute a clamp may have been put in."""


@dataclass(frozen=True)
class Subject:
    """A checked folder, and the base that it was made from."""

    folder: Path
    recipe: Recipe
    """Names the base."""
    carrier: str | None
    """None of a folder that bakeout did not write."""
    compiled: tuple[int, ...] = ()
    """The layers that hold a compiled clamp."""
    device: str = "cpu"
    """As torch names it."""

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name

    @property
    def strips(self) -> bool:
        """Whether it has a clamp that can be taken out."""
        known = CARRIERS.get(self.carrier or "")
        return bool(self.compiled) or (known is not None and known.strips)

    def model(self) -> Any:
        """A copy of its own, in float32, not to be trained until it is told so."""
        if self.carrier is not None and CARRIERS[self.carrier].over_base:
            return self._over_base()
        source, name = loading_class(self.folder)
        module = _modeling() if source == "bakeout" else importlib.import_module("transformers")
        where = {"pretrained_model_name_or_path": str(self.folder), "local_files_only": True}
        model = load_model(getattr(module, name), where, DTYPE)
        return placed(model, self.device).requires_grad_(False)

    def stripped(self) -> Any | None:
        """`model()` with its clamp taken out; None where there is none to take out."""
        return self.strip(self.model()) if self.strips else None

    def strip(self, model: Any) -> Any:
        """Take the clamp out of a copy, trained or not. Changes `model`."""
        if self.compiled:
            return without_layers(model, self.compiled)
        for module in model.modules():
            if getattr(module, "sae_clamp", None) is not None and hasattr(module, "exempt_bos"):
                module.sae_clamp = None  # of a clamped decoder layer
            elif hasattr(module, "disable_adapters") and hasattr(module, "W_enc"):
                module._disable_adapters = True  # the clamp of an adapter
        return model

    def base(self) -> Any:
        """A copy of the base."""
        return load_base(self.recipe, self.device, DTYPE)

    def _over_base(self) -> Any:
        """The base with the adapter's clamps hooked on."""
        importlib.import_module("bakeout")  # registers the adapter with peft
        from peft import PeftModel

        with Scratch("adapter") as scratch, warnings.catch_warnings():
            shown = show_adapter(self.folder, scratch / "adapter")
            warnings.simplefilter("ignore", FutureWarning)  # of transformers, about peft
            model = PeftModel.from_pretrained(self.base(), str(shown))
        return model.base_model.model.eval()


@cache
def _modeling() -> Any:
    """Bakeout's own modeling file as a module."""
    return by_path(MODELING)


def without_layers(model: Any, layers: Collection[int]) -> Any:
    """Delete decoder layers of a stock Gemma. Changes `model`, its config among it.

    Args:
        model: any stock Gemma.
        layers: their numbers, from 0.
    """
    from torch import nn

    kept = [i for i in range(len(decoder_layers(model))) if i not in set(layers)]
    backbone = getattr(model.model, "language_model", model.model)
    backbone.layers = nn.ModuleList(backbone.layers[i] for i in kept)
    config = model.config.get_text_config()
    if types := getattr(config, "layer_types", None):
        config.layer_types = [types[i] for i in kept]
    config.num_hidden_layers = len(kept)
    for number, layer in enumerate(backbone.layers):
        layer.self_attn.layer_idx = number
    return model


def check_subject(folder: Path) -> tuple[Failure, ...]:
    """Hold a folder against itself, as `verify` does before it loads anything. One that bakeout did
    not write has nothing to be held against; it must be a plain base model's folder.

    Returns:
        What is broken; nothing where all is well.

    Raises:
        BakeoutError: it is no such folder, or cannot be read.
    """
    if not folder.is_dir():
        raise FolderError(f"{folder}: is no folder; expected a model's folder")
    if not (folder / MANIFEST).exists():
        check_code(folder)
        open_base(folder, name=folder.resolve().name, revision=None)
        return ()
    manifest = Manifest.read(folder)
    if broken := code_failures(folder, manifest) or check_integrity(folder, manifest):
        return broken
    carrier = CARRIERS.get(manifest.carrier)
    if carrier is None:
        raise FolderError(
            f"{folder.name}: carries the clamp as {manifest.carrier}; expected one of "
            f"{', '.join(CARRIERS)}, or a plain model's folder"
        )
    graphs: list[Graph] = []
    if not carrier.over_base:
        if not any(folder.glob("*.safetensors")):
            raise FolderError(
                f"{folder.name}: holds ONNX graphs alone; expected weights, which can be trained"
            )
        graphs = find_graphs(folder)
        own = carrier.own_code
        layers = clamped_layers(read_config(folder, manifest.carrier)) if own else []
        if broken := graph_failures(graphs, layers, manifest.files):
            return broken
    return tuple(own_failures(folder, manifest, graphs))


def open_subject(folder: Path, recipe: Recipe, device: str = "cpu") -> Subject:
    """A folder that `check_subject` found nothing wrong with, and the recipe's base beside it.

    Raises:
        RecipeError: the folder was made from another base than the recipe's.
    """
    base = find_base(recipe)
    if not (folder / MANIFEST).exists():
        ours = open_base(folder, name=folder.resolve().name, revision=None)
        if ours.family is not base.family:
            raise _other_base(folder, ours.family.architecture, base.family.architecture)
        text, theirs = (c.get("text_config") or c for c in (ours.config, base.config))
        for field in (*_SIZES, *_LEAST):
            got, expected = text.get(field), theirs.get(field)
            larger = field in _LEAST and isinstance(got, int) and got > int(expected or 0)
            if got != expected and not larger:
                raise _other_base(folder, f"{field} {got}", f"{expected}")
        return Subject(folder, recipe, None, device=device)
    manifest = Manifest.read(folder)
    if manifest.base.model != base.name:
        raise _other_base(folder, f"base {manifest.base.title}", base.name)
    if CARRIERS[manifest.carrier].over_base:
        check_base(recipe, folder, read_config(folder, manifest.carrier))
    sites = manifest.compiled.sites if manifest.compiled else []
    layers = tuple(layer for site in sites for layer in site.layers)
    return Subject(folder, recipe, manifest.carrier, layers, device)


def _other_base(folder: Path, got: str, expected: str) -> RecipeError:
    return RecipeError(
        f"{folder.name}: has {got}, the recipe's base {expected}; expected folders that were all "
        "made from the recipe's base"
    )
