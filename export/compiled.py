"""The clamp as two ordinary decoder layers: a stock Gemma folder, no custom code, no training.

From a clamped checkpoint. The residual stream grows by a few channels (`export.widening`), and
behind every clamped layer stand two more decoder layers whose attention writes nothing and whose
MLPs compute the clamp (`export.stock_layers`), with numbers chosen from what was measured on the
model (`export.compiled_rule`, `export.measuring`). In short, for x̃ = [s·x, κ, …] and r̃ = rms(x̃):

    flags   N_i = gelu(C·(1 - z_i/ζ_i)/r̃)            z_i = x·w_i + b_i - max(theta_i, trigger_i, 0)
            φ_i = R - N_i,  ρ = R = gelu(C/r̃)        over the norm's own size: φ_i = ρ on, ≤ 0 off
    action  m   = gelu(K·φ_i/r̃)·(v_j + (s_j - 1)·pre_j)/r̃ · W_dec_j  and  gelu(K·ρ/r̃)·M/r̃ aside
            m / rms(m) · gain = Δ                    everything but Δ's own factors cancels

Gemma, the first, has no norm after its MLP; there flags are written r̃² large (`unnormed_layers`),
and any-of several triggers is refused. The base's matrices are copied with zeros beside them; only the norms before a block change, by
sqrt(d/D). Everything is streamed: no more than a few megabytes of the base are held, and of the new
layers one matrix.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import export.unnormed_layers as unnormed
from bake.base import INDEX
from bake.errors import ExportError
from export.checkpoint import companions
from export.clamped_source import ClampedSource, ClampSite, StoredTensor, open_clamped
from export.compiled_rule import Measured, Setting, choose_setting, error_bound, summary
from export.copying import copy_hashed, hash_new
from export.manifest import derived_manifest, json_text, write_manifest
from export.measuring import Distance, measure, measure_distance, random_tokens
from export.new_folder import MANIFEST, check_output, new_folder
from export.stock_layers import MLP, Logic, action_layer, flag_layer, logic_of
from export.widening import (
    BLOCK_BYTES,
    DTYPES,
    Blocks,
    Widening,
    plan_widening,
    to_bits,
    widened,
    widened_blocks,
)

LAYERS_SHARD = "model-compiled-layers.safetensors"
ACTIVATION = "gelu_pytorch_tanh"
PER_SITE = 2
"""Decoder layers that a clamp becomes."""


@dataclass(frozen=True)
class CompiledSite:
    """One clamp, compiled."""

    site: ClampSite
    logic: Logic
    setting: Setting
    layers: tuple[MLP, MLP]
    measured: Measured
    distance: Distance
    """Of the two layers from the clamp, tried as stock modules in the plan's dtype."""
    bound: float
    """Largest share of its computed bound that any tried token's error takes, at most 1."""


@dataclass(frozen=True)
class CompiledPlan:
    """A compiled folder that could be written."""

    source: ClampedSource
    widening: Widening
    sites: tuple[CompiledSite, ...]

    @property
    def config(self) -> dict[str, Any]:
        """config.json of the compiled folder."""
        return compiled_config(self.source, self.widening)

    @property
    def size(self) -> int:
        """Bytes that the folder will take, within a few kilobytes."""
        files = [*_tensor_files(self).values()]
        stay = sum(path.stat().st_size for path, _ in companions(self.source.folder))
        return stay + sum(_bytes(shape, dtype) for f in files for dtype, shape, _ in f.values())


def plan_compiled(
    folder: Path, *, pad: int | None = None, dtype: str | None = None
) -> CompiledPlan:
    """Read a clamped checkpoint, measure it, choose the layers' numbers, and try them.

    Args:
        folder: a clamped checkpoint.
        pad: channels to add; None takes the least that fits.
        dtype: of the compiled weights, float32 or bfloat16; None takes the checkpoint's.

    Raises:
        BakeoutError: the folder is none, or its clamp cannot be compiled; the line says why.
    """
    source = open_clamped(folder)
    _check_family(source)
    dtype = dtype or _stored_dtype(source)
    if dtype not in DTYPES:
        raise ExportError(f"--dtype {dtype}: expected float32 or bfloat16")
    logics = [logic_of(site) for site in source.sites]
    needed = max(_neurons(logic, source.model_type) for logic in logics)
    widening = plan_widening(source, logics, n_neurons=needed, dtype=dtype, pad=pad)
    measured = measure(source, random_tokens(source))
    parts = zip(source.sites, logics, widening.streams, widening.places, measured, strict=True)
    sites = []
    for site, logic, stream, place, seen in parts:
        stream = replace(stream, mean=seen.x.mean(axis=0))
        normed = widening.post_norm
        setting = choose_setting(site, logic, stream, seen, dtype, post_norm=normed)
        arguments = (site, logic, stream, place, setting)
        if normed:
            layers = (flag_layer(*arguments), action_layer(*arguments))
        else:
            reach = (seen.rms[0] / unnormed.REACH, seen.rms[1] * unnormed.REACH)
            layers = (unnormed.flag_layer(*arguments, reach), unnormed.action_layer(*arguments))
        distance = measure_distance(source, site, logic, layers, widening, stream, seen)
        bound = error_bound(site, logic, setting, stream, distance.tried, dtype)
        share = float((distance.error / bound).max())
        if not share <= 1 or distance.exempt_error > 0:
            raise ExportError(
                f"layer {site.layer}: two stock layers miss the clamp by {share:.3g} times their "
                f"bound on tokens that were tried (exempt ones by {distance.exempt_error:.1e}); "
                "nothing was written. Pass --dtype float32"
            )
        sites.append(CompiledSite(site, logic, setting, layers, seen, distance, share))
    return CompiledPlan(source, widening, tuple(sites))


def write_compiled(
    plan: CompiledPlan,
    out: Path,
    *,
    card: str,
    force: bool = False,
    advance: Callable[[int], None] = lambda _: None,
) -> Path:
    """Write a compiled folder, whole or not at all.

    Args:
        plan: what to write.
        out: the folder; it may exist only with `force`.
        card: text of the folder's README.md.
        force: replace a folder that bakeout wrote.
        advance: called with the bytes written, as they are.

    Raises:
        OutputError: `out` exists, overlaps the input, or does not fit on the disk.
    """
    source = plan.source
    check_output(out, inputs=[source.folder], size=plan.size, force=force)
    with new_folder(out) as folder:
        files = _tensor_files(plan)
        with ThreadPoolExecutor(2) as pool:
            jobs = {
                name: pool.submit(write_tensors, folder / name, tensors, advance)
                for name, tensors in files.items()
            }
            hashes = {name: job.result() for name, job in jobs.items()}
        for path, name in companions(source.folder):
            (folder / name).parent.mkdir(exist_ok=True)
            hashes[name] = copy_hashed(path, folder / name, advance)
        recipe = (source.folder / "recipe.toml").read_text(encoding="utf-8")
        texts = {
            INDEX: json_text(_index(files)),
            "config.json": json_text(plan.config),
            "recipe.toml": recipe,
            "README.md": card,
        }
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
            hashes[name] = hash_new(folder / name)
        write_manifest(
            folder,
            derived_manifest(source.manifest, hashes, carrier="compiled", compiled=describe(plan)),
        )
        hash_new(folder / MANIFEST)
    return out


def describe(plan: CompiledPlan) -> dict[str, Any]:
    """What the manifest says about a compilation: where, with which numbers, how far off."""
    wide = plan.widening
    return {
        "dtype": wide.dtype,
        "hidden_size": [wide.stream.d, wide.stream.width],
        "layers_added": PER_SITE * len(plan.sites),
        "kappa": wide.stream.kappa,
        "sites": [
            {
                "layers": [first, first + 1],
                "flags": len(compiled.logic.flags),
                "neurons": [len(mlp.gate) for mlp in compiled.layers],
                "parameters": summary(compiled.setting, compiled.measured),
                "distance": {
                    "what": "|h' - hook's h'| / |h'| on random tokens, every feature pushed "
                    "above and below its threshold",
                    "tokens": len(compiled.distance.error),
                    "median": float(np.median(_relative(compiled.distance))),
                    "largest": float(_relative(compiled.distance).max()),
                    "largest_share_of_bound": compiled.bound,
                },
            }
            for compiled, first in zip(plan.sites, added_layers(plan.source), strict=True)
        ],
    }


def added_layers(source: ClampedSource) -> list[int]:
    """The first of the two layers of every site, by its number in the compiled folder."""
    return [site.layer + 1 + PER_SITE * i for i, site in enumerate(source.sites)]


def compiled_config(source: ClampedSource, plan: Widening) -> dict[str, Any]:
    """The base's config.json, wider and deeper, with every size spelled out."""
    config = dict(source.config)
    n = int(config["num_hidden_layers"])
    types = _layer_types(config, n)
    for site in reversed(source.sites) if types else ():
        # Gemma 2 goes on alternating, also for runtimes that count layers instead of reading this.
        after = site.layer + 1
        types[after:after] = (
            [types[site.layer - 1] if site.layer else _other(types[0]), types[site.layer]]
            if source.model_type == "gemma2"
            else ["sliding_attention"] * PER_SITE
        )
    heads = int(config["num_attention_heads"])
    any_q = next(name for name in source.tensors if name.endswith("q_proj.weight"))
    config.pop("sliding_window_pattern", None)
    config.pop("torch_dtype", None)
    return config | {
        "hidden_size": plan.stream.width,
        "intermediate_size": plan.mlp,
        "num_hidden_layers": n + PER_SITE * len(source.sites),
        **({"layer_types": types} if types else {}),
        "head_dim": source.tensors[any_q].shape[0] // heads,
        "rms_norm_eps": plan.eps,
        "dtype": plan.dtype,
    }


def _layer_types(config: dict[str, Any], n: int) -> list[str]:
    if config["model_type"] == "gemma":
        return []
    if config.get("layer_types"):
        return list(config["layer_types"])
    every = 2 if config["model_type"] == "gemma2" else int(config.get("sliding_window_pattern", 6))
    return ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(n)]


def _other(kind: str) -> str:
    return "sliding_attention" if kind == "full_attention" else "full_attention"


# --------------------------------------------------------------------------- checks


def _check_family(source: ClampedSource) -> None:
    name, model_type = source.name, source.model_type
    if model_type == "gemma3":
        raise ExportError(
            f"{name}: is a Gemma 3 that takes images; only text models are compiled. Use the "
            "clamped checkpoint, or its text model alone"
        )
    field = "hidden_act" if model_type == "gemma" else "hidden_activation"
    activation = source.config.get(field) or ACTIVATION
    if activation != ACTIVATION:
        raise ExportError(
            f"{name}: its activation is {activation}; expected {ACTIVATION}, which the two layers "
            "are built from"
        )


def _stored_dtype(source: ClampedSource) -> str:
    """What the checkpoint is loaded in."""
    stated = source.config.get("dtype") or source.config.get("torch_dtype")
    if stated is not None:
        return str(stated)
    name = next(name for name in source.tensors if name.endswith("embed_tokens.weight"))
    return {value: key for key, value in DTYPES.items()}[source.tensors[name].dtype]


def _neurons(logic: Logic, model_type: str) -> int:
    """What the larger of a site's two layers needs, at most."""
    references = unnormed.MOST_NODES if model_type == "gemma" else 1
    return max(references + len(logic.flags), len(logic.terms) + 1 + len(logic.counted))


def _relative(distance: Distance) -> np.ndarray[Any, Any]:
    return distance.error / np.maximum(np.linalg.norm(distance.tried, axis=-1), distance.change)


# --------------------------------------------------------------------------- files

Tensors = dict[str, tuple[str, tuple[int, ...], Blocks]]
"""Of a file: dtype, shape and bytes by name."""


def _tensor_files(plan: CompiledPlan) -> dict[str, Tensors]:
    """Every weight file of the compiled folder: the base's, widened, and the new layers'."""
    source, wide = plan.source, plan.widening
    files: dict[str, Tensors] = {name: {} for name in source.base_files}
    stored = DTYPES[wide.dtype]
    layers = [site.layer for site in source.sites]
    for name, tensor in source.tensors.items():
        files[tensor.file][_renumbered(name, layers)] = (
            stored,
            widened(name, tensor.shape, wide).shape,
            lambda name=name, tensor=tensor: widened_blocks(source.folder, name, tensor, wide),
        )
    added: Tensors = {}
    for site, first in zip(plan.sites, added_layers(source), strict=True):
        mark = f"layers.{site.site.layer}."
        for name, tensor in source.tensors.items():
            if mark not in name:
                continue
            for number, mlp in enumerate(site.layers, first):
                new = name.replace(mark, f"layers.{number}.")
                added[new] = _new_tensor(name, tensor, mlp, wide)
    return files | {LAYERS_SHARD: added}


def _renumbered(name: str, layers: list[int]) -> str:
    """A base tensor's name, its layer moved behind the layers added before it."""
    before, mark, after = name.partition("layers.")
    if not mark:
        return name
    number, _, rest = after.partition(".")
    moved = int(number) + PER_SITE * sum(layer < int(number) for layer in layers)
    return f"{before}layers.{moved}.{rest}"


def _new_tensor(
    name: str, tensor: StoredTensor, mlp: MLP, plan: Widening
) -> tuple[str, tuple[int, ...], Blocks]:
    """A tensor of a new layer, zeros wherever the layer does nothing, shaped like the base's."""
    shape, stored = widened(name, tensor.shape, plan).shape, DTYPES[plan.dtype]
    kind = name.rpartition("layers.")[2].partition(".")[2]
    n = len(mlp.gate)

    def blocks() -> Iterator[bytes]:
        values = np.zeros(shape, np.float32)
        match kind:
            case "mlp.gate_proj.weight":
                values[:n] = mlp.gate
            case "mlp.up_proj.weight":
                values[:n] = mlp.up
            case "mlp.down_proj.weight":
                values[:, :n] = mlp.down
            case "post_feedforward_layernorm.weight":
                assert mlp.gain is not None
                values[:] = mlp.gain - 1
        data = memoryview(to_bits(values, stored)).cast("B")
        for start in range(0, len(data), BLOCK_BYTES):
            yield bytes(data[start : start + BLOCK_BYTES])

    return stored, shape, blocks


def write_tensors(path: Path, tensors: Tensors, advance: Callable[[int], None]) -> str:
    """Write a safetensors file block by block; returns its sha256. It is on disk when this ends."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape, _) in tensors.items():
        end = offset + _bytes(shape, dtype)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("xb") as file, ThreadPoolExecutor(1) as hasher:
        hashed = hasher.submit(digest.update, (head := len(text).to_bytes(8, "little") + text))
        file.write(head)
        for name, (_, _, blocks) in tensors.items():
            start = file.tell()
            for block in blocks():
                hashed.result()
                hashed = hasher.submit(digest.update, block)
                file.write(block)
                advance(len(block))
            low, high = header[name]["data_offsets"]
            assert file.tell() - start == high - low, name
        hashed.result()
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _bytes(shape: tuple[int, ...], dtype: str) -> int:
    return int(np.prod(shape)) * (4 if dtype == "F32" else 2)


def _index(files: dict[str, Tensors]) -> dict[str, Any]:
    total = sum(_bytes(shape, dtype) for f in files.values() for dtype, shape, _ in f.values())
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}

