"""Writing into a folder that is there, so that it is whole at every moment.

New files are finished under names that nothing loads. Then the manifest says which are about to
come, with their hashes (`Manifest.in_place`); each takes its place in one step; then the manifest
lists them. Whoever reads the manifest meanwhile, or after the writer was killed, takes of each of
these files what is there, and the next writer writes that down.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bake.errors import OutputError
from bake.files.folder_files import PARTIAL, SIGNATURE
from bake.files.locks import folder_lock
from bake.new_folder import disk_full
from export.copying import hash_new
from export.manifest import Manifest


@contextmanager
def changing(folder: Path) -> Iterator[Path]:
    """Hold the lock of a folder that bakeout wrote; gives an empty folder in it for what is not
    finished. What a writer left that was killed is settled first.

    Raises:
        FolderError: it has no readable manifest.
        OutputError: another process is writing it, the disk is full, or it cannot be written.
    """
    Manifest.read(folder)
    try:
        with folder_lock(folder), disk_full(folder):
            _clear(folder)
            try:
                manifest = Manifest.read(folder)
                (folder / PARTIAL).mkdir()
                if manifest.was_in_place:
                    manifest.replace(folder)
                yield folder / PARTIAL
            finally:
                _clear(folder)
    except PermissionError as error:
        raise OutputError(
            f"output {folder}: cannot be written ({error.strerror}); check its permissions"
        ) from error


def put_files(folder: Path, manifest: Manifest, new: Mapping[str, Path], **changes: Any) -> None:
    """Give finished files of a folder their places, and write its manifest. A signature of the
    folder as it was goes.

    Args:
        folder: whose lock is held (`changing`).
        manifest: of the folder, without them.
        new: where each file lies, by its name; in the order in which they appear.
        changes: of other fields of the manifest.
    """
    hashes = {name: hash_new(path) for name, path in new.items()}
    (folder / SIGNATURE).unlink(missing_ok=True)
    manifest.changed(in_place=hashes).replace(folder)
    if any(name.endswith("_data") and name in manifest.files for name in new):
        # A graph and what points to it are gone before its data changes: they fit no other.
        for name in reversed([*new]):
            if not name.endswith("_data"):
                (folder / name).unlink(missing_ok=True)
    for name, path in new.items():
        (folder / name).parent.mkdir(exist_ok=True)
        path.replace(folder / name)
    manifest.changed(files=manifest.files | hashes, in_place={}, **changes).replace(folder)


def _clear(folder: Path) -> None:
    """Remove what is not finished; a link of its name, not what it leads to."""
    for path in (
        folder / PARTIAL,
        *(folder / f"{PARTIAL}{end}" for end in (".onnx", ".onnx_data")),
    ):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            with suppress(FileNotFoundError):
                path.unlink()
