"""The safetensors file of clamps: a few rows each, and whole encoders of TopK SAEs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from bake.tensors import Tensors, write_tensors


def save_clamps(path: Path, tensors: Mapping[str, NDArray[np.generic]], wholes: Tensors) -> None:
    """Write the tensors of clamps.

    Args:
        path: of the file.
        tensors: by name.
        wholes: encoders of TopK SAEs by name, which are written block by block.
    """
    # safetensors writes an array's memory as it lies, whatever its strides say.
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    if not wholes:
        save_file(arrays, path, metadata={"format": "pt"})
        path.chmod(0o644)  # it is made readable by its owner alone
        return
    found: Tensors = dict(wholes)
    for name, array in arrays.items():
        dtype = "BOOL" if array.dtype == np.bool_ else "F32"
        found[name] = (dtype, array.shape, _once(array.tobytes))
    order = ("F32", "BF16", "F16", "BOOL")  # each where its numbers are aligned
    aligned = sorted(found.items(), key=lambda item: order.index(item[1][0]))
    write_tensors(path, dict(aligned), lambda _: None)


def _once(give: Callable[[], bytes]) -> Callable[[], Iterator[bytes]]:
    return lambda: iter([give()])
