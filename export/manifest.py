"""`manifest.json`: where a folder came from, how exact it is, and the sha256 of its files. Nothing
else writes or reads that file; its keys are the fields of `Manifest`.
"""

from __future__ import annotations

import hashlib
import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from bake.errors import FolderError, short, shown
from bake.files.folder_files import PARTIAL, check_name, sha256_in
from bake.new_folder import MANIFEST, fsync_folder
from bake.reading.capped import parse_json, read_in
from bake.sae.fit_figures import Fit
from bake.sources import MOST_FEATURES
from export.carriers.carriers import CARRIERS, is_added

CARD = "README.md"
AGAIN = "bake or download the folder again"
SCHEMA = 1
"""Newest version of the manifest that is known here."""
TOOLS = ("bakeout", "sae-lens", "safetensors", "torch", "transformers")
"""Packages whose versions it states."""
LONGEST = 4096
"""Most characters of a text in it: of a name, a version, a hook point."""
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Part(BaseModel):
    """A part of the manifest. Keys that are not known here are kept."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, str_max_length=LONGEST)


class BaseEntry(Part):
    """What the folder was made from."""

    model: str
    """Hub id, or the base folder's own name."""
    revision: str | None
    """Commit on the hub, where it came from there."""

    @property
    def title(self) -> str:
        """For a person."""
        return self.model if self.revision is None else f"{self.model} at {self.revision}"


class SAEEntry(Part):
    """Which SAE a clamp was cut from."""

    name: str
    architecture: str
    sha256: str
    """Of its weights file."""


class ClampEntry(Part):
    """One clamp."""

    layer: int = Field(ge=0, lt=10_000)
    """Decoder layer of the base whose output is edited."""
    hook_point: str
    method: str
    parameters: dict[str, Any] = Field(max_length=64)
    """By their names in the recipe."""
    features: list[int] = Field(max_length=MOST_FEATURES)
    k: int
    """How many features are read or set."""
    sae: SAEEntry
    hook_point_from: str | None = None
    """`SAE` where the SAE says where it sits, `recipe` where that is the user's word alone."""
    old_keys: list[int] = Field(default_factory=list, max_length=1024)
    """Layers behind it that attend to keys and values made before it."""
    embedded_again: bool = False
    """Whether layers behind it are given each token's own embedding again."""
    fit: Fit | None = None
    """How well its SAE fits the base, as bake measured it; None where it did not."""


class CompiledDistance(Part):
    """How far two compiled layers are from the clamp on tokens that were tried."""

    what: str
    tokens: int
    median: float
    largest: float
    largest_share_of_bound: float


class LayersEntry(Part):
    """The two layers of one compiled clamp."""

    layers: list[int] = Field(min_length=1)
    flags: int
    """Comparisons with a threshold."""
    neurons: list[int] = Field(min_length=1)
    """Of either layer's MLP."""
    parameters: dict[str, Any]
    distance: CompiledDistance


class CompiledEntry(Part):
    """What compiling added."""

    dtype: str
    hidden_size: tuple[int, int]
    """Before and after."""
    layers_added: int
    idle: list[int] = Field(default_factory=list, max_length=4096)
    """Of those, the ones that do nothing, so that runtimes that count layers count right."""
    kappa: float
    """The constant of the added channels."""
    loads: dict[str, str] = Field(default_factory=dict, max_length=16)
    """What becomes of the clamps in each way of loading the folder, as tried at export."""
    sites: list[LayersEntry] = Field(min_length=1)


COARSE = 0.5
"""Share of the clamp's effect from which on a rounded graph's error is told."""


class RoundedEntry(Part):
    """What a graph with rounded weights showed on the witnesses, in logits."""

    error: float
    """Largest distance to the checkpoint."""
    effect: float
    """Largest that the clamp makes in the checkpoint."""
    shown: float
    """Share of the clamp's effect that the graph shows, 1 being all of it."""

    @property
    def warning(self) -> str | None:
        """Where rounding moves logits by half as much as the clamp, or more: that it does."""
        if self.error < COARSE * self.effect:
            return None
        return (
            f"rounding moves a logit by up to {self.error:.2g}, the clamp by up to "
            f"{self.effect:.2g}, of which {self.shown:.0%} shows: what it forgets and keeps is "
            "another model's, so measure it before it is used"
        )


class HeldOutEntry(Part):
    """How far trained weights are from their teachers, on texts that they were not trained on."""

    forget_kl: float
    """nats per token, like the next."""
    retain_kl: float
    forget_tokens: int
    retain_tokens: int


class DistilledEntry(Part):
    """How weights came to forget."""

    teacher: str
    """What `forget_kl` is the distance from: the clamped model, or the base."""
    settings: dict[str, Any] = Field(max_length=64)
    """By the names of [distill]'s fields."""
    seed: int
    base_sha256: Sha256
    """Of the base's config and weights."""
    texts: dict[str, Sha256] = Field(max_length=8)
    """Of each side's tokens."""
    held_out: HeldOutEntry


class Manifest(Part):
    """What a folder says about itself."""

    schema_version: int = Field(default=SCHEMA, alias="schema")
    bakeout: str
    """Version that wrote it."""
    carrier: str
    """One of `CARRIERS`, or of a later bakeout."""
    exact: bool
    """Whether it computes the clamp itself rather than an approximation."""
    base: BaseEntry
    recipe_sha256: str
    clamps: list[ClampEntry] = Field(max_length=1024)
    sources: dict[str, str] = Field(max_length=4096)
    """sha256 of the recipe's local questions and texts, by file name."""
    tools: dict[str, str] = Field(max_length=64)
    """Versions, by package."""
    files: dict[str, Sha256] = Field(min_length=1)
    """Every other file of the folder, by its name with forward slashes, and its sha256."""
    compiled: CompiledEntry | None = None
    distilled: DistilledEntry | None = None
    rounded: dict[str, RoundedEntry] = Field(default_factory=dict, max_length=16)
    """Graphs whose weights are rounded copies, by file."""
    in_place: dict[str, Sha256] = {}
    """While files are written into the folder, and after the writer was killed: the hashes that
    they will have. Until then each is as `files` lists it, or is not there."""

    _sha256: str = PrivateAttr(default="")
    _was_in_place: bool = PrivateAttr(default=False)

    @property
    def sha256(self) -> str:
        """Of manifest.json itself, as it was read."""
        return self._sha256

    @property
    def was_in_place(self) -> bool:
        """Whether files were being written when it was read."""
        return self._was_in_place

    @classmethod
    def read(cls, folder: str | Path) -> Self:
        """Read and check a folder's manifest; no other file is looked at.

        Raises:
            FolderError: there is no such folder, or its manifest is missing, damaged, of a newer
                schema, or names files outside the folder.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FolderError(f"{folder}: is no folder; expected a folder that bakeout wrote")
        path = folder / MANIFEST
        if not path.exists() and not path.is_symlink():
            raise FolderError(f"{folder}: has no {MANIFEST}; expected a folder that bakeout wrote")
        try:
            raw = read_in(folder, MANIFEST)
            data = parse_json(raw)
        except (OSError, ValueError) as error:
            raise FolderError(
                f"{path}: cannot be read ({error}); expected JSON; bake or download it again"
            ) from error
        _check_schema(path, data)
        try:
            found = cls.model_validate_json(raw)
        except ValidationError as error:
            first = error.errors()[0]
            key = short(".".join(map(str, first["loc"])))
            raise FolderError(
                f'{path}: "{key}" is {shown(first["input"])}: {first["msg"]}; {AGAIN}'
            ) from error
        for name in (*found.files, *found.in_place):
            check_name(path, name)
        if odd := [name for name in found.in_place if not is_added(name)]:
            raise FolderError(
                f"{path}: is about to write {shown(odd[0])}; expected a graph, witnesses or a "
                f"card; {AGAIN}"
            )
        found = found._settled(folder)
        found._sha256 = hashlib.sha256(raw).hexdigest()
        return found

    def _settled(self, folder: Path) -> Self:
        """The same with the hashes of what is there of the files that were being written."""
        if not self.in_place:
            return self
        files = dict(self.files)
        for name, new in self.in_place.items():
            if not (folder / name).exists():
                files.pop(name, None)
            elif sha256_in(folder, name) == new:
                files[name] = new
        settled = self.changed(files=files, in_place={})
        settled._was_in_place = True
        return settled

    def derived(self, files: dict[str, str], *, carrier: str, **more: Any) -> Self:
        """The manifest of a folder that was made from this one's, a clamped checkpoint.

        Args:
            files: sha256 of every other file, by its path in the folder.
            carrier: of the new folder.
            more: what this carrier has to say about itself, by field.
        """
        return self.changed(
            bakeout=version("bakeout"),
            carrier=carrier,
            exact=CARRIERS[carrier].exact,
            tools=versions(),
            files=files,
            **more,
        )

    def changed(self, **fields: Any) -> Self:
        """The same with other values of some fields; files are put in order."""
        if "files" in fields:
            fields["files"] = dict(sorted(fields["files"].items()))
        return self.model_copy(update=fields)

    def write(self, folder: Path) -> None:
        """Write it into a folder, as its last file, and bring it to disk."""
        data = self.model_dump(by_alias=True, exclude_unset=True)
        if not self.in_place:
            data.pop("in_place", None)
        with (folder / MANIFEST).open("w", encoding="utf-8") as file:
            file.write(json_text(data))
            file.flush()
            os.fsync(file.fileno())

    def replace(self, folder: Path) -> None:
        """Write it into a folder in place of the old one, in one step."""
        (folder / PARTIAL).mkdir(exist_ok=True)
        self.write(folder / PARTIAL)
        fsync_folder(folder)  # what it lists is there first
        (folder / PARTIAL / MANIFEST).replace(folder / MANIFEST)
        fsync_folder(folder)


def _check_schema(path: Path, data: object) -> None:
    """Refuse a manifest that a newer bakeout wrote; one that names no version is of the first."""
    schema = data.get("schema", 1) if isinstance(data, dict) else 1
    if type(schema) is not int or schema < 1:
        raise FolderError(f'{path}: "schema" is {shown(schema)}; expected {SCHEMA}')
    if schema > SCHEMA:
        raise FolderError(
            f'{path}: "schema" is {schema}, and this bakeout knows up to {SCHEMA}; update bakeout'
        )


def versions() -> dict[str, str]:
    """The versions of `TOOLS` here."""
    return {tool: version(tool) for tool in TOOLS}


def json_text(data: dict[str, Any]) -> str:
    """JSON as bakeout writes it into a folder."""
    return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a folder.

    Raises:
        FolderError: the file is missing or damaged, or holds something else.
    """
    try:
        path.lstat()
        data = parse_json(read_in(path.parent, path.name))
        if not isinstance(data, dict):
            raise ValueError("is no JSON object")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise FolderError(
            f"{path}: cannot be read ({reason}); expected a clamped checkpoint; {AGAIN}"
        ) from error
    return data
