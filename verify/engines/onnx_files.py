"""The ONNX files of a clamped folder: which there are, and whether they may be opened at all."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.errors import FolderError
from bake.files.folder_files import file_in, wrong_name
from bake.reading.capped import GRAPH_BYTES, read_bytes
from export.carriers.onnx.precisions import PRECISIONS, of_engine
from verify.report.findings import Failure

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

CLAMP_OPS = (("ai.bakeout", "SAEClamp"), ("ai.bakeout", "SAETopKClamp"))


@dataclass(frozen=True)
class Graph:
    """One graph of a folder."""

    name: str
    """Of the engine."""
    path: Path
    model: ModelProto
    """Without the data of its initializers."""

    @property
    def properties(self) -> dict[str, str]:
        """What its metadata says of its origin."""
        return {entry.key: entry.value for entry in self.model.metadata_props}

    @property
    def weight(self) -> int:
        """About how many bytes its weights take once it runs: floats are computed with in 32
        bits, whatever they are stored in.
        """
        import onnx

        total = 0
        for tensor in self.model.graph.initializer:
            stored = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            size = max(stored.itemsize, 4) if stored.kind not in "iu" else stored.itemsize
            total += size * math.prod(tensor.dims)
        return total

    @property
    def inlined(self) -> bool:
        """Whether it says that the clamp's body stands in it in place of nodes."""
        return self.properties.get("bakeout.inlined") == "true"


def find_graphs(folder: Path, files: Mapping[str, str] | None = None) -> list[Graph]:
    """The graphs of a folder that are there, opened but not run.

    Args:
        folder: the folder.
        files: sha256 of its files, as the manifest states them; None leaves it to `graph_failures`
            to say that a graph needs another.

    Raises:
        FolderError: one is truncated, or points to data that is not in the folder, or not listed.
    """
    paths = {of.engine: folder / of.file for of in PRECISIONS.values()}
    graphs = [open_graph(name, path) for name, path in paths.items() if path.is_file()]
    for graph in graphs if files is not None else ():
        for data in data_of(graph, graph.path.parent.relative_to(folder)):
            if data not in (files or {}):
                raise FolderError(
                    f"{graph.path}: points into {data}, which the manifest does not list; expected "
                    "files of the folder. Do not use this folder"
                )
    return graphs


def open_graph(name: str, path: Path) -> Graph:
    """Parse a graph, and look where its data lies.

    Raises:
        FolderError: it is truncated, or points to data that is not beside it.
    """
    import onnx
    from google.protobuf.message import DecodeError

    file_in(path.parent, path.name)
    try:
        model = onnx.load_model_from_string(read_bytes(path, GRAPH_BYTES))
    except (OSError, DecodeError, ValueError) as error:
        raise FolderError(
            f"{path}: cannot be read as ONNX ({error}); export or download it again"
        ) from error
    if not model.graph.node:
        raise FolderError(f"{path}: holds no graph; export or download it again")
    sizes: dict[str, int] = {}
    for tensor in _tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            data = {entry.key: entry.value for entry in tensor.external_data}
            _check_data(path, tensor.name, data, sizes)
    return Graph(name, path, model)


def unlinked(model: ModelProto, path: Path) -> tuple[ModelProto, Path]:
    """A graph whose data is named where it really lies, and that folder: ONNX Runtime takes data of
    one folder only, and follows no link out of it. Where the graph is no link, it stays as it is.

    Args:
        model: the graph.
        path: where it was read from.
    """
    real = path.resolve()
    if real.parent == path.parent.resolve():
        return model, real.parent
    renamed = type(model)()
    renamed.CopyFrom(model)
    for tensor in renamed.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = (path.parent / entry.value).resolve().name
    return renamed, real.parent


def _check_data(graph: Path, tensor: str, data: Mapping[str, str], sizes: dict[str, int]) -> None:
    file = data.get("location", "")
    if not isinstance(file, str) or wrong_name(file) is not None:  # bytes where it is no text
        raise FolderError(
            f'{graph}: {tensor} lies in "{file}"; expected a file beside the graph. Do not use '
            "this folder"
        )
    if file not in sizes:
        if not (graph.parent / file).is_file():
            raise FolderError(f"{graph}: needs {file}, which is not there; download it again")
        sizes[file] = file_in(graph.parent, file).stat().st_size
    try:
        begin, length = int(data.get("offset", 0)), int(data.get("length", 0))
    except ValueError as error:
        raise FolderError(f"{graph}: {tensor}: {error}; export or download it again") from error
    if begin < 0 or length < 0 or begin + length > sizes[file]:
        raise FolderError(
            f"{graph}: {tensor} lies beyond the end of {file}; export or download it again"
        )


def graph_failures(
    graphs: list[Graph], layers: list[int], files: Mapping[str, str]
) -> tuple[Failure, ...]:
    """What the graphs themselves show, before anything is run.

    Args:
        graphs: of the folder.
        layers: that its config clamps; none where the clamp is compiled in.
        files: sha256 of its files, as the manifest states them.

    Returns:
        Failures of kind `integrity`: a graph that was made from other weights, or that does not
        hold one clamp for each clamped layer.
    """
    weights = {name: sha for name, sha in files.items() if name.endswith(".safetensors")}
    failures = []
    for graph in graphs:
        precision = of_engine(graph.name)
        file = graph.path.name if precision is None else precision.file
        clamps = sum((node.domain, node.op_type) in CLAMP_OPS for node in graph.model.graph.node)
        # Of an inlined one every node is compared with the exporter's, where it is regenerated.
        n_nodes = 0 if graph.inlined else len(layers)
        if clamps != n_nodes:
            what = f"{file}: holds {clamps} clamps, config.json places {n_nodes}"
            failures.append(Failure("integrity", graph.name, what, clamps, n_nodes))
        used = {(n.domain, n.op_type) for n in graph.model.graph.node} & set(CLAMP_OPS)
        if used - {(of.domain, of.name) for of in graph.model.functions}:
            what = f"{file}: does not hold the body of its clamp"
            failures.append(Failure("integrity", graph.name, what, None, "SAEClamp"))
        stated = graph.properties.get("bakeout.weights_sha256")
        for data in data_of(graph, folder=Path(file).parent):
            if files and data not in files:
                what = f"{file}: points into {data}, which the manifest does not list"
                failures.append(Failure("integrity", graph.name, what, data, None))
        # A folder of rounded weights alone has nothing to compare its origin with.
        if weights and stated != _over(weights):
            what = f"{file}: was made from other weights than the folder holds; export it again"
            failures.append(Failure("integrity", graph.name, what, stated, _over(weights)))
    return tuple(failures)


def data_of(graph: Graph, folder: Path) -> list[str]:
    """The files that a graph's weights lie in, by their names in the folder."""
    entries = (entry for tensor in _tensors(graph.model) for entry in tensor.external_data)
    return sorted(
        {(folder / entry.value).as_posix() for entry in entries if entry.key == "location"}
    )


def _tensors(message: Any) -> Iterator[TensorProto]:
    """Every tensor of a model, wherever in it: initializers, attributes, bodies of functions."""
    from google.protobuf.message import Message
    from onnx import TensorProto

    for kind, value in message.ListFields():
        if kind.message_type is not None:
            for part in [value] if isinstance(value, Message) else value:
                if isinstance(part, TensorProto):
                    yield part
                else:
                    yield from _tensors(part)


def _over(files: Mapping[str, str]) -> str:
    lines = "".join(f"{name} {sha}\n" for name, sha in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
