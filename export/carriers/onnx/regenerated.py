"""What the graphs of a folder and its genai_config.json must be: written anew from its config, its
weights' sizes and, where they are at hand, the weights themselves. Nothing is run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from bake.base import INDEX, BaseModel
from bake.errors import FolderError
from bake.tensors import StoredTensor, indexed_tensors
from export.carriers.carriers import CARRIERS
from export.carriers.onnx.genai_config import genai_config
from export.carriers.onnx.graph_builder import Builder
from export.carriers.onnx.graph_weights import (
    ALIGNMENT,
    PackedWeights,
    SharedWeights,
    Weights,
    location,
)
from export.carriers.onnx.inlining import inlined
from export.carriers.onnx.onnx_folder import model_of
from export.carriers.onnx.precisions import PRECISIONS
from export.carriers.onnx.wiring import Architecture
from export.clamped import Clamped, open_clamped, open_config
from export.manifest import AGAIN, Manifest

_BYTES: dict[int, int] = {
    onnx.TensorProto.FLOAT: 4,
    onnx.TensorProto.FLOAT16: 2,
    onnx.TensorProto.UINT8: 1,
    onnx.TensorProto.BOOL: 1,
}
_FIRST_NORM = "layers.0.input_layernorm.weight"
"""A tensor that every graph holds under its own name, as it is."""


class SizedWeights(PackedWeights):
    """Rounded copies of which only the places are known: nothing is read."""

    def __init__(self, clamped: Clamped, name: str, file: str, logic: tuple[str, ...]) -> None:
        super().__init__(clamped.tensors, PRECISIONS[name], Comparison(None), file, logic)
        self._end = 0

    def _store(
        self,
        g: Builder,
        name: str,
        kind: int,
        shape: Sequence[int],
        blocks: Iterable[NDArray[np.generic]],
    ) -> str:
        start = -(-self._end // ALIGNMENT) * ALIGNMENT
        length = _BYTES[kind] * int(np.prod(shape))
        self._end = start + length
        return g.external(name, kind, shape, location(self._file, start, length))


class Comparison:
    """Takes what would be written into a data file, and compares it with what lies there.

    Args:
        path: of the file; None compares nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._file = None if path is None else path.open("rb")
        self._at = 0
        self.differs: int | None = None
        """Offset of the first part that is not what would be written, in bytes."""

    def tell(self) -> int:
        """Bytes compared so far."""
        return self._at

    def write(self, data: bytes | memoryview, /) -> None:
        """Compare the next part."""
        wanted = memoryview(data).cast("B")
        alike = self._file is None or self.differs is not None
        if self._file is not None and not alike and self._file.read(wanted.nbytes) != wanted:
            self.differs = self._at
        self._at += wanted.nbytes

    def close(self) -> None:
        """Whether more lies behind it is compared too."""
        if self._file is not None:
            if self.differs is None and self._file.read(1):
                self.differs = self._at
            self._file.close()


def open_source(folder: Path, manifest: Manifest, prefixed: Sequence[str]) -> Clamped:
    """What a folder's graphs were made from: its own weights, or where it holds rounded graphs
    alone, only their names and sizes, as its config has them.

    Args:
        folder: a clamped checkpoint or a compiled one, or graphs that were exported from one.
        manifest: of the folder.
        prefixed: names of the tensors of any graph of it.

    Raises:
        FolderError: it is incomplete or damaged.
    """
    if INDEX in manifest.files:
        return open_clamped(folder, with_graphs=True)
    config, model_class = open_config(folder, stock=not CARRIERS[manifest.carrier].own_code)
    first = next((name for name in prefixed if name.endswith(_FIRST_NORM)), None)
    if first is None:
        raise FolderError(f"{folder}: its graph holds no {_FIRST_NORM}; expected one. {AGAIN}")
    backbone = first.removesuffix(_FIRST_NORM)
    own_head = any(name.startswith("lm_head.weight") for name in prefixed)
    tensors = {
        (backbone + name.removeprefix("model.") if name.startswith("model.") else name): tensor
        for name, tensor in _sized(config, model_class).items()
        if name != "lm_head.weight" or own_head
    }
    return Clamped(folder, manifest, config, model_class, tensors, f"{backbone}layers.")


def _sized(config: Any, model_class: str) -> dict[str, StoredTensor]:
    """Names and shapes of a model's tensors."""
    import torch
    import transformers

    import bake.modeling_clamped_gemma as modeling

    kind = getattr(modeling, model_class, None) or getattr(transformers, model_class)
    with torch.device("meta"):
        model = kind(config)
    return {
        name: StoredTensor(
            Path(), "BOOL" if tensor.dtype == torch.bool else "F32", tuple(tensor.shape), 0, 0
        )
        for name, tensor in model.state_dict().items()
    }


def of_base(source: Clamped, base: BaseModel, clamps: Mapping[str, StoredTensor]) -> Clamped:
    """The same with the base's own weights, and the clamps' tensors wherever they lie.

    Args:
        source: of rounded graphs alone.
        base: that the recipe names.
        clamps: the clamps' tensors, by name.

    Raises:
        FolderError: the base has other tensors.
    """
    tensors = {**indexed_tensors(base.folder, base.weight_map), **clamps}
    for name, tensor in source.tensors.items():
        if name not in tensors or tensors[name].shape != tensor.shape:
            raise FolderError(
                f"{source.folder}: its graph has a tensor {name} {list(tensor.shape)}, which the "
                f"recipe's base has otherwise or not at all; expected the base's. {AGAIN}"
            )
    return replace(source, tensors={name: tensors[name] for name in source.tensors})


def clamps_in(graph: onnx.ModelProto, folder: Path) -> dict[str, StoredTensor]:
    """The clamps' tensors of a graph with rounded weights, where they lie in its data file.

    Args:
        graph: whose places are the exporter's.
        folder: in which its data lies.
    """
    found = {}
    for tensor in graph.graph.initializer:
        if ".sae_clamp." in tensor.name:
            place = {entry.key: entry.value for entry in tensor.external_data}
            found[tensor.name] = StoredTensor(
                folder / place["location"],
                "BOOL" if tensor.data_type == onnx.TensorProto.BOOL else "F32",
                tuple(tensor.dims),
                int(place["offset"]),
                int(place["length"]),
            )
    return found


def expected_graph(
    source: Clamped, name: str, compared: Comparison | None = None, *, inline: bool = False
) -> onnx.ModelProto:
    """A graph as the exporter writes it.

    Args:
        source: what it is made from.
        name: its precision, of `PRECISIONS`.
        compared: of rounded weights, what lies in the data file; None compares only places.
        inline: with the clamp's body in place of its nodes.
    """
    precision = PRECISIONS[name]
    file = f"{Path(precision.file).name}_data"
    logic = tuple(f"{source.layer_prefix}{i}.mlp." for i in source.compiled_layers)
    weights: Weights
    if precision.shared:
        weights = SharedWeights(source.tensors)
    elif compared is None:
        weights = SizedWeights(source, name, file, logic)
    else:
        weights = PackedWeights(source.tensors, precision, compared, file, logic)
    model = model_of(source, Architecture.from_config(source.config), name, weights)
    return inlined(model) if inline else model


def expected_genai(source: Clamped, graphs: Sequence[str]) -> list[dict[str, Any]]:
    """What genai_config.json may be: of the shared graph where there is one, else of any.

    Args:
        source: of the graphs.
        graphs: precisions that lie in the folder.

    Returns:
        What is allowed; nothing where onnxruntime-genai does not run the family.
    """
    if not source.family.genai:
        return []
    chosen = ["shared"] if "shared" in graphs else list(graphs)
    return [genai_config(source.config, source.folder, PRECISIONS[name].file) for name in chosen]
