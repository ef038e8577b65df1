"""Weights that forget by themselves as a stock checkpoint of the base's own shape and dtype.

`bake/distill` trains or edits them; here they are written, tensor by tensor, where the base has
them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.base import INDEX
from bake.errors import ExportError, FolderError
from bake.new_folder import check_output, new_folder
from bake.reading.model_config import without_paths
from bake.tensors import StoredTensor, Tensors, index_of, indexed_tensors, to_bits, write_tensors
from export.carriers.carriers import CARRIERS
from export.carriers.checkpoint import (
    GEMMA_NOTICE,
    CheckpointPlan,
    companions,
    manifest_of,
    shard_name,
)
from export.copying import copy_all, hash_new
from export.manifest import DistilledEntry, HeldOutEntry, Manifest, json_text

if TYPE_CHECKING:
    from bake.distill.distilling import Distilled


@dataclass(frozen=True)
class TrainedPlan:
    """A trained folder that could be written."""

    source: CheckpointPlan
    """What a bake of the same recipe would write."""
    distilled: Distilled

    @property
    def stored(self) -> dict[str, StoredTensor]:
        """The base's tensors by name."""
        return indexed_tensors(self.source.base.folder, self.source.base.weight_map)

    @property
    def size(self) -> int:
        """Bytes that the folder will take, within a few kilobytes."""
        return size_of_base(self.source)


def size_of_base(source: CheckpointPlan) -> int:
    """Bytes of a base's weights and companions."""
    return sum(path.stat().st_size for path, _ in source.copies)


def check_same(source: CheckpointPlan, manifest: Manifest, folder: Path) -> None:
    """Raise FolderError unless a clamped folder was baked from what a recipe names.

    Args:
        source: what the recipe would bake.
        manifest: of the folder.
        folder: for the message.
    """
    base = source.base
    for shard in base.shards:
        with (base.folder / shard).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if manifest.files.get(shard_name(shard)) != digest:
            raise FolderError(
                f"{folder}: was not baked from {base.name} (another {shard}, by sha256); expected "
                "the recipe that it was baked from"
            )
    same = manifest_of(source, _recipe_alone(source)).clamps
    # How an SAE fits was measured on another machine, or on other text.
    ours, theirs = (
        [of.model_dump(exclude={"fit"}) for of in own] for own in (same, manifest.clamps)
    )
    if ours != theirs:
        raise FolderError(
            f"{folder}: its clamps are not those of the recipe; expected the recipe that it was "
            "baked from"
        )


def describe_training(distilled: Distilled, *, taught: bool) -> DistilledEntry:
    """What the manifest says about a training.

    Args:
        distilled: what came of it.
        taught: whether the clamped model taught it.
    """
    return DistilledEntry(
        teacher="the clamped model" if taught else "the base",
        settings=distilled.settings,
        seed=distilled.seed,
        base_sha256=distilled.base_sha256,
        texts=distilled.texts,
        held_out=HeldOutEntry(**asdict(distilled.held_out)),
    )


def write_trained(
    plan: TrainedPlan,
    out: Path,
    *,
    card: str,
    entry: DistilledEntry,
    force: bool = False,
    advance: Callable[[int], None] = lambda _: None,
) -> Path:
    """Write a trained folder, whole or not at all.

    Args:
        plan: what to write.
        out: the folder; it may exist only with `force`.
        card: text of the folder's README.md.
        entry: what the manifest says about the training.
        force: replace a folder that bakeout wrote.
        advance: called with the bytes written, as they are.

    Raises:
        OutputError: `out` exists, overlaps an input, or does not fit on the disk.
        ExportError: a weight is not finite.
    """
    source = plan.source
    check_output(out, inputs=source.inputs, size=plan.size, force=force)
    files = tensor_files(plan)
    with new_folder(out, force=force) as folder:
        copies = [(path, folder / name) for path, name in companions(source.base.folder)]
        for target in {target.parent for _, target in copies}:
            target.mkdir(exist_ok=True)
        hashes = {
            path.relative_to(folder).as_posix(): digest
            for path, digest in copy_all(copies, advance).items()
        }
        for name, tensors in files.items():
            hashes[name] = write_tensors(folder / name, tensors, advance)
        texts = {
            INDEX: json_text(index_of(files)),
            "config.json": json_text(trained_config(source)),
            "recipe.toml": source.recipe.shareable().to_toml(),
            "README.md": card,
        }
        if source.recipe.base.license == "gemma" and not (folder / "NOTICE").exists():
            texts["NOTICE"] = GEMMA_NOTICE
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
            hashes[name] = hash_new(folder / name)
        manifest_of_trained(source, plan.distilled.method, entry, hashes).write(folder)
    return out


def manifest_of_trained(
    source: CheckpointPlan,
    carrier: str,
    entry: DistilledEntry,
    files: dict[str, str] | None = None,
) -> Manifest:
    """The manifest of a trained folder.

    Args:
        source: what a bake of the same recipe would write.
        carrier: the method's.
        entry: what came of the training.
        files: sha256 of every other file, by its path in the folder; None before it is written.
    """
    files = files or _recipe_alone(source)
    exact = CARRIERS[carrier].exact
    return manifest_of(source, files).changed(carrier=carrier, exact=exact, distilled=entry)


def _recipe_alone(source: CheckpointPlan) -> dict[str, str]:
    text = source.recipe.shareable().to_toml()
    return {"recipe.toml": hashlib.sha256(text.encode()).hexdigest()}


def trained_config(source: CheckpointPlan) -> dict[str, Any]:
    """The base's config.json, which names no code and no place on this machine."""
    return {key: v for key, v in without_paths(source.base.config).items() if key != "auto_map"}


def tensor_files(plan: TrainedPlan) -> dict[str, Tensors]:
    """Per weight file, its tensors: where and as what the base has them, with the new numbers.

    Raises:
        ExportError: one is not finite, or the base stores it in 64 bits.
    """
    base, state = plan.source.base, plan.distilled.model.state_dict()
    backbone = base.layer_prefix.removesuffix("layers.")
    files: dict[str, Tensors] = {}
    for name, stored in plan.stored.items():
        head = name.endswith("lm_head.weight")
        module = "lm_head.weight" if head else f"model.{name.removeprefix(backbone)}"
        if stored.dtype == "F64":
            raise ExportError(f"{base.name}: stores {name} in float64; expected 32 bits or fewer")
        if module in state and not bool(state[module].isfinite().all()):
            raise ExportError(
                f"{name}: is not finite after training; expected numbers. Lower the learning rate, "
                "or the strength"
            )
        blocks = _blocks(stored, state.get(module))
        shard = shard_name(base.weight_map[name])
        files.setdefault(shard, {})[name] = stored.dtype, stored.shape, blocks
    return files


def _blocks(stored: StoredTensor, new: Any) -> Callable[[], Iterator[memoryview]]:
    """A tensor's bytes block by block; the base's own where the model has no such weight."""

    def give() -> Iterator[memoryview]:
        for start, stop in stored.blocks():
            rows = stored.bits(start, stop)
            if new is not None:
                rows = to_bits(new[start:stop].float().cpu().numpy(), stored.dtype)
            yield memoryview(rows.tobytes())

    return give
