"""`bakeout export onnx`: a clamped checkpoint → its graph beside it, checked before it appears."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
from onnx.helper import make_model, make_opsetid, set_model_props

from bake.errors import CheckError, FolderError, ModelError, OutputError, shown
from bake.files.folder_files import PARTIAL
from bake.files.scratch import Scratch
from bake.new_folder import check_output, check_space, new_folder
from bake.rounding import MIN_EFFECT
from bake.strangers import confined
from export.carriers.carriers import OF_BASE
from export.carriers.onnx import graph_check as onnx_check
from export.carriers.onnx.genai_config import GENAI_CONFIG, genai_config
from export.carriers.onnx.graph import FLOAT, FLOAT16, GraphWriter
from export.carriers.onnx.graph_weights import (
    PackedWeights,
    SharedWeights,
    Weights,
    packed_size,
)
from export.carriers.onnx.inlining import inline_file
from export.carriers.onnx.operator import function, opset_imports
from export.carriers.onnx.precisions import PRECISIONS, Precision, precision_of
from export.carriers.onnx.topk_operator import topk_function
from export.carriers.onnx.wiring import Architecture
from export.clamped import Clamped, check_weights, open_clamped, weights_sha256
from export.copying import hash_new
from export.folder_contents import copy_listed
from export.in_place import changing, put_files
from export.manifest import CARD, RoundedEntry
from export.witness_file import WITNESSES, Witnesses
from export.witness_prompts import find_witnesses

IR_VERSION = 10
"""Of the file format; ONNX Runtime reads it since 1.18."""
GRAPH_BYTES = 4 << 20
"""What a graph without its weights takes on the disk, at most."""


@dataclass(frozen=True)
class Exported:
    """What was written."""

    graph: Path
    n_clamps: int
    found: RoundedEntry
    """What it showed on the witnesses."""
    warning: str | None = None
    """Of a graph whose weights are rounded copies."""


def export_onnx(
    folder: Path,
    *,
    precision: str = "shared",
    out: Path | None = None,
    inline: bool = False,
    device: str = "cpu",
    force: bool = False,
    card: str = "",
    progress: Callable[[str, float], None] = lambda _what, _share: None,
) -> Exported:
    """Write a clamped checkpoint's graph, whole or not at all.

    Args:
        folder: a clamped checkpoint of a text model, or one compiled from it.
        precision: of `PRECISIONS`; shared points into the checkpoint's own files, the others write
            rounded copies.
        out: a folder of its own for a rounded graph; default: beside the checkpoint.
        inline: put the clamp's body in place of its nodes, for tools that know no ONNX functions.
        device: as torch names it, where the model runs if witnesses are to be found. The graph
            itself is checked on the CPU.
        force: replace a graph that is there.
        card: text of README.md, in a folder of its own.
        progress: told what is being done, and the share of it that is done, 0 to 1.

    Raises:
        FolderError: the folder is no clamped checkpoint, or a shard is not what the manifest says.
        ModelError: its family is not supported.
        OutputError: the graph exists, or does not fit on the disk.
        CheckError: the graph does not say what the checkpoint says.
    """
    chosen = precision_of(precision)
    with nullcontext() if out is not None else changing(folder):
        return _export(folder, precision, chosen, out, inline, device, force, card, progress)


def _export(
    folder: Path,
    name: str,
    chosen: Precision,
    out: Path | None,
    inline: bool,
    device: str,
    force: bool,
    card: str,
    progress: Callable[[str, float], None],
) -> Exported:
    clamped = open_clamped(folder, with_graphs=True)
    architecture = Architecture.from_config(clamped.config)
    _check_target(clamped, chosen, out, force)
    check_weights(clamped, lambda share: progress("hash", share))
    progress("witnesses", 0.0)
    stored = WITNESSES in clamped.manifest.files
    if not stored and not clamped.sites:
        raise FolderError(
            f"{folder}: has no witnesses, so a graph cannot be checked; compile it from a "
            "checkpoint that has some (`bakeout bake --witnesses`)"
        )
    witnesses = Witnesses.load(folder) if stored else find_witnesses(clamped, [], device)
    if witnesses is None:
        raise FolderError(
            f"{folder}: no prompt was found that fires its clamp, so a graph cannot be checked; "
            "bake it from a recipe with a [verify] table, whose forget questions are tried"
        )
    place = nullcontext(folder) if out is None else new_folder(out, force=force)
    with place as root:
        partial = root / PARTIAL
        partial.mkdir(exist_ok=True)
        # A shared graph must lie beside its weights even before it is finished.
        graph = root / f"{PARTIAL}.onnx" if chosen.shared else partial / Path(chosen.file).name
        progress("write", 0.0)
        write_graph(clamped, architecture, name, graph)
        progress("check", 0.0)
        # What is compiled with 16-bit weights is rounded once more than the checkpoint.
        rounded = not clamped.sites and clamped.stored_in != "float32"
        exact = chosen.shared and not rounded
        found = check_graph(witnesses, graph, n_clamps=len(clamped.sites), exact=exact)
        if inline and clamped.sites:  # what is taken out to see what it does is a node before
            inline_file(graph)
            found = check_graph(witnesses, graph, n_clamps=0, exact=exact)
        rounded_graphs = dict(clamped.manifest.rounded)
        if not chosen.shared:
            rounded_graphs[chosen.file] = found
        new = (
            {} if chosen.shared else {f"{chosen.file}_data": graph.with_name(f"{graph.name}_data")}
        )
        new[chosen.file] = graph
        if not stored:
            new[WITNESSES] = witnesses.save(partial)
        genai = clamped.family.genai
        if genai and (
            out is not None or chosen.shared or not (root / PRECISIONS["shared"].file).exists()
        ):
            new[GENAI_CONFIG] = _write_genai_config(clamped, partial, chosen.file)
        if out is None:
            changes = {"rounded": rounded_graphs} if rounded_graphs else {}
            put_files(root, clamped.manifest, new, **changes)
        else:
            _fill(clamped, root, new, card, {chosen.file: found})
    warning = None if chosen.shared else found.warning
    path = (folder if out is None else out) / chosen.file
    return Exported(path, len(clamped.sites), found, warning)


def _check_target(clamped: Clamped, precision: Precision, out: Path | None, force: bool) -> None:
    """Raise OutputError before anything is written."""
    size = GRAPH_BYTES
    if not precision.shared:
        size += packed_size(clamped.tensors, precision)
    if out is None:
        name = precision.file
        # What the manifest does not list was left by an export that was killed.
        if name in clamped.manifest.files and not force:
            raise OutputError(f"output {clamped.folder / name}: exists; pass --force to replace it")
        check_space(clamped.folder, size)
    elif precision.shared:
        rounded = ", ".join(name for name, of in PRECISIONS.items() if not of.shared)
        raise OutputError(
            f"output {out}: a shared graph uses the weights of {clamped.folder} in place and lies "
            f"beside them; expected --out with {rounded} only. Leave it out"
        )
    else:
        check_output(out, inputs=[clamped.folder], size=size, force=force)


def write_graph(clamped: Clamped, architecture: Architecture, name: str, graph: Path) -> None:
    """Write one graph, and the data file beside it where its weights are rounded copies."""
    precision = PRECISIONS[name]
    if precision.shared:
        model = model_of(clamped, architecture, name, SharedWeights(clamped.tensors))
    else:
        data = graph.with_name(f"{graph.name}_data")
        with data.open("wb") as file:
            logic = tuple(f"{clamped.layer_prefix}{i}.mlp." for i in clamped.compiled_layers)
            weights = PackedWeights(clamped.tensors, precision, file, data.name, logic)
            model = model_of(clamped, architecture, name, weights)
    graph.write_bytes(model.SerializeToString(deterministic=True))


def model_of(
    clamped: Clamped, architecture: Architecture, name: str, weights: Weights
) -> onnx.ModelProto:
    """The whole file of a graph but for the data of its weights: the same for the same folder."""
    precision = PRECISIONS[name]
    writer = GraphWriter(
        architecture,
        weights,
        prefix=clamped.layer_prefix,
        head=clamped.head,
        biases=frozenset(name for name in clamped.tensors if name.endswith(".bias")),
        cache=FLOAT16 if precision.bits == 16 else FLOAT,
        exact=precision.shared,
    )
    imports = opset_imports()
    if precision.blocks:
        imports.append(make_opsetid("com.microsoft", 1))
    functions = [function()] if architecture.sites.keys() - architecture.topks.keys() else []
    functions += [topk_function()] if architecture.topks else []
    try:
        graph = writer.write()
    except KeyError as error:
        raise ModelError(
            f"{clamped.name}: config.json asks for {shown(error.args[0])}, which its weights have "
            "not; expected the config that they came with. Bake it again"
        ) from error
    model = make_model(graph, functions=functions, opset_imports=imports, ir_version=IR_VERSION)
    model.producer_name, model.producer_version = "bakeout", version("bakeout")
    provenance = {
        "bakeout.version": version("bakeout"),
        "bakeout.exact": "true" if precision.shared else "false",
        "bakeout.precision": name,
        "bakeout.recipe_sha256": clamped.manifest.recipe_sha256,
        "bakeout.weights_sha256": weights_sha256(
            {
                name: clamped.manifest.files[name]
                for name in clamped.shards
                if name in clamped.manifest.files
            }
        ),
    }
    set_model_props(model, provenance)
    return model


# --------------------------------------------------------------------------- the check


def check_graph(witnesses: Witnesses, graph: Path, *, n_clamps: int, exact: bool) -> RoundedEntry:
    """Check and run a graph in a fresh process that knows nothing of bakeout.

    Args:
        witnesses: what to run it on.
        graph: where it lies, and its data beside it.
        n_clamps: how many SAEClamp nodes it must hold; none where the clamp is compiled in.
        exact: whether its logits must be the checkpoint's.

    Returns:
        How far it is from the checkpoint, beside what the clamp does.

    Raises:
        CheckError: onnx.checker or ONNX Runtime refuses it, a clamp is not there or does nothing,
            the logits are not the checkpoint's, or they are nearer the base's.
    """
    inputs = {
        name: getattr(witnesses, name).numpy()
        for name in ("input_ids", "attention_mask", "places", "token_ids")
    }
    with Scratch("check") as scratch:
        asked, answered = scratch / "asked.npz", scratch / "answered.npz"
        np.savez(asked, **inputs)
        said = confined.run(
            *(onnx_check.__file__, str(graph.resolve()), str(asked), str(answered)),
            scratch=scratch,
        )
        if said is not None:
            raise CheckError(
                f"the graph was not kept: a fresh process refuses it: {said}; please report this"
            )
        with np.load(answered) as found:
            n_found = int(found["n_clamps"])
            logits, unclamped = found["logits"], found["unclamped"]
    if not n_clamps:  # nothing can be taken out of the graph; the checkpoint without its clamp is
        unclamped = witnesses.unclamped.numpy()
    expected, effect = witnesses.logits.numpy(), logits - unclamped
    difference = float(np.abs(logits - expected).max())
    true_effect = expected - witnesses.unclamped.numpy()
    shown = float((effect * true_effect).sum() / (true_effect * true_effect).sum())
    bar = witnesses.rounding if exact else np.inf
    if n_found != n_clamps or not difference <= bar or not shown >= MIN_EFFECT:
        raise CheckError(
            f"the graph was not kept: it holds {n_found} of {n_clamps} SAEClamp nodes, its logits "
            f"differ from the checkpoint's by {difference:.1e} (bar {bar:.1e}), and it shows "
            f"{shown:.2f} of the clamp's effect (bar {MIN_EFFECT}); please report this"
        )
    to_hook, to_base = (
        float(np.linalg.norm(logits - of)) for of in (expected, witnesses.unclamped.numpy())
    )
    if to_base < to_hook:
        raise CheckError(
            f"the graph was not kept: rounding takes its logits nearer the base's than the "
            f"checkpoint's ({to_base:.1e} against {to_hook:.1e} over all witnesses); expected the "
            "other way. Export it with more bits"
        )
    return RoundedEntry(error=difference, effect=float(np.abs(true_effect).max()), shown=shown)


# --------------------------------------------------------------------------- files around it


def _fill(
    clamped: Clamped,
    root: Path,
    new: dict[str, Path],
    card: str,
    rounded: dict[str, RoundedEntry],
) -> None:
    """Give a folder of its own the graph, the card, and everything of the checkpoint but its
    weights and what is made of them; the manifest last.
    """
    files = {}
    for name, path in new.items():
        (root / name).parent.mkdir(exist_ok=True)
        path.replace(root / name)
        files[name] = hash_new(root / name)
    (root / CARD).write_text(card, encoding="utf-8")
    files[CARD] = hash_new(root / CARD)
    kept = rf"{OF_BASE}|{re.escape(WITNESSES)}|config\.json|recipe\.toml"
    for name in (name for name in clamped.manifest.files if re.fullmatch(kept, name)):
        files[name] = copy_listed(clamped.folder, clamped.manifest, name, root / name)
    shutil.rmtree(root / PARTIAL)
    # What holds rounded weights alone is not exact.
    clamped.manifest.changed(files=files, exact=False, rounded=rounded).write(root)


def _write_genai_config(clamped: Clamped, folder: Path, graph: str) -> Path:
    path = folder / GENAI_CONFIG
    config = genai_config(clamped.config, clamped.folder, graph)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return path
