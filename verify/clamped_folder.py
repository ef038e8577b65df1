"""Whether a recipe belongs to a clamped folder: its clamps, its layers, its base."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from bake.base import INDEX, find_base
from bake.errors import FolderError, RecipeError
from bake.reading.capped import parse_toml, read_in
from bake.recipe import Recipe
from bake.sources import Source
from export.carriers.carriers import CARRIERS, LICENCES, OF_BASE
from export.clamped import clamped_layers
from export.manifest import Manifest
from verify.report.findings import Failure

RECIPE = "recipe.toml"
NOWHERE = Path(os.devnull)
"""Where the paths of a folder's own recipe start: beneath a file, where nothing lies. What a folder
brings along under a hub id's name is not what the hub has."""
_REWRITTEN = ("config.json", "model.safetensors.index.json", "README.md", "manifest.json", "NOTICE")
"""Files that a checkpoint has in a form of its own."""
_SHAPE = ("hidden_size", "num_hidden_layers", "vocab_size")
"""Fields of a config in which base and checkpoint must agree."""


def own_recipe(folder: Path) -> Recipe | None:
    """The folder's own recipe where all that it names can be had from the hub, else None.

    A local source stands in a folder's recipe by its bare name, which leads nowhere; one that leads
    elsewhere on this machine, or into a store, is not followed.
    """
    recipe = stored_recipe(folder)
    if recipe is None or recipe.verify is None or not _is_hub_id(recipe.base.model):
        return None
    hub = all(clamp.sae.path is None for clamp in recipe.clamp) and all(
        _is_hub_source(source) for source in recipe.verify.sources
    )
    corpora = [
        corpus
        for table in (recipe.select, recipe.distill)
        if table is not None
        for corpus in (table.forget, table.retain)
        if corpus is not None
    ]
    bare = all(corpus.path is None or Path(corpus.path).name == corpus.path for corpus in corpora)
    return recipe if hub and bare else None


def downloads_of(recipe: Recipe) -> list[str]:
    """What a recipe takes from the hub, where it is not in its cache."""
    base = recipe.base
    found = [f"{base.model} at {base.revision}"] if _is_hub_id(base.model) else []
    found += [f"SAE {c.sae.release}/{c.sae.id}" for c in recipe.clamp if c.sae.release is not None]
    sources = [] if recipe.verify is None else recipe.verify.sources
    found += [f"data set {source.dataset}" for source in sources if source.dataset is not None]
    return list(dict.fromkeys(found))


def recorded_hooks(manifest: Manifest) -> dict[str, str]:
    """The hook points that a manifest states, by the sha256 of the SAE's file."""
    return {clamp.sae.sha256: clamp.hook_point for clamp in manifest.clamps}


def fitted_recipe(
    recipe: Recipe, folder: Path, config: dict[str, Any], *, shown: bool = True
) -> Recipe:
    """A recipe ready to rebuild a folder's reference.

    Where it leaves the features to `[select]`, those that the folder's own recipe names are meant:
    the folder's own word, which the report has to say.

    Args:
        recipe: what the reference is rebuilt from.
        folder: that was baked from it.
        config: of the folder, as `read_config` gives it.
        shown: whether engines are shown its questions and text.

    Raises:
        RecipeError: it has another number of clamps than the folder, no `[verify]` table, or
            features that nobody names.
    """
    layers = clamped_layers(config)
    if len(recipe.clamp) != len(layers):
        raise RecipeError(
            f"the recipe has {_clamps(len(recipe.clamp))}, {folder.name} has "
            f"{_clamps(len(layers))} (layers {_list(layers)}); expected the recipe that it was "
            "baked from"
        )
    if shown and recipe.verify is None:
        raise RecipeError(
            "the recipe has no [verify] table; expected one, on whose questions and text parity, "
            "choices and loss are measured"
        )
    if all(clamp.features != "select" for clamp in recipe.clamp):
        return recipe
    stored = stored_recipe(folder)
    if stored is None or len(stored.clamp) != len(recipe.clamp):
        raise RecipeError(
            f'the recipe says features = "select", and {folder.name} has no {RECIPE} that names '
            "the selected ones; write them with `bakeout select --write`"
        )
    clamps = [
        clamp.model_copy(update={"features": chosen.features})
        if clamp.features == "select"
        else clamp
        for clamp, chosen in zip(recipe.clamp, stored.clamp, strict=True)
    ]
    if any(clamp.features == "select" for clamp in clamps):
        raise RecipeError(
            f'{folder.name}/{RECIPE} itself says features = "select"; expected feature numbers. '
            "Bake or download the folder again"
        )
    return recipe.model_copy(update={"clamp": clamps})


def check_layers(recipe_layers: list[int], folder: Path, config: dict[str, Any]) -> None:
    """Raise RecipeError unless the recipe clamps the layers that the folder clamps."""
    layers = clamped_layers(config)
    if sorted(recipe_layers) != layers:
        raise RecipeError(
            f"the recipe clamps layers {_list(sorted(recipe_layers))}, {folder.name} layers "
            f"{_list(layers)}; expected the recipe that it was baked from"
        )


def check_shape(base_config: Any, folder: Path, config: dict[str, Any]) -> None:
    """Raise RecipeError unless base model and folder are of one size.

    Args:
        base_config: the base model's config object.
        folder: the checkpoint.
        config: its config.json.
    """
    ours = {**config, **(config.get("text_config") or {})}
    base = base_config.get_text_config()
    for field in _SHAPE:
        if field in ours and ours[field] != getattr(base, field):
            raise RecipeError(
                f"the recipe's base model has {field} {getattr(base, field)}, {folder.name} has "
                f"{ours[field]}; expected the recipe that it was baked from"
            )


def check_base(recipe: Recipe, folder: Path, config: dict[str, Any]) -> None:
    """Raise RecipeError unless the recipe's base is the one that an adapter belongs to, by hash."""
    base = find_base(recipe)
    found = sorted(_sha256(base.folder / shard) for shard in base.shards)
    if found != sorted(config.get("base_sha256") or ()):
        raise RecipeError(
            f"the recipe's base model {base.name} has other weights than those that "
            f"{folder.name} was made for (by sha256); expected the recipe that it was baked from"
        )


def base_failures(recipe: Recipe, manifest: Manifest) -> tuple[Failure, ...]:
    """What of a folder is not the recipe's base, byte for byte: weights that were copied,
    tokenizer, templates, generation_config.json. An adapter brings none of them.

    Args:
        recipe: names the base.
        manifest: of the folder, whose files have the hashes that it states.

    Returns:
        One failure of kind `integrity` for each file of the base that the folder has otherwise,
        or does not have though the model needs it, and for one that the base has not.
    """
    base, files, carrier = find_base(recipe), manifest.files, CARRIERS[manifest.carrier]
    copies = set(base.shards) if carrier.own_code and INDEX in files else set()
    failures = []
    for path in sorted(path for path in base.folder.rglob("*") if path.is_file()):
        name = path.relative_to(base.folder).as_posix()
        copy = "model-00001-of-00001.safetensors" if name == "model.safetensors" else name
        needed = name in copies or (_is_text(name) and not carrier.over_base)
        if name in _REWRITTEN or (name in base.shards and name not in copies):
            continue
        if (copy in files or needed) and files.get(copy) != (digest := _sha256(path)):
            what = f"{copy}: is not the base's {name}, byte for byte"
            failures.append(Failure("integrity", carrier.engine, what, files.get(copy), digest))
    for name in sorted(files):
        if _is_text(name) and not (base.folder / name).is_file():
            what = f"{name}: the base has none"
            failures.append(Failure("integrity", carrier.engine, what, files[name], None))
    return tuple(failures)


def _is_text(name: str) -> bool:
    """Whether a file decides how text becomes tokens, or what ends an answer: all that goes along
    with a base but its licences.
    """
    return re.fullmatch(OF_BASE, name) is not None and re.fullmatch(LICENCES, name) is None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stored_recipe(folder: Path) -> Recipe | None:
    """A folder's recipe.toml; None where it has none."""
    path = folder / RECIPE
    if not path.is_file():
        return None
    try:
        data = parse_toml(read_in(folder, RECIPE))
    except (OSError, ValueError) as error:
        raise FolderError(f"{path}: cannot be read ({error}); expected TOML") from error
    return Recipe.parse(data, name=str(path), folder=NOWHERE)


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) is not None


def _is_hub_source(source: Source) -> bool:
    return source.dataset is not None and _is_hub_id(source.dataset)


def _clamps(n: int) -> str:
    return "1 clamp" if n == 1 else f"{n} clamps"


def _list(layers: list[int]) -> str:
    return ", ".join(str(layer) for layer in layers)
