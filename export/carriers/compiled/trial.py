"""A base's residual streams on a few tokens, and the compiled layers on them, by stock modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bake.rounding import LOADS, coarsen, load_word, rounded_to_integers
from bake.tensors import DTYPES, to_bits, to_float32
from export.carriers.compiled.alarms import N_ALWAYS
from export.carriers.compiled.layer_scalars import rounded
from export.carriers.compiled.rule import Measured
from export.carriers.compiled.stock_layers import MLP, Array, Logic, Stream, wanted_change
from export.carriers.compiled.widening import Widening
from export.clamp_sites import ClampSite
from export.clamped import Clamped

if TYPE_CHECKING:
    import torch

SEQUENCES, LENGTH = 4, 16
FARTHEST = 3.0
"""Largest norm of a stream that is tried, against the largest that was measured."""
_MARGIN = 0.05
"""How far above and below its threshold a feature is pushed, against |w|·|x|."""


def random_tokens(source: Clamped) -> NDArray[np.int64]:
    """[SEQUENCES, LENGTH] token ids, BOS first; always the same for a vocabulary."""
    vocabulary = int(source.base_config["vocab_size"])
    ids = np.random.default_rng(0).integers(0, vocabulary, (SEQUENCES, LENGTH))
    bos = source.base_config.get("bos_token_id")
    ids[:, 0] = bos if isinstance(bos, int) else 2
    return ids


def measure(source: Clamped, ids: NDArray[np.int64], device: str = "cpu") -> list[Measured]:
    """Residual streams at every site, in float32, earlier sites' clamps applied.

    Args:
        source: whose base runs, one layer in memory at a time.
        ids: [batch, seq].
        device: as torch names it, where the base runs.
    """
    import torch

    from export.streamed import StreamedModel

    tokens = torch.from_numpy(ids)
    run = StreamedModel(source, device).run_to_last_clamp(tokens, torch.ones_like(tokens))
    exempt = np.isin(ids, source.exempt_token_ids)
    measured = []
    for site in source.sites:
        x = run.read[site.layer].double().numpy()
        spared = exempt if site.exempt_bos else np.zeros_like(exempt)
        measured.append(Measured(x[~spared], x[spared]))
    return measured


# --------------------------------------------------------------------------- the layers themselves


@dataclass(frozen=True)
class Distance:
    """How far a site's two layers are from the clamp, on tokens that were tried."""

    error: Array
    """[n] |h'_compiled - h'|."""
    change: Array
    """[n] |Δ|."""
    tried: Array
    """[n, d] the residual streams, as the dtype holds them."""
    exempt_error: float
    """The largest |Δ_compiled| of an exempt token."""


def trial_streams(site: ClampSite, logic: Logic, measured: Measured) -> Array:
    """[n, d]: what was measured, and for every flag a stream that raises and one that lowers it,
    unless that would take one far larger than any that was measured.
    """
    rows = [measured.x]
    for i, flag in enumerate(logic.flags):
        w = site.W_enc[:, flag.feature].astype(np.float64)
        x = measured.x[i % len(measured.x)]
        z = x @ w + site.b_enc[flag.feature] - flag.threshold
        reach = _MARGIN * np.linalg.norm(w) * measured.largest
        pushed = [x + (goal - z) / max(w @ w, 1e-30) * w for goal in (reach, -reach)]
        rows += [row[None] for row in pushed if np.linalg.norm(row) <= FARTHEST * measured.largest]
    return np.concatenate(rows)


def tried_loads(
    source: Clamped,
    site: ClampSite,
    logic: Logic,
    layers: Sequence[MLP],
    plan: Widening,
    stream: Stream,
    measured: Measured,
    device: str,
) -> dict[str, str]:
    """What becomes of the two layers in each way of loading them, by the words of `load_word`.

    Distances are medians, against |x|, over the streams that the clamp changes; nothing where it
    changes none.
    """
    import torch

    s, d = plan.stream.scale, plan.stream.d
    x = trial_streams(site, logic, measured)
    change = wanted_change(site, x)
    moved = np.linalg.norm(change, axis=-1) > 0
    if not moved.any():
        return {}
    x, change = x[moved], change[moved]
    length = np.linalg.norm(x, axis=-1)
    words = {}
    for name, (dtype, bits) in LOADS.items():
        modules = [stock_block(source, mlp, plan) for mlp in layers]
        for module in (part for block in modules for part in block):
            module.to(getattr(torch, dtype))
            if bits is not None:
                coarsen(module, partial(rounded_to_integers, bits=bits))
        wide = _widened(x * s, stream.constants, plan, plan.held(site.layer, dtype))
        with np.errstate(all="ignore"):
            got = _through(modules, wide, dtype, device)[:, :d] / s - x
            to_hook, to_base = (
                float(np.median(np.linalg.norm(each, axis=-1) / length))
                for each in (got - change, got)
            )
            effect = float((got * change).sum() / (change * change).sum())
        words[name] = load_word(to_hook, to_base, effect)
    return words


def measure_distance(
    source: Clamped,
    site: ClampSite,
    logic: Logic,
    layers: Sequence[MLP],
    plan: Widening,
    stream: Stream,
    measured: Measured,
    device: str,
) -> Distance:
    """Run the two layers as stock modules in the plan's dtype, on streams of every kind."""
    dtype, s, d = DTYPES[plan.dtype], plan.stream.scale, plan.stream.d
    modules = [stock_block(source, mlp, plan) for mlp in layers]
    tried = rounded(trial_streams(site, logic, measured) * s, dtype)
    exempt = rounded(measured.exempt * s, dtype)
    held = plan.held(site.layer, plan.dtype)
    channels = ((tried, stream.constants), (exempt, ()))
    wide = [_widened(x, constants, plan, held) for x, constants in channels]
    moved = [_through(modules, x, plan.dtype, device) for x in wide]
    x = tried / s
    change = wanted_change(site, x)
    error = np.linalg.norm(moved[0][:, :d] / s - x - change, axis=-1)
    stray = np.linalg.norm((moved[1][:, :d] - exempt) / s, axis=-1).max(initial=0.0)
    return Distance(error, np.linalg.norm(change, axis=-1), x, float(stray))


def _widened(x: Array, constants: tuple[int, ...], plan: Widening, held: float) -> Array:
    """[n, d] → [n, D]: what constants hold in the given channels, and where every token has it."""
    wide = np.zeros((len(x), plan.stream.width))
    wide[:, : plan.stream.d] = x
    d = plan.stream.d
    wide[:, [*range(d, d + N_ALWAYS), *constants]] = held
    return wide


def _through(modules: Sequence[Any], wide: Array, dtype: str, device: str) -> Array:
    """Two layers, one after the other."""
    import torch

    h = torch.from_numpy(wide).to(device, getattr(torch, dtype))
    with torch.no_grad():
        for before, mlp, after in ((part.to(device) for part in block) for block in modules):
            h = h + after(mlp(before(h)))
    return h.double().cpu().numpy()


def stock_block(source: Clamped, mlp: MLP, plan: Widening) -> tuple[Any, Any, Any]:
    """(norm before, MLP, norm after) of a stock decoder layer with these weights."""
    import torch
    import transformers

    sizes = {
        "hidden_size": plan.stream.width,
        "intermediate_size": len(mlp.gate),
        "rms_norm_eps": plan.eps,
        "num_hidden_layers": 1,
        "layer_types": ["full_attention"],
    }
    stated = {key: of for key, of in source.base_config.items() if key != "per_layer_config"}
    config = transformers.AutoConfig.for_model(**stated | sizes)
    stock = getattr(transformers, source.base_config["architectures"][0])
    with torch.device("meta"):
        model = stock(config).model
    layer = model.layers[0]
    stored = DTYPES[plan.dtype]

    def weight(values: Array) -> torch.Tensor:
        exact = torch.from_numpy(to_float32(to_bits(values, stored), stored))
        return exact.to(getattr(torch, plan.dtype))

    state = {
        "gate_proj.weight": mlp.gate,
        "up_proj.weight": mlp.up,
        "down_proj.weight": mlp.down,
    }
    layer.mlp.load_state_dict({k: weight(v) for k, v in state.items()}, assign=True)
    after: torch.nn.Module = torch.nn.Identity()
    before = layer.post_attention_layernorm
    if mlp.gain is not None:
        before, after = layer.pre_feedforward_layernorm, layer.post_feedforward_layernorm
    before.load_state_dict({"weight": weight(mlp.before - plan.norm_adds)}, assign=True)
    if mlp.gain is not None:
        after.load_state_dict({"weight": weight(mlp.gain - plan.norm_adds)}, assign=True)
    return before, layer.mlp, after
