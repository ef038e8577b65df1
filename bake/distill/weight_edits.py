"""Weights that are moved in closed form: by least squares, or along features' directions.

Both change MLPs' output matrices W [d_in, m] alone, which write W z of a token's m activations z.
Gemma 2 and 3 norm what is written: W z / rms(W z) · g. Its size is then g's, whatever W is, so a
target is met in direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bake.clamp import ClampWeights
from bake.distill.distill_texts import Rows
from bake.distill.teachers import ROWS_AT_ONCE, Teacher, module_of, read
from bake.stock import decoder_layers, norm_gain

RIDGE = 1e-3
"""Weight of staying where a matrix is, against the mean square of an activation."""


@dataclass(frozen=True)
class Lesson:
    """Texts, and what residual streams are to be on them."""

    rows: Rows
    numbers: Sequence[int]
    """Of the rows."""
    teacher: Teacher


@torch.no_grad()
def fit_outputs(model: Any, layers: Sequence[int], lessons: Sequence[Lesson]) -> None:
    """Changes the model: layer by layer, W is moved so that the residual stream behind the layer
    comes as near as it can, in the least squares, to the lessons'.

        min over W of  Σ |W z - y*|² + ridge |W - W₀|²,  every lesson's tokens weighing the same

    Args:
        model: a stock Gemma.
        layers: ascending; those before are left alone, those behind see what was changed.
        lessons: whose teachers kept the outputs of these layers.
    """
    for layer in layers:
        module: Any = decoder_layers(model)[layer]
        W = module.mlp.down_proj.weight
        gram = torch.zeros(W.shape[1], W.shape[1], dtype=torch.float64)
        cross = torch.zeros(W.shape, dtype=torch.float64)
        for lesson in lessons:
            n = sum(len(lesson.rows.ids[number]) for number in lesson.numbers)
            for at in range(0, len(lesson.numbers), ROWS_AT_ONCE):
                z, wanted = _wanted(model, layer, lesson, lesson.numbers[at : at + ROWS_AT_ONCE])
                gram += (z.T @ z).cpu() / n
                cross += (wanted.T @ z).cpu() / n
        W.copy_(ridge_solution(gram, cross, W.detach().double().cpu()))


def ridge_solution(gram: Tensor, cross: Tensor, W: Tensor) -> Tensor:
    """The W' of least squares that stays near a W where nothing speaks against it.

    Args:
        gram: [m, m], Zᵀ Z.
        cross: [d_in, m], Yᵀ Z.
        W: [d_in, m].
    """
    ridge = RIDGE * gram.diagonal().mean()
    left = gram + ridge * torch.eye(len(gram), dtype=gram.dtype)
    found: Tensor = torch.linalg.solve(left, (cross + ridge * W).T).T
    return found


def _wanted(
    model: Any, layer: int, lesson: Lesson, numbers: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """([n, m] z, [n, d_in] y*) of the real tokens of some rows, in float64."""
    ids, real = lesson.rows.batch(numbers).padded(model.device)
    module: Any = decoder_layers(model)[layer]
    after = getattr(module, "post_feedforward_layernorm", None)
    seen: dict[str, Tensor] = {}

    def keep(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen["z"], seen["y"] = inputs[0], output

    def keep_out(_: Any, __: Any, output: Tensor) -> None:
        seen["out"] = output

    with ExitStack() as undo:
        undo.callback(module.mlp.down_proj.register_forward_hook(keep).remove)
        undo.callback((after or module.mlp).register_forward_hook(keep_out).remove)
        h = read(model, ids, real, [layer]).hidden[layer].double()
    z, y, out = (seen[name][real].double() for name in ("z", "y", "out"))
    wanted = lesson.teacher.seen(numbers, model.device).hidden[layer].double() - (h - out)
    if after is not None:  # that direction, in the size that W z has
        wanted = wanted / _gain(after).double()
        wanted *= _rms(y) / _rms(wanted).clamp(min=1e-9)
    return z, wanted


@torch.no_grad()
def edit_features(
    model: Any, layers: Sequence[int], clamps: Sequence[ClampWeights], strength: float, size: float
) -> int:
    """Changes the model: every neuron whose output vector the SAE reads as a clamped feature gets
    that feature set to -`strength` times what it was, in its own output vector.

    Source: after PISCES, arXiv 2505.22586, with the recipe's SAE in place of one of MLPs' outputs.

    Args:
        model: a stock Gemma.
        layers: whose MLPs are edited.
        clamps: whose features are meant.
        strength: 0 takes a feature out, more writes its opposite.
        size: length at which vectors are read: that of a residual stream.

    Returns:
        How many neurons were changed.
    """
    edited = 0
    for layer in layers:
        module: Any = decoder_layers(model)[layer]
        after = getattr(module, "post_feedforward_layernorm", None)
        W = module.mlp.down_proj.weight
        gain = torch.ones(len(W), device=W.device) if after is None else _gain(after)
        written = (W.T * gain).float()  # [m, d_in], as the residual stream gets it
        scale = size / written.norm(dim=-1, keepdim=True).clamp(min=1e-9)
        change = torch.zeros_like(written)
        for clamp in clamps:
            read_by = module_of(clamp, W.device)
            for sign in (1.0, -1.0):  # a neuron's activation may be of either
                acts = read_by.feature_acts(sign * scale * written)
                acts = torch.where(acts > read_by.trigger, acts, 0.0)
                change -= sign * ((1 + strength) * acts @ read_by.W_dec) / scale
        edited += int((change != 0).any(dim=-1).sum())
        W.add_((change / gain).T.to(W.dtype))
    return edited


def _gain(norm: Any) -> Tensor:
    """What a Gemma's norm multiplies by: [d_in]."""
    gain = norm_gain(norm)
    return torch.where(gain.abs() < 1e-3, 1e-3, gain)


def _rms(x: Tensor) -> Tensor:
    return x.square().mean(-1, keepdim=True).sqrt()
