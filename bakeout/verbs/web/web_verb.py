"""`bakeout web`: a page on this machine that runs a folder's graph in the browser."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer

from bake.errors import BakeoutError, FolderError
from bake.files.folder_files import file_in
from bake.reading.capped import read_json
from bakeout.verbs.arguments import FolderPath
from bakeout.verbs.streaming import Language
from bakeout.verbs.web.loopback import HOST, Loopback, Resource
from bakeout.verbs.web.served_graphs import base_graph, clamped_graph, clamps_of
from export.carriers.onnx.precisions import PRECISIONS, precision_of
from export.clamped import clamped_layers, read_config
from export.code_check import check_code
from export.folder_contents import check_contents, check_files
from export.manifest import Manifest
from verify.engines.onnx_files import Graph, data_of, graph_failures, open_graph

PACKAGES = {
    "onnxruntime-web": ("dist/ort.wasm.min.mjs", "ort-wasm-simd-threaded.*"),
    "@huggingface/tokenizers": ("dist/tokenizers.mjs", ""),
}
"""npm's packages that the page needs: the module, and a pattern of what lies beside it."""
_SENTINEL = "bakeout0prompt"
"""Stands for a prompt while the chat template is rendered."""


class WebError(BakeoutError):
    """The page cannot be served: a package of npm is missing, or the port is taken."""


@dataclass(frozen=True)
class Served:
    """A folder's graph, opened and checked."""

    graph: Graph
    precision: str
    data: dict[str, Path]
    """Files that hold its weights, by the name that the graph knows."""


def open_served(folder: Path, precision: str | None) -> Served:
    """A folder's graph, whose files are those that its manifest lists.

    Args:
        folder: what bakeout wrote.
        precision: of `PRECISIONS`; None takes the smallest.

    Raises:
        FolderError: there is no such graph, or something is damaged.
    """
    check_code(folder)
    layers = clamped_layers(read_config(folder))
    manifest = Manifest.read(folder)
    check_contents(folder, manifest)
    by_size = sorted(PRECISIONS, key=lambda name: PRECISIONS[name].bits)
    asked = by_size if precision is None else [precision]
    found = next((n for n in asked if (folder / precision_of(n).file).is_file()), None)
    if found is None:
        option = "" if precision is None else f" --precision {precision}"
        raise FolderError(
            f"{folder}: has no {precision or 'ONNX'} graph; write it with `bakeout export onnx "
            f"{folder}{option}`"
        )
    graph = open_graph(PRECISIONS[found].engine, folder / PRECISIONS[found].file)
    if failures := graph_failures([graph], layers, manifest.files):
        raise FolderError(f"{folder}: {failures[0].what}; export it again")
    below = graph.path.parent.relative_to(folder)
    names = data_of(graph, below)
    check_files(folder, manifest, [PRECISIONS[found].file, "tokenizer.json", *names])
    return Served(graph, found, {Path(name).name: file_in(folder, name) for name in names})


def site_of(folder: Path, served: Served, modules: Path, *, beside: bool) -> dict[str, Resource]:
    """Everything that the page is given, by path.

    Args:
        folder: whose graph it is.
        served: the graph.
        modules: where npm has installed.
        beside: whether the base answers too: the same graph, its clamps taken out.

    Raises:
        WebError: a package is missing, or there is no clamp to take out.
        FolderError: the folder's tokenizer or chat template cannot be used.
    """
    found = {
        f"/{name}": Resource.of_bytes(resources.files(__package__).joinpath(name).read_bytes())
        for name in ("page.css", "page.js", "clamped_model.js")
    }
    page = resources.files(__package__).joinpath("page.html").read_bytes()
    found["/"] = Resource.of_bytes(page)
    for package, (entry, beside_it) in PACKAGES.items():
        module = modules / package / entry
        if not module.is_file():
            raise WebError(
                f"{modules}: has no {package}/{entry}; install it there with `npm install "
                f"{' '.join(PACKAGES)}`, or name the folder with --node-modules"
            )
        name = package.rpartition("/")[2]
        found[f"/modules/{name}.mjs"] = Resource.of_file(module)
        for path in module.parent.glob(beside_it) if beside_it else ():
            found[f"/modules/{path.name}"] = Resource.of_file(path)
    models = {"clamped": clamped_graph(served.graph.model)}
    if beside and not clamps_of(served.graph.model):
        raise WebError(
            f"--beside: the graph of {folder} has no SAEClamp to take out, since its clamp is "
            "compiled or inlined; expected one with the operator. Leave it out"
        )
    if beside:
        models = {"base": base_graph(served.graph.model), **models}
    for name, model in models.items():
        graph = model.SerializeToString(deterministic=True)
        found[f"/graphs/{name}.onnx"] = Resource.of_bytes(graph)
    for name, path in served.data.items():
        found[f"/data/{name}"] = Resource.of_file(path)
    found["/folder/tokenizer.json"] = Resource.of_file(file_in(folder, "tokenizer.json"))
    facts = _facts(folder, served, list(models))
    found["/facts.json"] = Resource.of_bytes(json.dumps(facts).encode())
    return found


def _facts(folder: Path, served: Served, models: list[str]) -> dict[str, Any]:
    """What the page has to know."""
    language = Language(folder)
    before, _, after = language.prompt_text(_SENTINEL).partition(_SENTINEL)
    name = folder.resolve().name
    return {
        "name": name,
        "what": f"{served.precision} graph, in ONNX Runtime's WebAssembly, on this machine alone",
        "models": [{"name": of, "graph": f"/graphs/{of}.onnx"} for of in models],
        "data": [{"path": of, "url": f"/data/{of}"} for of in served.data],
        "tokenizer_config": read_json(file_in(folder, "tokenizer_config.json")),
        "before": before,
        "after": after,
        "bos": language.tokenizer.bos_token_id,
        "ends": sorted(language.ends),
        "context": language.context,
    }


def open_site(
    folder: Path,
    *,
    precision: str | None = None,
    modules: Path = Path("node_modules"),
    beside: bool = False,
    port: int = 0,
) -> Loopback:
    """A server of the page, not yet started; see `web` for the arguments.

    Raises:
        BakeoutError: something cannot be served.
    """
    served = open_served(folder, precision)
    site = site_of(folder, served, modules, beside=beside)
    try:
        return Loopback(site, port)
    except OSError as error:
        raise WebError(
            f"--port {port}: {HOST} does not give it ({error.strerror}); take another, or 0"
        ) from error


def web(
    folder: FolderPath,
    precision: Annotated[
        str | None,
        typer.Option(help="Of the graph. Default: the smallest.", show_default=False),
    ] = None,
    beside: Annotated[
        bool,
        typer.Option("--beside", help="Let the base answer too: the graph without its clamps."),
    ] = False,
    node_modules: Annotated[
        Path, typer.Option(metavar="DIR", help="Where npm has installed what the page needs.")
    ] = Path("node_modules"),
    port: Annotated[
        int, typer.Option(help="Of 127.0.0.1; 0 takes a free one.", min=0, max=65535)
    ] = 8642,
) -> None:
    """Serve a page on this machine that runs the folder in the browser: chat, and what fired.

    The browser needs no network: the page is given the folder's graph and tokenizer, and two
    packages that `npm install onnxruntime-web @huggingface/tokenizers` puts into `node_modules`.
    Ctrl-C ends it.
    """
    with open_site(
        folder, precision=precision, modules=node_modules, beside=beside, port=port
    ) as site:
        typer.echo(f"{site.address}  (Ctrl-C ends)")
        try:
            site.serve_forever()
        except KeyboardInterrupt:
            typer.echo("")
