"""Trained weights: a stock checkpoint of the base's own shape, dtype and config, all of it finite.

Which numbers they are no recipe says: what they do is for the engines to show.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING

from bake.base import BaseModel
from bake.reading.model_config import without_paths
from export.manifest import read_json
from verify.expected.expected_config import differences
from verify.expected.weight_files import checkpoint_map, header_of, placed_failures
from verify.report.findings import Failure

if TYPE_CHECKING:
    from torch import Tensor

ROWS = 1 << 14
"""Rows of a matrix that are read at once."""


def trained_failures(folder: Path, base: BaseModel, engine: str) -> Iterator[Failure]:
    """What of a trained folder's files is not what its base makes of them.

    Args:
        folder: whose files have the hashes that its manifest states.
        base: that the recipe names.
        engine: that loads the folder.
    """
    expected = without_paths(deepcopy(base.config))
    expected.pop("auto_map", None)
    yield from differences(engine, "config.json", read_json(folder / "config.json"), expected)
    where = checkpoint_map(base, {})
    shapes = {
        name: (entry["dtype"], entry["shape"], entry["data_offsets"])
        for shard in base.shards
        for name, entry in header_of(base.folder / shard).items()
    }
    size = sum(shapes[name][2][1] - shapes[name][2][0] for name in where)
    moved = list(placed_failures(folder, engine, where, size))
    yield from moved
    for file in () if moved else sorted(set(where.values())):
        for name, entry in header_of(folder / file).items():
            found, wanted = (entry["dtype"], entry["shape"]), shapes[name][:2]
            if found != wanted:
                what = f"{file}: {name} is {found[0]} {found[1]}, expected {wanted[0]} {wanted[1]}"
                yield Failure("integrity", engine, what, str(found), str(wanted))
            elif not _is_finite(folder / file, name):
                what = f"{file}: {name} holds numbers that are not finite"
                yield Failure("integrity", engine, what, None, None)


def _is_finite(path: Path, name: str) -> bool:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        stored = file.get_slice(name)
        n = stored.get_shape()[0]
        parts: Iterator[Tensor] = (stored[at : at + ROWS] for at in range(0, n, ROWS))
        return all(bool(part.isfinite().all()) for part in parts)
