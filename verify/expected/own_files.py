"""What of a folder's files can be held against each other without recipe or base: index against
weight files, graphs and genai_config.json against what the exporter writes. Nothing is run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bake.base import INDEX, BaseModel
from bake.errors import BakeoutError, FolderError, short
from export.carriers.carriers import CARRIERS
from export.carriers.onnx.precisions import PRECISIONS
from export.code_check import MODELING_FILE
from export.manifest import AGAIN, Manifest, read_json, versions
from verify.expected.expected_config import differences
from verify.expected.graph_structure import graph_differences
from verify.expected.weight_files import index_failures
from verify.report.findings import Failure

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from verify.engines.onnx_files import Graph

GENAI = "genai_config.json"
_EXPORTERS = ("torch", "transformers")
"""Tools whose version decides how a graph is written."""


@contextmanager
def as_damaged(folder: Path) -> Iterator[None]:
    """What a config, header or graph of wrong types raises within the block is a FolderError."""
    try:
        yield
    except BakeoutError:
        raise
    except Exception as error:  # transformers, onnx and safetensors raise kinds of their own
        reason = (str(error).splitlines() or [""])[0]
        raise FolderError(
            f"{folder}: its files do not fit together ({type(error).__name__}: {short(reason)}); "
            f"expected what bakeout writes; {AGAIN}"
        ) from error


def own_failures(folder: Path, manifest: Manifest, graphs: Sequence[Graph]) -> list[Failure]:
    """What of a folder's files does not belong together.

    Args:
        folder: whose files have the hashes that its manifest states.
        manifest: of the folder, of a known carrier.
        graphs: of the folder.

    Raises:
        BakeoutError: a file cannot be read.
    """
    carrier, files = CARRIERS[manifest.carrier], manifest.files
    found: list[Failure] = []
    if files.get("recipe.toml") != manifest.recipe_sha256:
        what = "manifest.json: its recipe_sha256 is not that of recipe.toml"
        stated = manifest.recipe_sha256
        found.append(Failure("integrity", carrier.engine, what, stated, files.get("recipe.toml")))
    if carrier.own_code and INDEX in files and MODELING_FILE not in files:
        what = f"{MODELING_FILE}: missing; nobody can load these weights without it"
        found.append(Failure("integrity", carrier.engine, what, None, None))
    with as_damaged(folder):
        if not carrier.over_base:
            found += index_failures(folder, files, carrier.engine)
        if not found and (graphs or GENAI in files):
            found += _graph_failures(folder, manifest, graphs)
    return found


def _graph_failures(folder: Path, manifest: Manifest, graphs: Sequence[Graph]) -> Iterator[Failure]:
    engine = CARRIERS[manifest.carrier].engine
    if not graphs:
        yield Failure("integrity", engine, f"{GENAI}: there is no graph for it", None, None)
        return
    from export.carriers.onnx.regenerated import expected_genai, expected_graph, open_source

    names = [tensor.name for tensor in graphs[0].model.graph.initializer]
    source = open_source(folder, manifest, names)
    for graph in graphs:
        expected = expected_graph(source, _precision(graph), inline=graph.inlined)
        file = PRECISIONS[_precision(graph)].file
        origin = INDEX in manifest.files
        for failure in graph_differences(graph.name, file, graph.model, expected, origin=origin):
            yield replace(failure, what=f"{failure.what}{_other_exporter(manifest)}")
    if GENAI in manifest.files:
        config = read_json(folder / GENAI)
        allowed = expected_genai(source, [_precision(graph) for graph in graphs])
        told = [list(differences(engine, GENAI, config, _as_read(of))) for of in allowed]
        unknown = Failure("integrity", engine, f"{GENAI}: unknown in this family", None, None)
        yield from min(told, key=len, default=[unknown])


def _other_exporter(manifest: Manifest) -> str:
    """What a folder says of tools that write a graph, where they are of other versions here."""
    here = versions()
    other = [
        f"{tool} {short(manifest.tools[tool])} (here {here[tool]})"
        for tool in _EXPORTERS
        if manifest.tools.get(tool, here[tool]).partition("+")[0] != here[tool].partition("+")[0]
    ]
    if not other:
        return ""
    return (
        f"; the folder says that it was written with {' and '.join(other)}, which may write "
        "another graph: verify it with that version, or export it again"
    )


def data_failures(
    folder: Path, manifest: Manifest, graphs: Sequence[Graph], base: BaseModel
) -> Iterator[Failure]:
    """What of rounded graphs' numbers is not their weights, rounded: every number is rounded anew.

    Args:
        folder: in which `own_failures` found nothing.
        manifest: of the folder.
        graphs: of the folder.
        base: that the recipe names; its weights are meant where the folder brings none. Graphs of
            a compiled folder without its weights are not compared.
    """
    from export.carriers.onnx.regenerated import (
        Comparison,
        clamps_in,
        expected_graph,
        of_base,
        open_source,
    )

    rounded = [graph for graph in graphs if not PRECISIONS[_precision(graph)].shared]
    alone = INDEX not in manifest.files
    if not rounded or (alone and not CARRIERS[manifest.carrier].own_code):
        return
    names = [tensor.name for tensor in rounded[0].model.graph.initializer]
    source = open_source(folder, manifest, names)
    for graph in rounded:
        data = graph.path.with_name(f"{graph.path.name}_data")
        given = (
            of_base(source, base, clamps_in(graph.model, graph.path.parent)) if alone else source
        )
        compared = Comparison(data)
        expected_graph(given, _precision(graph), compared)
        compared.close()
        if compared.differs is not None:
            where = _tensor_at(graph, compared.differs)
            what = f"{PRECISIONS[_precision(graph)].file}_data: {where} is not the weights, rounded"
            yield Failure("integrity", graph.name, what, None, None)


def graph_clamps(graph: Graph, layer: int) -> dict[str, NDArray[np.generic]]:
    """The tensors of a layer's clamp, by name, as a graph of rounded weights holds them."""
    from export.carriers.onnx.regenerated import clamps_in

    mark = f"layers.{layer}.sae_clamp."
    stored = clamps_in(graph.model, graph.path.parent)
    return {
        name.partition(mark)[2]: tensor.array() for name, tensor in stored.items() if mark in name
    }


def _precision(graph: Graph) -> str:
    """The precision that a graph stands for, by its place in the folder."""
    return next(name for name, of in PRECISIONS.items() if of.engine == graph.name)


def _tensor_at(graph: Graph, offset: int) -> str:
    """The tensor that lies at an offset of a graph's data."""
    found = "its end"
    for tensor in graph.model.graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        begin, length = int(place.get("offset", 0)), int(place.get("length", 0))
        if place and begin <= offset < begin + length:
            found = str(tensor.name)
    return found


def _as_read(config: Mapping[str, object]) -> dict[str, object]:
    """As JSON gives it back."""
    read: dict[str, object] = json.loads(json.dumps(config))
    return read
