"""The clamped checkpoint: the base's shards byte for byte, and one small shard with the clamp.

Nothing of the model is held in memory: files are copied block by block and hashed on the way.
"""

from __future__ import annotations

import hashlib
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bake
from bake.base import INDEX, WEIGHTS, BaseModel, find_base
from bake.clamp import ClampWeights, clamp_section, load_clamps, sae_name
from bake.errors import BakeoutError, ModelError, short, shown
from bake.files.folder_files import lies_in
from bake.new_folder import check_output, new_folder
from bake.reading.capped import cap_of, read_json
from bake.reading.model_config import is_local_path, without_paths
from bake.recipe import Recipe
from bake.sae.fit_figures import Fit
from bake.strangers.foreign import runs_code
from bake.tensors import Tensors, indexed_tensors
from export.carriers.carriers import CARRIERS, OF_BASE
from export.carriers.clamp_file import save_clamps
from export.clamped import GUARD, open_listed
from export.code_check import MODELING_FILE, auto_map_of
from export.copying import copy_all, hash_new
from export.manifest import (
    SCHEMA,
    BaseEntry,
    ClampEntry,
    Manifest,
    SAEEntry,
    json_text,
    versions,
)
from export.passing_by import passing_by

CLAMP_SHARD = "model-sae-clamp.safetensors"
RENAMED_WEIGHTS = "model-00001-of-00001.safetensors"
"""transformers prefers a file called model.safetensors over any index, so ours has another name."""
TRANSFORMERS_JS = {"use_external_data_format": True}
"""What transformers.js reads of config.json: a graph's weights lie in a file beside it."""
GEMMA_NOTICE = (
    "Gemma is provided under and subject to the Gemma Terms of Use found at "
    "ai.google.dev/gemma/terms\n"
)


@dataclass(frozen=True)
class CheckpointPlan:
    """A checkpoint that could be written: every input was found, read and checked."""

    recipe: Recipe
    base: BaseModel
    clamps: list[ClampWeights]
    fits: Mapping[int, Fit] = field(default_factory=dict)
    """By layer, how well the SAE fits, where that was measured."""

    @property
    def copies(self) -> list[tuple[Path, str]]:
        """Files of the base that are copied, and their names in the checkpoint."""
        folder = self.base.folder
        shards = [(folder / shard, shard_name(shard)) for shard in self.base.shards]
        return shards + companions(folder)

    @property
    def n_parameters(self) -> int:
        """Of the base."""
        tensors = indexed_tensors(self.base.folder, self.base.weight_map)
        return sum(math.prod(tensor.shape) for tensor in tensors.values())

    @property
    def clamp_size(self) -> int:
        """Bytes of the clamp's tensors."""
        return sum(clamp.n_bytes for clamp in self.clamps)

    @property
    def size(self) -> int:
        """Bytes that the checkpoint will take, within a few kilobytes."""
        return self.clamp_size + sum(source.stat().st_size for source, _ in self.copies)

    @property
    def inputs(self) -> list[Path]:
        """Folders and files that are read."""
        return [self.base.folder, *self.recipe.local_sources]


def companions(folder: Path) -> list[tuple[Path, str]]:
    """Files of a base model's folder that go along with its weights and config, and their names.

    Raises:
        ModelError: one is a link out of the folder: what it leads to would be published.
    """
    names = [
        f"{top}{path.name}"
        for top in ("", "additional_chat_templates/")
        for path in sorted((folder / top).glob("*"))
    ]
    found = [
        name
        for name in names
        if re.fullmatch(OF_BASE, name) and not runs_code(name) and (folder / name).is_file()
    ]
    for name in found:
        if not lies_in(folder, folder / name):
            raise ModelError(
                f"base model {folder.name}: {name} is a link that leads out of its folder, which "
                "is not followed; copy the file itself there"
            )
    return [(folder / name, name) for name in found]


def plan_checkpoint(recipe: Recipe) -> CheckpointPlan:
    """Find and check everything that a recipe names.

    Raises:
        BakeoutError: of the kind of trouble it meets.
    """
    base = find_base(recipe)
    _check_companions(base)
    return CheckpointPlan(recipe, base, load_clamps(recipe, base))


def _check_companions(base: BaseModel) -> None:
    """Raise ModelError where a file that goes along is no plain one, too large, or names a place on
    this machine: it is copied byte for byte, so nothing can be left out of it.
    """
    for path, name in companions(base.folder):
        if (size := path.stat().st_size) > cap_of(path):
            raise ModelError(
                f"base model {base.name}: {name} has {size:,} bytes; expected at most "
                f"{cap_of(path):,} of such a file. Download it again"
            )
        if path.suffix != ".json" or name == "tokenizer.json":
            continue
        try:
            found = read_json(path)
        except ValueError:  # whoever loads it says what is wrong with it
            continue
        entries = found if isinstance(found, dict) and base.revision is None else {}
        paths = [key for key in entries if key != "chat_template" and is_local_path(entries[key])]
        if paths:
            raise ModelError(
                f"base model {base.name}: {name} says {paths[0]} = {shown(entries[paths[0]])}, a "
                "place on this machine, and is copied as it is; remove that line there"
            )


def write_checkpoint(
    plan: CheckpointPlan,
    out: Path,
    *,
    card: str,
    force: bool = False,
    advance: Callable[[int], None] = lambda _: None,
    witness_prompts: Sequence[Sequence[int]] | None = None,
    device: str = "cpu",
) -> Path:
    """Write a checkpoint folder, whole or not at all.

    Args:
        plan: what to write.
        out: the folder; it may exist only with `force`.
        card: text of the folder's README.md.
        force: replace a folder that bakeout wrote.
        advance: called with the bytes copied, as they are.
        witness_prompts: token ids of prompts that may fire the clamp; witnesses are chosen from
            them, or searched for where none fires. None writes no witnesses.
        device: as torch names it, where the model runs for them.

    Raises:
        OutputError: `out` exists, overlaps an input, or does not fit on the disk.
    """
    check_output(out, inputs=plan.inputs, size=plan.size, force=force)
    with new_folder(out, force=force) as folder:
        copies = [(source, folder / name) for source, name in plan.copies]
        for target in {target.parent for _, target in copies}:
            target.mkdir(exist_ok=True)
        hashes = copy_all(copies, advance)
        written = {path: hash_new(path) for path in _write_new_files(plan, folder, card)}
        files = {
            path.relative_to(folder).as_posix(): sha256
            for path, sha256 in {**hashes, **written}.items()
        }
        manifest = manifest_of(plan, files)
        if witness_prompts is not None:
            manifest = _with_witnesses(plan.base.name, manifest, folder, witness_prompts, device)
        manifest.write(folder)
    return out


def _write_new_files(plan: CheckpointPlan, folder: Path, card: str) -> list[Path]:
    """Everything in the folder that is not a copy of the base's."""
    tensors = {
        f"{plan.base.layer_prefix}{clamp.layer}.sae_clamp.{name}": tensor
        for clamp in plan.clamps
        for name, tensor in clamp.tensors.items()
    }
    wholes: Tensors = {
        f"{plan.base.layer_prefix}{clamp.layer}.sae_clamp.W_enc": (of.dtype, of.shape, of.blocks)
        for clamp in plan.clamps
        if (of := clamp.sae.whole) is not None
    }
    save_clamps(folder / CLAMP_SHARD, tensors, wholes)
    shutil.copyfile(Path(bake.__file__).with_name(MODELING_FILE), folder / MODELING_FILE)
    texts = {
        INDEX: json_text(_index(plan.base, [*tensors, *wholes], plan.clamp_size)),
        "config.json": json_text(clamped_config(plan.recipe, plan.base, plan.clamps)),
        "recipe.toml": plan.recipe.shareable().to_toml(),
        "README.md": card,
    }
    if plan.recipe.base.license == "gemma" and not (folder / "NOTICE").exists():
        texts["NOTICE"] = GEMMA_NOTICE
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in (CLAMP_SHARD, MODELING_FILE, *texts)]


def _with_witnesses(
    name: str, manifest: Manifest, folder: Path, prompts: Sequence[Sequence[int]], device: str
) -> Manifest:
    """Run the new checkpoint; nothing is written where no prompt fires its clamp."""
    from export.witness_prompts import find_witnesses

    try:
        witnesses = find_witnesses(open_listed(folder, manifest), prompts, device)
    except BakeoutError:
        raise
    except Exception as error:  # transformers raises every kind
        reason = short(" ".join(f"{type(error).__name__}: {error}".split()))
        raise ModelError(
            f"base model {name}: what was made of it does not run ({reason}); expected a model "
            "that transformers runs. Download it again, or bake with --no-witnesses"
        ) from error
    if witnesses is None:
        return manifest
    path = witnesses.save(folder)
    return manifest.changed(files=manifest.files | {path.name: hash_new(path)})


def manifest_of(plan: CheckpointPlan, files: dict[str, str]) -> Manifest:
    """The manifest of a checkpoint.

    Args:
        plan: what is written.
        files: sha256 of every other file, by its path in the folder.
    """
    return Manifest(
        schema=SCHEMA,
        bakeout=version("bakeout"),
        carrier="layer",
        exact=CARRIERS["layer"].exact,
        base=BaseEntry(model=plan.base.name, revision=plan.base.revision),
        recipe_sha256=files["recipe.toml"],
        clamps=[
            _clamp_entry(clamp, plan.base, plan.fits.get(clamp.layer)) for clamp in plan.clamps
        ],
        sources=_local_files(plan.recipe),
        tools=versions(),
        files=dict(sorted(files.items())),
    )


def _clamp_entry(clamp: ClampWeights, base: BaseModel, fit: Fit | None) -> ClampEntry:
    assert isinstance(clamp.clamp.features, list)
    said: dict[str, Any] = passing_by(base.config, clamp.layer)
    said |= {} if fit is None else {"fit": fit}
    return ClampEntry(
        layer=clamp.layer,
        hook_point=clamp.hook_point,
        method=clamp.clamp.method,
        parameters=clamp.clamp.parameters,
        features=clamp.clamp.features,
        k=clamp.k,
        sae=SAEEntry(
            name=sae_name(clamp.clamp),
            architecture=clamp.sae.architecture,
            sha256=clamp.sae.sha256,
        ),
        hook_point_from=clamp.hook_point_from,
        **said,
    )


def _local_files(recipe: Recipe) -> dict[str, str]:
    """sha256 of every local file (questions, texts) that the recipe names, by file name."""
    files = [path for path in recipe.local_sources[1:] if path.is_file()]
    hashes = {}
    for path in files:
        with path.open("rb") as file:
            hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def clamped_config(recipe: Recipe, base: BaseModel, clamps: list[ClampWeights]) -> dict[str, Any]:
    """The base's config.json with our classes, the clamp's sites, and the guard.

    The guard stands before the activation's name in both fields that stock Gemma classes read it
    from; only our config class takes it off, so no stock class can load the checkpoint.
    """
    family = base.family
    config = without_paths(base.config)
    text = config
    if "text_config" in config:
        text = config["text_config"]
        text["model_type"] = f"{family.model_type}_text"
    runs = text.get(family.activation_field) or "gelu_pytorch_tanh"  # the other field is not read
    for name in ("hidden_activation", "hidden_act"):
        text[name] = GUARD + (text.get(name) or runs)
    if recipe.base.dtype != "auto":
        config.pop("torch_dtype", None)
        config["dtype"] = recipe.base.dtype
    return config | {
        "model_type": family.model_type,
        "architectures": [family.clamped],
        "auto_map": auto_map_of(family),
        "sae_clamp": clamp_section(clamps, base.bos_token_id),
        "transformers.js_config": TRANSFORMERS_JS,
    }


def _index(base: BaseModel, names: Sequence[str], clamp_size: int) -> dict[str, Any]:
    weight_map = {key: shard_name(shard) for key, shard in base.weight_map.items()}
    weight_map |= dict.fromkeys(names, CLAMP_SHARD)
    size = sum((base.folder / shard).stat().st_size for shard in base.shards)
    return {
        "metadata": {"total_size": size + clamp_size},
        "weight_map": dict(sorted(weight_map.items())),
    }


def shard_name(shard: str) -> str:
    """What a base's weight file is called in a folder."""
    return RENAMED_WEIGHTS if shard == WEIGHTS else shard
