"""A base model on a wider residual stream that computes exactly what it computed before.

The stream grows from d to D = d + p channels, x̃ = [s·x, κ, κ, …], with c = sqrt(D/d):

    norms before a block    x̃ / rms(x̃) = c · x / rms(x): 1 + w is divided by c; 0 on padding
    norms after a block     see [m, 0]: m / rms([m, 0]) = c · m / rms(m); with s = c this is s times
                            what it was: 1 + w stays
    embeddings              are multiplied by sqrt(D) = c·sqrt(d): with s = c they stay
    final norm              as the norms before a block; the head gets 0 on padding
    eps                     rms_norm_eps · d/D is exact for the norms after a block; those before
                            lack eps·p/D in the mean square, and Σκ² = p·eps supplies it
    all matrices            stay, with zeros beside them

    attention scores        are divided by sqrt(query_pre_attn_scalar), which llama.cpp does not
                            read but guesses from layer count, width and heads: the guess stands in
                            the config, and queries are multiplied by what that lacks

Gemma (1) has no norms after its blocks: there s = 1, the embedding is divided by c, and the final
norm keeps 1 + w where the head is tied (its matrix is the embedding's).

Gemma 4 multiplies by w, not 1 + w, its heads' norms have the same eps, and constants shrink from
layer to layer (`layer_scalars.py`). So there eps stays, and what a block writes is multiplied by c
before its norm: c·m/rms([c·m, 0]) has eps right. Norms before a block have it right by themselves
where constants are too small to count.

Source: derived here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from bake.errors import ExportError
from bake.tensors import BITS, DTYPES, Raw, StoredTensor, to_bits, to_float32
from export.carriers.compiled.alarms import N_ALWAYS
from export.carriers.compiled.layer_scalars import (
    held_behind,
    layer_scalars,
    made_louder,
    rounded,
    scaled_entry,
)
from export.carriers.compiled.placing import layout_of
from export.carriers.compiled.stock_layers import Logic, Place, Stream
from export.clamped import Clamped

N_CONSTANTS = 2
"""Constant channels: what one rounds off, the next holds."""
ROOT_TOLERANCE = 2.0**-16
"""Relative error of sqrt(D) that is let be, where it is rounded to two decimals."""
CAST_TOLERANCE = 2.0**-11
"""The same, where it is rounded to bfloat16, by whoever loads the folder so."""
BLOCK_BYTES = 8 << 20


# --------------------------------------------------------------------------- the wider shape


@dataclass(frozen=True)
class Widening:
    """How a base is widened, and where everything lies."""

    streams: tuple[Stream, ...]
    """As every site sees it; they differ in which constant channels they read."""
    places: tuple[Place, ...]
    """Of every site's flags."""
    entry: float
    """What the embedding holds in a constant channel; times sqrt(D) it is κ."""
    exempting: tuple[int, ...]
    """The constant channels in which exempt tokens have 0."""
    always: tuple[int, ...]
    """Those in which every token has κ."""
    exempt_token_ids: tuple[int, ...]
    mlp: int
    """Width of every MLP: the base's, or more where the two layers need more neurons."""
    eps: float
    """rms_norm_eps."""
    dtype: str
    """float32 or bfloat16."""
    post_norm: bool
    """Whether the family norms what a block writes."""
    tied: bool
    """Whether the head is the embedding."""
    query_scalar: int | None
    """query_pre_attn_scalar of the result; None where the family has none."""
    query_gain: float
    """What queries are multiplied by, since they are divided by another root than in the base."""
    head_norms: bool
    """Whether queries have a norm of their own, after which the gain has to come."""
    block_gain: float
    """What is multiplied that a block writes, before its norm."""
    norm_adds: float
    """What a norm multiplies by, less its weight: 1; of Gemma 4 nothing."""
    scalars: tuple[float, ...]
    """What each of the base's layers multiplies its output by; none where the family has none."""

    @property
    def stream(self) -> Stream:
        """Any site's, for what they share."""
        return self.streams[0]

    @property
    def c(self) -> float:
        """sqrt(D/d)."""
        return math.sqrt(self.stream.width / self.stream.d)

    def held(self, layer: int, dtype: str) -> float:
        """What a constant channel holds behind one of the base's layers, loaded in a dtype."""
        return held_behind(self.entry, self.stream.width, self.scalars[: layer + 1], dtype)


def plan_widening(
    source: Clamped,
    logics: Sequence[Logic],
    *,
    n_neurons: int,
    dtype: str,
    pad: int | None,
) -> Widening:
    """Choose the width and lay out the channels.

    Args:
        source: what is widened.
        logics: of its sites; every flag gets a channel.
        n_neurons: what the largest of the new layers needs.
        dtype: of the result.
        pad: p; None takes the least that fits.

    Raises:
        ExportError: `pad` does not hold the flags, or gives a width that no head count divides.
    """
    config = source.base_config
    d, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    kinds = sorted({site.exempt_bos for site in source.sites})
    taken = N_ALWAYS + N_CONSTANTS * len(kinds) + sum(1 + len(logic.flags) for logic in logics)
    width = choose_width(d, taken, math.lcm(8, heads), heads, pad)
    first, places, constants = d + N_ALWAYS, [], {}
    for kind in kinds:
        constants[kind] = tuple(range(first, first + N_CONSTANTS))
        first += N_CONSTANTS
    for logic in logics:
        places.append(Place(first, tuple(range(first + 1, first + 1 + len(logic.flags)))))
        first += 1 + len(logic.flags)
    eps = float(config.get("rms_norm_eps", 1e-6))
    post_norm = source.family.norms_after
    energy = (width - d) * eps / (N_ALWAYS + N_CONSTANTS)
    entry = 2.0 ** round(math.log2(math.sqrt(energy / width)))
    stored = DTYPES[dtype]
    scalars: tuple[float, ...] = ()
    if scaled := source.family.scaled:
        scalars = tuple(float(rounded(np.asarray(of), stored)) for of in layer_scalars(source))
        entry = scaled_entry(eps, scalars, N_ALWAYS + N_CONSTANTS * len(kinds))
    held = [held_behind(entry, width, scalars[: of.layer + 1], dtype) for of in source.sites]
    streams = [
        Stream(
            d=d,
            width=width,
            scale=math.sqrt(width / d) if post_norm else 1.0,
            kappa=kappa * (louder := made_louder(kappa, site.layer) if scaled else 1.0),
            louder=louder,
            constants=constants[site.exempt_bos],
            round=lambda values: rounded(values, stored),
            mean=np.zeros(d),
        )
        for site, kappa in zip(source.sites, held, strict=True)
    ]
    mlp = int(config["intermediate_size"])
    scalar = None
    if (largest := source.family.layers_27b) is not None:
        n_layers = layout_of(source).n_layers
        # Source: llama.cpp, src/models/gemma2.cpp and gemma3.cpp, f_attention_scale.
        scalar = width // heads if n_layers == largest else int(config["head_dim"])
    return Widening(
        streams=tuple(streams),
        places=tuple(places),
        entry=entry,
        exempting=constants.get(True, ()),
        always=(*range(d, d + N_ALWAYS), *constants.get(False, ())),
        exempt_token_ids=source.exempt_token_ids,
        mlp=mlp if n_neurons <= mlp else -(-n_neurons // 8) * 8,
        eps=eps if scaled else eps * d / width,
        dtype=dtype,
        post_norm=post_norm,
        tied="lm_head.weight" not in source.base_tensors,
        query_scalar=scalar,
        query_gain=1.0 if scalar is None else math.sqrt(scalar / config["query_pre_attn_scalar"]),
        head_norms=source.family.head_norms,
        block_gain=math.sqrt(width / d) if scaled else 1.0,
        norm_adds=0.0 if scaled else 1.0,
        scalars=scalars,
    )


def choose_width(d: int, taken: int, multiple: int, heads: int, pad: int | None) -> int:
    """D: the least multiple that holds `taken` channels beside d, and whose root is short.

    Embeddings are multiplied by sqrt(D), which transformers rounds to the dtype that it loads and
    some builders to two decimals: of the widths up to 2 % larger, or the next eight, the first is
    taken that neither harms, or else the best.
    """
    least = -(-(d + taken) // multiple) * multiple
    if pad is not None:
        if pad < taken:
            raise ExportError(
                f"--pad {pad}: holds {pad} channels, the clamp's flags need {taken}; "
                f"pass --pad {least - d} or none"
            )
        if (d + pad) % heads:
            raise ExportError(
                f"--pad {pad}: gives a hidden size of {d + pad}, which {heads} attention heads do "
                f"not divide; pass --pad {-(-(d + pad) // multiple) * multiple - d}"
            )
        return d + pad
    last = max(least + 7 * multiple, least + d // 50)
    widths = range(least, last + 1, multiple)

    def harm(width: int) -> float:  # 1 and less is none
        root = math.sqrt(width)
        cast = float(rounded(np.asarray(root), "BF16"))
        decimals = abs(round(root, 2) / root - 1) / ROOT_TOLERANCE
        return max(decimals, abs(cast / root - 1) / CAST_TOLERANCE)

    return next((width for width in widths if harm(width) <= 1), min(widths, key=harm))


# --------------------------------------------------------------------------- tensor by tensor


@dataclass(frozen=True)
class Widened:
    """What becomes of one tensor: float32 rows in, float32 rows out."""

    shape: tuple[int, ...]
    factor: float = 1.0
    """Every stored number is multiplied by this."""
    gain_factor: float = 1.0
    """Norm weights: what the norm multiplies by is multiplied by this."""
    fill: float = 0.0
    """What stands in the padding."""
    embedding: bool = False


def widened(name: str, shape: tuple[int, ...], plan: Widening) -> Widened:
    """The rule of this module for a tensor, by its name in the base."""
    D, c = plan.stream.width, plan.c
    kind = re.sub(r"^.*?(?=embed_tokens|lm_head|layers|norm\.)", "", name)
    kind = re.sub(r"^layers\.\d+\.", "", kind)
    match kind:
        case "embed_tokens.weight":
            return Widened((shape[0], D), factor=plan.stream.scale / c, embedding=True)
        case "lm_head.weight":
            return Widened((shape[0], D))
        case "norm.weight":
            head = plan.stream.scale / c if plan.tied else 1.0
            return Widened((D,), gain_factor=1 / c / head, fill=-plan.norm_adds)
        case "post_feedforward_layernorm.weight":
            return Widened((D,), fill=-plan.norm_adds)
        case "post_attention_layernorm.weight" if plan.post_norm:
            return Widened((D,), fill=-plan.norm_adds)
        case (
            "input_layernorm.weight"
            | "pre_feedforward_layernorm.weight"
            | "post_attention_layernorm.weight"
        ):
            return Widened((D,), gain_factor=1 / c, fill=-plan.norm_adds)
        case "self_attn.o_proj.weight":
            return Widened((D, shape[1]), factor=plan.block_gain)
        case "self_attn.o_proj.bias":
            return Widened((D,), factor=plan.block_gain)
        case "mlp.down_proj.weight":
            return Widened((D, plan.mlp), factor=plan.block_gain)
        case "mlp.gate_proj.weight" | "mlp.up_proj.weight":
            return Widened((plan.mlp, D))
        case "self_attn.q_norm.weight":
            return Widened(shape, gain_factor=plan.query_gain)
        case "self_attn.q_proj.weight":
            return Widened((shape[0], D), factor=1.0 if plan.head_norms else plan.query_gain)
        case "self_attn.q_proj.bias":
            return Widened(shape, factor=1.0 if plan.head_norms else plan.query_gain)
        case "self_attn.k_proj.weight" | "self_attn.v_proj.weight":
            return Widened((shape[0], D))
        case "self_attn.k_proj.bias" | "self_attn.v_proj.bias" | "self_attn.k_norm.weight":
            return Widened(shape)
        case "layer_scalar" if plan.scalars:
            return Widened(shape)
    raise ExportError(f"tensor {name}: is none of a stock Gemma's; expected a text model")


def widened_blocks(name: str, tensor: StoredTensor, plan: Widening) -> Iterator[bytes | memoryview]:
    """The bytes of a widened tensor in the plan's dtype, a few megabytes at a time."""
    change = widened(name, tensor.shape, plan)
    target = DTYPES[plan.dtype]
    arithmetic = tensor.dtype != target or change.factor != 1.0 or change.gain_factor != 1.0

    def convert(raw: Raw) -> Raw:
        if not arithmetic:
            return raw
        values = to_float32(raw, tensor.dtype)
        if change.gain_factor != 1.0:
            gains = (plan.norm_adds + values.astype(np.float64)) * change.gain_factor
            return to_bits(gains - plan.norm_adds, target)
        return to_bits(values * change.factor, target)

    columns = change.shape[-1]
    rows = change.shape[0] if len(change.shape) > 1 else 1
    fill = to_bits(np.full(1, change.fill), target)[0]
    constant = to_bits(np.full(1, plan.entry), target)[0]
    done = 0
    for raw in _raw_rows(tensor):
        out = np.full((len(raw), columns), fill, BITS[target])
        out[:, : raw.shape[1]] = convert(raw)
        if change.embedding:
            out[:, [*plan.exempting, *plan.always]] = constant
            for token in plan.exempt_token_ids:
                if done <= token < done + len(raw):
                    out[token - done, list(plan.exempting)] = fill
        done += len(raw)
        yield out.data.cast("B")
    per_block = max(1, BLOCK_BYTES // (columns * fill.itemsize))
    while done < rows:
        n = min(per_block, rows - done)
        yield np.full((n, columns), fill, BITS[target]).data.cast("B")
        done += n


def _raw_rows(tensor: StoredTensor) -> Iterator[Raw]:
    """A tensor's bits, [rows, columns], block by block; a vector is one row."""
    if tensor.dtype not in DTYPES.values():
        raise ExportError(
            f"{tensor.file.name}: holds {tensor.dtype} numbers; expected one of "
            f"{', '.join(DTYPES.values())}"
        )
    if len(tensor.shape) == 1:
        yield tensor.bits(0, tensor.shape[0])[None]
        return
    for start, stop in tensor.blocks(BLOCK_BYTES):
        yield tensor.bits(start, stop)
