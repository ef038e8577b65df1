"""A compiled folder's tensors but for the clamps' own: the base's numbers with zeros beside them.

The stream grows from d to D channels; c = sqrt(D/d). Gemma 2 and 3: matrices and embeddings stay,
1 + w of the norms before a block and of the last one is divided by c. Gemma 1 scales embeddings by
sqrt(d/D) instead, and its last norm keeps 1 + w where the head is tied. Gemma 4 has w for 1 + w,
keeps its eps, and what writes to the stream is multiplied by c before its norm; its layers multiply
all by a number of their own, the constants too. In the first padding
channels the embedding holds a constant, in those after them 0 for the tokens that are spared.
Derived here anew, without `export`'s own arithmetic; one part of a tensor is in memory at a time.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.base import BaseModel
from bake.errors import ModelError
from bake.rounding import EPSILON
from verify.expected.compiled_places import Places
from verify.report.findings import Failure

if TYPE_CHECKING:
    from torch import Tensor

PART_BYTES = 64 << 20
"""Of a tensor in float32, compared at once."""
CONSTANTS = 2
"""Channels in which the embedding holds the constant, for each kind of site."""
ALWAYS = 4
"""Channels before them, in which it holds the constant for every token."""
_NORMS_BEFORE = ("input_layernorm.weight", "pre_feedforward_layernorm.weight", "norm.weight")
_NORMS_AFTER = ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")
_WRITTEN = (
    *("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"),
    "post_feedforward_layernorm.weight",
)
"""Tensors of an added layer that hold the clamp; in all others stands nothing."""


@dataclass(frozen=True)
class Wide:
    """How a base was widened."""

    base: BaseModel
    config: Mapping[str, Any]
    """Of the compiled folder, already found to be what it must be."""
    spared: tuple[int, ...]
    """Tokens that hold 0 where others hold the constant."""
    kinds: tuple[bool, ...]
    """Whether sites spare tokens, ascending: each kind has constant channels of its own."""
    query_scalar: float | None
    """The base's query_pre_attn_scalar."""

    @property
    def c(self) -> float:
        """sqrt(D/d)."""
        return math.sqrt(int(self.config["hidden_size"]) / self.base.d_in)

    @property
    def query_gain(self) -> float:
        """What queries are multiplied by."""
        if self.query_scalar is None or "query_pre_attn_scalar" not in self.config:
            return 1.0
        return math.sqrt(float(self.config["query_pre_attn_scalar"]) / self.query_scalar)

    @property
    def flags(self) -> int:
        """The first channel behind all that hold the constant."""
        return self.base.d_in + ALWAYS + CONSTANTS * len(self.kinds)

    @property
    def norm_before(self) -> str:
        """The norm before a layer's MLP."""
        kind = "pre_feedforward" if self.base.family.norms_after else "post_attention"
        return f"{kind}_layernorm"

    @property
    def norm_adds(self) -> float:
        """What a norm multiplies by, less its weight."""
        return 0.0 if self.base.family.scaled else 1.0

    @cached_property
    def scalars(self) -> list[float]:
        """What each of the base's layers multiplies its output by, as the folder stores it."""
        import torch
        from safetensors import safe_open

        if not self.base.family.scaled:
            return []
        found = torch.ones(self.base.n_layers, dtype=getattr(torch, str(self.config["dtype"])))
        for layer in range(len(found)):
            name = f"{self.base.layer_prefix}{layer}.layer_scalar"
            if (shard := self.base.weight_map.get(name)) is not None:
                with safe_open(self.base.folder / shard, framework="pt") as tensors:
                    found[layer] = tensors.get_tensor(name).item()
        if not (sound := found.isfinite() & (found > 0)).all():
            raise ModelError(
                f"base model {self.base.name}: a layer_scalar is {found[~sound][0].item()}; "
                "expected positive numbers"
            )
        return found.tolist()

    def held(self, layer: int, dtype: str) -> float:
        """What a constant channel holds behind one of the base's layers, loaded in a dtype."""
        import torch

        numbers = [self.constant, math.sqrt(int(self.config["hidden_size"]))]
        held = torch.ones((), dtype=getattr(torch, dtype))
        for number in (*numbers, *self.scalars[: layer + 1]):
            held = held * torch.tensor(number, dtype=held.dtype)
        return held.item()

    def loudness(self, layer: int) -> float:
        """What the norm before a clamp's layers multiplies constants by, to have 2⁻⁹ or nearly."""
        if not self.base.family.scaled:
            return 1.0
        return 2.0 ** round(math.log2(2.0**-9 / self.held(layer, str(self.config["dtype"]))))

    @cached_property
    def constant(self) -> float:
        """What the embedding holds in a constant channel: Σ over them supplies the norms' eps; in
        Gemma 4 it is too small to count beside it, behind every layer.
        """
        wide = int(self.config["hidden_size"])
        if self.base.family.scaled:
            channels = ALWAYS + CONSTANTS * len(self.kinds)
            most = max(accumulate(self.scalars, operator.mul, initial=1.0))
            unseen = 2.0**-10 * math.sqrt(float(self.config["rms_norm_eps"]) / channels)
            return 2.0 ** math.floor(math.log2(unseen / most))
        eps = float(self.config["rms_norm_eps"]) * wide / self.base.d_in
        least = math.sqrt((wide - self.base.d_in) * eps / (ALWAYS + CONSTANTS) / wide)
        return 2.0 ** round(math.log2(least))


def widened_failures(
    folder: Path, wide: Wide, names: Mapping[str, tuple[str, str]], places: Places
) -> Iterator[Failure]:
    """What of a compiled folder's tensors is not the base's, but for what computes the clamp.

    Args:
        folder: of which every tensor lies where it must.
        wide: how it was widened.
        names: file and name in the base of every tensor, by its name in the folder.
        places: where its layers stand.
    """
    from safetensors import safe_open

    clamps = tuple(f"layers.{layer}." for layer in places.clamping)
    idle = tuple(f"layers.{layer}." for layer in places.idle)
    for file in sorted({file for file, _ in names.values()}):
        with safe_open(folder / file, framework="pt") as tensors:
            for name in sorted(name for name, (of, _) in names.items() if of == file):
                if any(mark in name for mark in idle):
                    wrong = _zeros(tensors.get_slice(name), "an idle layer", "it does nothing")
                elif any(mark in name for mark in clamps):
                    wrong = _idle(tensors.get_slice(name), name, wide)
                else:
                    original = names[name][1]
                    shard = wide.base.folder / wide.base.weight_map[original]
                    with safe_open(shard, framework="pt") as bases:
                        pair = tensors.get_slice(name), bases.get_slice(original)
                        wrong = _compared(*pair, original, wide)
                if wrong is not None:
                    what = f"{file}: {name} {wrong}"
                    yield Failure("integrity", "compiled", what, None, None)


def _idle(found: Any, name: str, wide: Wide) -> str | None:
    """What an added layer's tensor that holds nothing of the clamp holds all the same."""
    if name.endswith((*_WRITTEN, f"{wide.norm_before}.weight")):
        return None
    if name.endswith("layer_scalar"):
        return None if bool((found[:] == 1).all()) else "of an added layer is not 1"
    return _zeros(found, "an added layer", "only the MLP computes the clamp")


def _zeros(found: Any, what: str, where: str) -> str | None:
    """That a tensor is not all 0, in words; None where it is."""
    for start, stop in _parts(found.get_shape()):
        if bool(found[start:stop].count_nonzero()):
            return f"of {what} is not 0, where {where}"
    return None


def _compared(found: Any, base: Any, name: str, wide: Wide) -> str | None:
    """What of a widened tensor is not the base's, in words; None where all is."""
    import torch

    shape, narrow = found.get_shape(), base.get_shape()
    if len(shape) != len(narrow) or any(a < b for a, b in zip(shape, narrow, strict=True)):
        return f"has shape {shape}, expected {narrow} or more"
    if shape != _shape(name, narrow, wide):
        return f"has shape {shape}, expected {_shape(name, narrow, wide)}"
    factor, gain = _factor(name, wide), _gain(name, wide)
    norm = name.endswith(("norm.weight", "layernorm.weight"))
    adds = wide.norm_adds if norm else 0.0
    fill = -adds if shape != narrow else 0.0
    for start, stop in _parts(shape):
        got = found[start:stop]
        want = torch.full(got.shape, fill, dtype=torch.float64)
        given = base[start : min(stop, narrow[0])] if start < narrow[0] else None
        if given is not None:
            inside = tuple(slice(n) for n in given.shape)
            numbers = given.double()
            want[inside] = (adds + numbers) * gain * factor - adds
        if "embed_tokens" in name:
            _add_constants(want, start, wide)
        exact = want.float().to(got.dtype)
        off = (got.double() - exact.double()).abs()
        # Factors are rounded on the way; what has none is the base's own, rounded once.
        one = EPSILON[str(got.dtype).removeprefix("torch.")]
        free = 0.0 if factor == gain == 1.0 else 2 * one * (exact.double().abs() + adds)
        if bool((off > free).any()) or not bool(got.isfinite().all()):
            at = tuple(int(i) for i in ((off - free).nan_to_num(torch.inf).argmax(),))
            place = torch.unravel_index(torch.tensor(at[0]), off.shape)
            where = ", ".join(str(int(i) + (start if n == 0 else 0)) for n, i in enumerate(place))
            index = tuple(int(i) for i in place)
            return (
                f"is not the base's {name}: [{where}] is {float(got[index]):.9g}, expected "
                f"{float(exact[index]):.9g}"
            )
    return None


def _add_constants(want: Tensor, start: int, wide: Wide) -> None:
    """Write what the embedding holds beside the base's numbers into `want`, rows from `start`."""
    first = wide.base.d_in
    want[:, first : first + ALWAYS] = wide.constant
    first += ALWAYS
    for spares in wide.kinds:
        channels = slice(first, first + CONSTANTS)
        want[:, channels] = wide.constant
        for token in wide.spared if spares else ():
            if start <= token < start + len(want):
                want[token - start, channels] = 0.0
        first += CONSTANTS


def _shape(name: str, narrow: list[int], wide: Wide) -> list[int]:
    """Of a tensor in the compiled folder."""
    D, mlp = int(wide.config["hidden_size"]), int(wide.config["intermediate_size"])
    if name.endswith(("mlp.gate_proj.weight", "mlp.up_proj.weight")):
        return [mlp, D]
    if name.endswith("mlp.down_proj.weight"):
        return [D, mlp]
    if name.endswith("self_attn.o_proj.weight"):
        return [D, narrow[1]]
    if name.endswith(("_proj.weight", "embed_tokens.weight", "lm_head.weight")):
        return [narrow[0], D]
    if name.endswith(("o_proj.bias", *_NORMS_BEFORE, *_NORMS_AFTER)) and "_norm." not in name:
        return [D]
    return narrow


def _factor(name: str, wide: Wide) -> float:
    """What a matrix's or a bias's numbers are multiplied by."""
    family = wide.base.family
    if name.endswith("embed_tokens.weight"):
        return 1.0 if family.norms_after else 1 / wide.c
    if "self_attn.q_proj." in name and not family.head_norms:
        return wide.query_gain
    if family.scaled and ("self_attn.o_proj." in name or "mlp.down_proj." in name):
        return wide.c
    return 1.0


def _gain(name: str, wide: Wide) -> float:
    """What 1 + w of a norm is multiplied by."""
    family = wide.base.family
    if name.endswith("self_attn.q_norm.weight"):
        return wide.query_gain
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        return 1.0
    if name.endswith(_NORMS_AFTER) and (family.norms_after or "feedforward" in name):
        return 1.0
    if not name.endswith((*_NORMS_BEFORE, *_NORMS_AFTER)):
        return 1.0
    last = name.endswith("norm.weight") and "layers." not in name
    tied = not any(tensor.endswith("lm_head.weight") for tensor in wide.base.weight_map)
    # Where the head is the embedding, it has the embedding's factor already.
    head = _factor("embed_tokens.weight", wide) if last and tied else 1.0
    return 1 / wide.c / head


def _parts(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges of rows of `PART_BYTES` at most."""
    row = 4 * max(1, math.prod(shape[1:]))
    step = max(1, PART_BYTES // row)
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])
