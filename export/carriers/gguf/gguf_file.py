"""`export gguf`: a stock folder's model as one GGUF file, written tensor by tensor and checked.

Takes whatever stock Gemma classes load: a compiled folder, one whose weights were trained to
forget, or a base. The keys and the container are `gguf`'s; here stands which numbers go where.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bake.base import open_base
from bake.errors import ExportError, OutputError
from bake.families import FAMILIES, Family
from bake.new_folder import MANIFEST, check_space, disk_full, fsync_folder, whole_file
from bake.reading.capped import open_regular
from bake.stock import open_tokenizer
from bake.tensors import StoredTensor, indexed_tensors
from export.carriers.carriers import CARRIERS
from export.carriers.gguf.gguf_check import Checked, check_file
from export.carriers.gguf.gguf_fields import (
    ARCHITECTURES,
    add_model,
    add_vocabulary,
    check_sayable,
)
from export.carriers.gguf.gguf_types import (
    OutType,
    Planned,
    encoded,
    n_bytes,
    outtype_of,
    table_type,
)
from export.carriers.gguf.vocabulary import Vocabulary, vocabulary_of
from export.clamped import check_weights, open_clamped, open_config
from export.folder_contents import check_contents, check_files
from export.manifest import Manifest

_HEADER_BYTES = 64 << 20
"""What a vocabulary takes at most, about."""
_MAGIC = b"GGUF"
TABLE = "token_embd.weight"


@dataclass(frozen=True)
class StockModel:
    """A folder that stock classes load, checked for completeness."""

    folder: Path
    name: str
    family: Family
    config: Any
    """As transformers reads it."""
    tensors: Mapping[str, StoredTensor]
    prefix: str
    """What stands before a layer's number in tensor names."""
    compiled_layers: tuple[int, ...] = ()
    """Layers that hold a clamp."""
    d: int = 0
    """Width of the base; what the embedding holds beyond are constants of a clamp."""


def open_stock(folder: Path, progress: Callable[[float], None] = lambda _share: None) -> StockModel:
    """Open a folder; its code is not run, and what its manifest lists has the listed hashes.

    Args:
        folder: a compiled folder, a trained one, or a stock Gemma without a manifest.
        progress: called with the share of bytes hashed, 0 to 1.

    Raises:
        BakeoutError: it is none of these, is damaged, or of a family that llama.cpp has not.
    """
    if (folder / MANIFEST).is_file():
        manifest = Manifest.read(folder)
        carrier = CARRIERS.get(manifest.carrier)
        if carrier is None or carrier.own_code or carrier.over_base:
            raise ExportError(
                f"{folder}: its clamp is carried as {manifest.carrier}, which llama.cpp does not "
                "know; expected a folder that stock classes load. Compile the checkpoint first "
                "(`bakeout export compiled FOLDER --out DIR`), which says so where it cannot"
            )
        if not carrier.trained:
            clamped = open_clamped(folder, with_graphs=True)
            check_weights(clamped, progress)
            assert manifest.compiled is not None
            return StockModel(
                folder,
                clamped.name,
                clamped.family,
                clamped.config,
                clamped.tensors,
                clamped.layer_prefix,
                tuple(clamped.compiled_layers),
                manifest.compiled.hidden_size[0],
            )
        check_contents(folder, manifest)
        check_files(folder, manifest, list(manifest.files), progress)
    base = open_base(folder, name=folder.resolve().name, revision=None)
    config, _ = open_config(folder, stock=True)
    tensors = indexed_tensors(folder, base.weight_map)
    return StockModel(folder, base.name, base.family, config, tensors, base.layer_prefix)


def export_gguf(
    folder: Path,
    out: Path,
    *,
    outtype: str = "f16",
    force: bool = False,
    progress: Callable[[str, float], None] = lambda _what, _share: None,
) -> Checked:
    """Write a folder's model as a GGUF file, whole or not at all, and check it.

    Args:
        folder: a compiled folder, one trained to forget, or a stock Gemma.
        out: the file.
        outtype: of `OUTTYPES`.
        force: replace a GGUF file that is there.
        progress: told what is being done, and the share of it that is done, 0 to 1.

    Returns:
        What was checked, and how.

    Raises:
        BakeoutError: the folder is none of these, or llama.cpp knows no such model.
        OutputError: the file exists, lies in the folder, or does not fit on the disk.
        CheckError: what was written does not say what the folder says.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ExportError(
            "export gguf: GGUF files are written by `gguf`, which is not installed; "
            "pip install 'bakeout[gguf]'"
        ) from error
    chosen = outtype_of(outtype)
    _check_place(folder, out, force)
    stock = open_stock(folder, lambda share: progress("hash", share))
    if _model_type(stock) not in ARCHITECTURES:
        raise ExportError(
            f"{folder}: model_type is {_model_type(stock)}; expected a text model of "
            f"{', '.join(ARCHITECTURES)}. Use the folder itself, or its text model alone"
        )
    check_sayable(stock.name, stock.config, stock.family)
    progress("tokenizer", 0.0)
    where = {"pretrained_model_name_or_path": str(folder), "local_files_only": True}
    tokenizer = open_tokenizer(where)
    vocabulary = vocabulary_of(tokenizer, stock.config.vocab_size)
    plan = plan_tensors(stock, chosen)
    size = sum(n_bytes(of.tensor.shape, of.kind) for of in plan) + _HEADER_BYTES
    check_space(out, size)
    with _place(out) as new:
        write_file(new, stock, vocabulary, chosen, plan, lambda share: progress("write", share))
        progress("check", 0.0)
        found = check_file(new, stock, tokenizer, plan)
    fsync_folder(out.resolve().parent)
    return found if outtype == "q8_0" else replace(found, quantize=quantizing(stock, out))


def quantizing(stock: StockModel, file: Path) -> str:
    """The command that makes 4 bits of a model's file and leaves alone what a clamp lives by; empty
    where there is none.

    Source: llama.cpp, tools/quantize/README.md.
    """
    if not stock.compiled_layers:
        return ""
    layers = "|".join(map(str, stock.compiled_layers))
    table = table_type(_table(stock), stock.d, "F16").lower()
    kept = ["--tensor-type", rf"blk\.({layers})\.ffn_.*=f32", "--token-embedding-type", table]
    made = file.with_name(f"{file.stem}-q4_k_m.gguf")
    return shlex.join(["llama-quantize", *kept, str(file), str(made), "Q4_K_M"])


def _check_place(folder: Path, out: Path, force: bool) -> None:
    """Raise OutputError before anything is read."""
    there = out.resolve()
    if folder.is_dir() and there.is_relative_to(folder.resolve()):
        raise OutputError(
            f"--out {out}: lies in {folder}, which would then hold what its manifest does not "
            "list; choose a place beside it"
        )
    if not out.exists() and not out.is_symlink():
        return
    if not force:
        raise OutputError(f"--out {out}: exists; choose another name, or pass --force")
    try:
        with open_regular(out) as file:
            magic = file.read(4)
    except (OSError, ValueError) as error:
        raise OutputError(f"--out {out}: cannot be read ({error}); choose another name") from error
    if magic != _MAGIC:
        raise OutputError(
            f"--out {out}: exists and is no GGUF file; --force replaces GGUF files only. Choose "
            "another name"
        )


@contextmanager
def _place(out: Path) -> Iterator[Path]:
    """`whole_file` at a place whose folder may not be there yet."""
    try:
        out.resolve().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"--out {out}: cannot be written ({error.strerror}); choose another place"
        ) from error
    with disk_full(out), whole_file(out.resolve()) as new:
        yield new


# --------------------------------------------------------------------------- tensors


def plan_tensors(stock: StockModel, chosen: OutType) -> list[Planned]:
    """Every tensor of the file, in the order of the model.

    Raises:
        ExportError: llama.cpp has no place for one.
    """
    import gguf

    architecture = ARCHITECTURES[_model_type(stock)]
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, stock.config.num_hidden_layers)
    head = table_type(_table(stock), stock.d, chosen.table) if stock.d else chosen.matrices
    clamps = [f"{stock.prefix}{layer}.mlp." for layer in stock.compiled_layers]
    plan = []
    for name, tensor in stock.tensors.items():
        stem, _, suffix = name.removeprefix("language_model.").rpartition(".")
        found = names.get_name(stem)
        if found is None or suffix != "weight" or (found == "output" and architecture != "gemma3"):
            raise ExportError(
                f"{stock.name}: llama.cpp's {architecture} has no place for {name}; expected a "
                "stock model without biases whose head is its embedding. Use the folder itself, "
                "or its ONNX graph"
            )
        if len(tensor.shape) == 1 or name.startswith(tuple(clamps) or "\n"):
            stored = "F32"
        else:
            stored = head if f"{found}.weight" == TABLE else chosen.matrices
        if stored == "Q8_0" and tensor.shape[-1] % 32:
            stored = "F16"  # as llama.cpp's own tools do
        plus = 1.0 if name.endswith("norm.weight") else 0.0
        plan.append(Planned(f"{found}.weight", tensor, stored, plus))
    return sorted(plan, key=lambda of: [_number(part) for part in of.name.split(".")])


def _table(stock: StockModel) -> StoredTensor:
    return next(t for name, t in stock.tensors.items() if name.endswith("embed_tokens.weight"))


def _model_type(stock: StockModel) -> str:
    return next(name for name, family in FAMILIES.items() if family is stock.family)


def _number(part: str) -> tuple[int, str]:
    return (int(part), "") if part.isdigit() else (-1, part)


def write_file(
    file: Path,
    stock: StockModel,
    vocabulary: Vocabulary,
    chosen: OutType,
    plan: list[Planned],
    progress: Callable[[float], None],
) -> None:
    """Write the file; it is on disk when this ends.

    Raises:
        ExportError: a number does not fit into its type.
    """
    import gguf

    writer = gguf.GGUFWriter(file, ARCHITECTURES[_model_type(stock)])
    writer.add_name(stock.name)
    add_model(writer, stock.config, stock.family)
    writer.add_file_type(gguf.LlamaFileType[chosen.file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_vocabulary(writer, vocabulary)
    for of in plan:
        size = n_bytes(of.tensor.shape, of.kind)
        kind = gguf.GGMLQuantizationType[of.kind]
        writer.add_tensor_info(of.name, of.tensor.shape, np.dtype(np.float32), size, kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None  # since the header is written
        (stream,) = writer.fout
        writer.write_padding(stream, stream.tell())
        total, done = sum(of.tensor.length for of in plan), 0
        for of in plan:
            written = 0
            for values in of.blocks():
                with np.errstate(over="ignore"):
                    data = encoded(values, of.kind)
                if of.kind == "F16" and np.abs(values).max(initial=0.0) > 65504:
                    raise ExportError(
                        f"{of.name}: holds numbers beyond float16's 65504; expected smaller ones. "
                        "Pass --outtype bf16 or f32"
                    )
                written += stream.write(data)
                done += values.size * of.tensor.length // int(np.prod(of.tensor.shape))
                progress(done / total)
            writer.write_padding(stream, written)
        stream.flush()
        os.fsync(stream.fileno())
    finally:
        writer.close()
