"""Whether a folder holds what bakeout writes and nothing else: names, links, and which files.

Before a file of a folder is used it is listed in the manifest, is one that the folder's carrier
may hold, lies in the folder, and has the hash that is listed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from bake.base import INDEX, WEIGHTS
from bake.errors import FolderError
from bake.files.folder_files import contents, open_in, sha256_in, wrong_name
from bake.new_folder import MANIFEST
from bake.reading.capped import parse_json, parse_toml, read_in
from bake.recipe import Recipe
from export.carriers.carriers import CARRIERS
from export.copying import BLOCK_BYTES
from export.manifest import AGAIN, Manifest

RECIPE = "recipe.toml"


def odd_contents(folder: Path, manifest: Manifest) -> Iterator[tuple[str, str]]:
    """What a folder holds that bakeout does not write: (name, what is wrong with it). No file is
    hashed.

    What git and the hub's downloader leave is no matter, nor what a write that was killed left:
    neither may be listed. Nor are empty folders. Of a carrier that is not known here only names and
    links are looked at.
    """
    found = contents(folder)
    yield from found.odd.items()
    for name in sorted(found.files - manifest.files.keys() - {MANIFEST}):
        yield name, "not in the manifest"
    carrier = CARRIERS.get(manifest.carrier)
    if carrier is None:
        return
    shards: set[str] = set()
    if INDEX in manifest.files and not carrier.over_base:
        named = _shards(folder)
        shards = {str(name) for name in named if _is_shard(name)}
        if not named or shards != named:
            yield INDEX, "places tensors in no file of weights that bakeout writes"
        for name in sorted(shards - manifest.files.keys()):
            yield INDEX, f"places tensors in {name}, which the manifest does not list"
    for name in sorted(manifest.files.keys() - shards):
        if not carrier.may_hold(name):
            yield name, "bakeout writes no such file"


def _shards(folder: Path) -> set[object]:
    """What a folder's index places tensors in; nothing where it cannot be read."""
    try:
        return set(parse_json(read_in(folder, INDEX))["weight_map"].values())
    except (FolderError, ValueError, KeyError, TypeError, AttributeError):
        return set()


def _is_shard(name: object) -> bool:
    """Whether it can be a weight file's name; transformers would take model.safetensors before any
    index.
    """
    plain = wrong_name(name) is None and "/" not in str(name)
    return plain and str(name).endswith(".safetensors") and name != WEIGHTS


def check_contents(folder: Path, manifest: Manifest) -> None:
    """Raise FolderError where a folder holds anything that bakeout does not write."""
    for name, what in odd_contents(folder, manifest):
        raise FolderError(
            f"{folder}: {name}: {what}; expected what bakeout wrote and nothing else; {AGAIN}"
        )


def check_files(
    folder: Path,
    manifest: Manifest,
    names: Collection[str],
    progress: Callable[[float], None] = lambda _: None,
) -> None:
    """Raise FolderError unless files are what the manifest says.

    Args:
        folder: the folder.
        manifest: its own.
        names: of the files, all of them listed.
        progress: called with the share of bytes hashed, 0 to 1.
    """
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise FolderError(f"{folder}: {missing[0]} is missing; {AGAIN}")
    total = max(1, sum((folder / name).stat().st_size for name in names))
    done = 0

    def advance(n: int) -> None:
        nonlocal done
        done += n
        progress(min(1.0, done / total))

    for name in names:
        _compare(folder, name, sha256_in(folder, name, advance), manifest.files[name])


def read_listed(folder: Path, manifest: Manifest, name: str) -> bytes:
    """A file's bytes, which have the hash that the manifest lists.

    Raises:
        FolderError: they have not, or it is not listed, or cannot be read.
    """
    with open_in(folder, _listed(folder, manifest, name)) as file:
        data = file.read()
    _compare(folder, name, hashlib.sha256(data).hexdigest(), manifest.files[name])
    return data


def recipe_in(folder: Path, manifest: Manifest) -> Recipe:
    """A folder's own recipe, which has the hash that the manifest lists.

    Raises:
        FolderError: as `read_listed`, or it is no TOML.
        RecipeError: a value is wrong.
    """
    path = folder / RECIPE
    try:
        data = read_in(folder, _listed(folder, manifest, RECIPE))
        _compare(folder, RECIPE, hashlib.sha256(data).hexdigest(), manifest.files[RECIPE])
        found = parse_toml(data)
    except ValueError as error:
        raise FolderError(f"{path}: cannot be read ({error}); expected TOML; {AGAIN}") from error
    return Recipe.parse(found, name=str(path), folder=folder.resolve())


def copy_listed(
    folder: Path,
    manifest: Manifest,
    name: str,
    target: Path,
    advance: Callable[[int], None] = lambda _: None,
) -> str:
    """Copy a file, which has the hash that the manifest lists, to disk; returns that hash.

    Raises:
        FolderError: as `read_listed`; `target` is not kept.
    """
    digest = hashlib.sha256()
    target.parent.mkdir(parents=True, exist_ok=True)
    with open_in(folder, _listed(folder, manifest, name)) as source, target.open("xb") as copy:
        while block := source.read(BLOCK_BYTES):
            digest.update(block)
            copy.write(block)
            advance(len(block))
        copy.flush()
        os.fsync(copy.fileno())
    try:
        _compare(folder, name, digest.hexdigest(), manifest.files[name])
    except FolderError:
        target.unlink()
        raise
    return digest.hexdigest()


def _listed(folder: Path, manifest: Manifest, name: str) -> str:
    if name not in manifest.files:
        raise FolderError(f"{folder / MANIFEST}: does not list {name}; {AGAIN}")
    return name


def _compare(folder: Path, name: str, digest: str, listed: str) -> None:
    if digest != listed:
        raise FolderError(
            f"{folder / name}: is not the file that the manifest lists (sha256 "
            f"{digest[:16]}…, expected {listed[:16]}…); {AGAIN}"
        )
