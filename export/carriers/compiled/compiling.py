"""The clamp as two ordinary decoder layers: a stock Gemma folder, no custom code, no training.

From a clamped checkpoint. The residual stream grows by a few channels (`widening.py`), and
behind every clamped layer stand two more decoder layers whose attention writes nothing and whose
MLPs compute the clamp (`stock_layers.py`), with numbers chosen from what was measured on the
model (`rule.py`, `trial.py`). In short, for x̃ = [s·x, κ, …] and r̃ = rms(x̃):

    flags   N_i = gelu(C·(1 - z_i/ζ_i)/r̃)            z_i = x·w_i + b_i - max(theta_i, trigger_i, 0)
            φ_i = R - N_i,  ρ = R = gelu(C/r̃)        over the norm's own size: φ_i = ρ on, ≤ 0 off
    action  m   = gelu(K·φ_i/r̃)·(v_j + (s_j - 1)·pre_j)/r̃ · W_dec_j  and  gelu(K·ρ/r̃)·M/r̃ aside
            m / rms(m) · gain = Δ                    everything but Δ's own factors cancels

Gemma, the first, has no norm after its MLP; there flags are written r̃² large (`unnormed_layers`),
and any-of several triggers is refused. The base's matrices are copied with zeros beside them; only
the norms before a block change, by sqrt(d/D). Of Gemma 4, whose layers multiply the constants as
well, see `layer_scalars.py`. Everything is streamed: no more than a few megabytes
of the base are held, one layer of it while it is measured, and of the new layers one matrix.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

import export.carriers.compiled.unnormed_layers as unnormed
from bake.base import INDEX
from bake.errors import ExportError
from bake.families import Family
from bake.new_folder import check_output, new_folder
from bake.reading.model_config import without_paths
from bake.rounding import BASE_LIKE, LOADS, WORDS
from bake.tensors import DTYPES, Tensors, index_of, n_bytes, write_tensors
from export.carriers.carriers import OF_BASE
from export.carriers.compiled.alarms import ALARMS, with_alarms
from export.carriers.compiled.compiled_files import NewLayer, tensor_files
from export.carriers.compiled.layer_scalars import check_gemma_4
from export.carriers.compiled.placing import Layout, heads_by_layer, layout_of
from export.carriers.compiled.rule import Measured, choose_setting, error_bound, summary
from export.carriers.compiled.stock_layers import (
    MLP,
    Array,
    Logic,
    Setting,
    action_layer,
    flag_layer,
    logic_of,
)
from export.carriers.compiled.trial import (
    Distance,
    measure,
    measure_distance,
    random_tokens,
    tried_loads,
)
from export.carriers.compiled.widening import Widening, plan_widening
from export.clamp_sites import ClampSite
from export.clamped import Clamped, check_weights, open_clamped
from export.copying import hash_new
from export.folder_contents import copy_listed
from export.manifest import CompiledDistance, CompiledEntry, LayersEntry, json_text
from export.witness_file import WITNESSES

ACTIVATION = "gelu_pytorch_tanh"
ACTIVATION_FIELDS = ("hidden_activation", "hidden_act")


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
    loads: dict[str, str]
    """What becomes of it in each of `LOADS`."""


@dataclass(frozen=True)
class CompiledPlan:
    """A compiled folder that could be written."""

    source: Clamped
    widening: Widening
    sites: tuple[CompiledSite, ...]

    @property
    def layers(self) -> list[NewLayer]:
        """The layers that are added."""
        clamps = [
            NewLayer(number, self.layout.like(number), mlp)
            for compiled, numbers in zip(self.sites, self.layout.sites, strict=True)
            for number, mlp in zip(numbers, compiled.layers, strict=True)
        ]
        like = self.layout.like
        return clamps + [NewLayer(number, like(number), None) for number in self.layout.idle]

    @cached_property
    def layout(self) -> Layout:
        """Where layers stand."""
        return layout_of(self.source)

    @property
    def files(self) -> dict[str, Tensors]:
        """Every weight file."""
        return tensor_files(self.source, self.widening, self.layers, self.layout.base)

    @property
    def config(self) -> dict[str, Any]:
        """config.json of the compiled folder."""
        return compiled_config(self.source, self.widening, self.layout)

    @property
    def kept(self) -> list[str]:
        """Files that are the checkpoint's own."""
        kept = rf"{OF_BASE}|{re.escape(WITNESSES)}|recipe\.toml"
        return [name for name in self.source.manifest.files if re.fullmatch(kept, name)]

    @property
    def size(self) -> int:
        """Bytes that the folder will take, within a few kilobytes."""
        files = [*self.files.values()]
        stay = sum((self.source.folder / name).stat().st_size for name in self.kept)
        return stay + sum(n_bytes(shape, dtype) for f in files for dtype, shape, _ in f.values())


def plan_compiled(
    folder: Path, *, pad: int | None = None, dtype: str | None = None, device: str = "cpu"
) -> CompiledPlan:
    """Read a clamped checkpoint, measure it, choose the layers' numbers, and try them.

    Args:
        folder: a clamped checkpoint.
        pad: channels to add; None takes the least that fits.
        dtype: of the compiled weights, float32 or bfloat16; None takes the checkpoint's.
        device: as torch names it, where the model and the added layers run.

    Raises:
        BakeoutError: the folder is none, or its clamp cannot be compiled; the line says why.
    """
    source = open_clamped(folder)
    check_weights(source)
    _check_family(source)
    dtype = dtype or _stored_dtype(source)
    if dtype not in DTYPES:
        raise ExportError(f"--dtype {dtype}: expected float32 or bfloat16")
    logics = [logic_of(site) for site in source.sites]
    needed = max(_neurons(logic, source.family) for logic in logics)
    widening = plan_widening(source, logics, n_neurons=needed, dtype=dtype, pad=pad)
    measured = measure(source, random_tokens(source), device)
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
        layers = (layers[0], with_alarms(layers[1], site, logic, stream, setting))
        distance = measure_distance(source, site, logic, layers, widening, stream, seen, device)
        bound = error_bound(site, logic, setting, stream, distance.tried, dtype)
        share = float((distance.error / bound).max())
        if not share <= 1 or distance.exempt_error > 0:
            raise ExportError(
                f"layer {site.layer}: two stock layers miss the clamp by {share:.3g} times their "
                f"bound on tokens that were tried (exempt ones by {distance.exempt_error:.1e}); "
                "nothing was written. Pass --dtype float32"
            )
        loads = tried_loads(source, site, logic, layers, widening, stream, seen, device)
        if lost := [name for name, word in loads.items() if word == BASE_LIKE]:
            raise ExportError(
                f"layer {site.layer}: loaded as {', '.join(lost)} its two stock layers do nothing, "
                "and nobody would notice; expected them to clamp or to break, so nothing was "
                "written. Use the checkpoint or the adapter"
            )
        sites.append(CompiledSite(site, logic, setting, layers, seen, distance, share, loads))
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
    with new_folder(out, force=force) as folder:
        files = plan.files
        with ThreadPoolExecutor(2) as pool:
            jobs = {
                name: pool.submit(write_tensors, folder / name, tensors, advance)
                for name, tensors in files.items()
            }
            hashes = {name: job.result() for name, job in jobs.items()}
        for name in plan.kept:
            target = folder / name
            hashes[name] = copy_listed(source.folder, source.manifest, name, target, advance)
        texts = {
            INDEX: json_text(index_of(files)),
            "config.json": json_text(plan.config),
            "README.md": card,
        }
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
            hashes[name] = hash_new(folder / name)
        manifest = source.manifest.derived(hashes, carrier="compiled", compiled=describe(plan))
        manifest.write(folder)
    return out


def describe(plan: CompiledPlan) -> CompiledEntry:
    """What the manifest says about a compilation: where, with which numbers, how far off."""
    wide = plan.widening
    return CompiledEntry(
        dtype=wide.dtype,
        hidden_size=(wide.stream.d, wide.stream.width),
        layers_added=plan.layout.added,
        **({"idle": list(plan.layout.idle)} if plan.layout.idle else {}),
        kappa=wide.stream.kappa,
        loads={
            name: max((of.loads[name] for of in plan.sites if of.loads), key=WORDS.index)
            for name in LOADS
            if any(of.loads for of in plan.sites)
        },
        sites=[
            LayersEntry(
                layers=list(numbers),
                flags=len(compiled.logic.flags),
                neurons=[len(mlp.gate) for mlp in compiled.layers],
                parameters=summary(compiled.setting, compiled.measured),
                distance=CompiledDistance(
                    what="|h' - hook's h'| / |h'| on random tokens, every feature pushed "
                    "above and below its threshold",
                    tokens=len(compiled.distance.error),
                    median=float(np.median(_relative(compiled.distance))),
                    largest=float(_relative(compiled.distance).max()),
                    largest_share_of_bound=float(compiled.bound),
                ),
            )
            for compiled, numbers in zip(plan.sites, plan.layout.sites, strict=True)
        ],
    )


def compiled_config(source: Clamped, plan: Widening, layout: Layout) -> dict[str, Any]:
    """The base's config.json, wider and deeper, with every size spelled out."""
    config = without_paths(source.base_config)
    if layout.period is None:
        config.pop("sliding_window_pattern", None)
    config.pop("torch_dtype", None)
    return config | {
        "hidden_size": plan.stream.width,
        "intermediate_size": plan.mlp,
        "num_hidden_layers": layout.n_layers,
        **({"layer_types": list(layout.types)} if layout.types else {}),
        **heads_by_layer(config, layout),
        **dict.fromkeys(ACTIVATION_FIELDS, ACTIVATION),  # as runtimes ask for it that check both
        **({} if plan.query_scalar is None else {"query_pre_attn_scalar": plan.query_scalar}),
        "rms_norm_eps": plan.eps,
        "dtype": plan.dtype,
    }


# --------------------------------------------------------------------------- checks


def _check_family(source: Clamped) -> None:
    name, family = source.name, source.family
    if any(site.tau is not None for site in source.sites):
        raise ExportError(
            f'{name}: method "dynamic" asks what came before a token, which stock layers do not '
            "keep; expected another method. Use the checkpoint, model.onnx or the adapter"
        )
    if any(site.topk is not None for site in source.sites):
        raise ExportError(
            f"{name}: has the clamp of a TopK SAE, where the rank among all features decides; "
            "expected features that are active by themselves, which two layers can tell. Use the "
            "checkpoint, model.onnx or the adapter"
        )
    if family.images:
        raise ExportError(
            f"{name}: takes images; only text models are compiled. Use the clamped checkpoint, or "
            "its text model alone"
        )
    if family.scaled:
        check_gemma_4(source)
    activation = source.base_config[family.activation_field]
    if activation != ACTIVATION:
        raise ExportError(
            f"{name}: its activation is {activation}; expected {ACTIVATION}, which the two layers "
            "are built from"
        )


def _stored_dtype(source: Clamped) -> str:
    """What the checkpoint is loaded in."""
    stated = source.base_config.get("dtype") or source.base_config.get("torch_dtype")
    if stated is not None:
        return str(stated)
    name = next(name for name in source.base_tensors if name.endswith("embed_tokens.weight"))
    return {value: key for key, value in DTYPES.items()}[source.base_tensors[name].dtype]


def _neurons(logic: Logic, family: Family) -> int:
    """What the larger of a site's two layers needs, at most."""
    references = 1 if family.norms_after else unnormed.MOST_NODES
    flags = 1 + len(logic.flags)  # each taken off again, for every divisor
    divisors = (1 + len(logic.counted)) * (1 + flags) if family.norms_after else 0
    return max(references + len(logic.flags), len(logic.terms) + divisors + ALARMS)


def _relative(distance: Distance) -> Array:
    relative: Array = distance.error / np.maximum(
        np.linalg.norm(distance.tried, axis=-1), distance.change
    )
    return relative
