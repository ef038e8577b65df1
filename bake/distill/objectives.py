"""What is minimised: each method's loss over a step's forget texts and retain texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax, logsigmoid
from torch.utils.checkpoint import checkpoint

BLOCK = 1 << 25
"""Logits that are formed at once, about."""
FORGET_WEIGHT = 2.0
"""Of the KL on forget text beside that on retain text: choosing right answers spreads from retained
questions to forgotten ones more readily than not choosing them does."""
RETAIN_WEIGHT_RMU = 24.0
"""alpha of RMU (Li et al., arXiv 2403.03218), here beside distances in the layer's own size."""


@dataclass(frozen=True)
class Seen:
    """What a model makes of the real tokens of some rows, one after another."""

    final: Tensor
    """[n, d_in]: what the output matrix is applied to."""
    hidden: dict[int, Tensor]
    """By layer, its output: [n, d_in]."""

    def part(self, of: slice) -> Seen:
        """Some of the tokens."""
        return Seen(self.final[of], {layer: h[of] for layer, h in self.hidden.items()})


@dataclass(frozen=True)
class Head:
    """A model's output matrix."""

    weight: Tensor
    """[vocab, d_in], not trained."""
    cap: float | None = None
    """Logits beyond it are bent back."""
    tokens: Tensor | None = None
    """[k], whose rows are `rows` instead."""
    rows: Tensor | None = None
    """[k, d_in], trained."""

    def __call__(self, final: Tensor) -> Tensor:
        """[n, d_in] -> logits: [n, vocab]."""
        scores = final @ self.weight.T
        if self.tokens is not None and self.rows is not None:
            scores = scores.index_copy(1, self.tokens, final @ self.rows.T)
        return scores if self.cap is None else self.cap * torch.tanh(scores / self.cap)

    def back(self, apart: Tensor, final: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gradients, ([n, d_in] of `final`, [k, d_in] of `rows`), of that of the logits before they
        are bent, which is changed: [n, vocab].
        """
        if self.tokens is None or self.rows is None:
            return apart @ self.weight, None
        own = apart[:, self.tokens]
        apart[:, self.tokens] = 0
        return (apart @ self.weight).addmm_(own, self.rows), own.T @ final

    def blocks(self, n: int) -> list[slice]:
        """Tokens whose logits are formed together."""
        step = max(1, BLOCK // len(self.weight))
        return [slice(at, min(at + step, n)) for at in range(0, n, step)]


@dataclass(frozen=True)
class Side:
    """One corpus's share of a step."""

    student: Seen
    teacher: Seen
    targets: Tensor
    """[n], the token that follows each; -100 where none does."""
    rows: Tensor
    """[n], which row each token is of."""


@dataclass(frozen=True)
class Step:
    """What a loss is computed from."""

    forget: Side
    retain: Side
    head: Head
    """Of the student."""
    teacher_head: Head
    """Of the base."""
    strength: float
    layer: int
    """RMU only: whose output is steered."""
    direction: Tensor
    """RMU only: [d_in], what it is steered to."""


class _SumOfKL(torch.autograd.Function):
    """KL(teacher ‖ student) in nats, summed over tokens. Its gradient, p_student - p_teacher by the
    output matrix, is taken while the logits are there, so that they are formed once. `rows` are
    those of `of_student`, which get a gradient too.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        rows: Tensor | None,
        of_student: Head,
        teacher: Tensor,
        of_teacher: Head,
    ) -> Tensor:
        scores = of_student(student)
        got, wanted = log_softmax(scores, -1), log_softmax(of_teacher(teacher), -1)
        total = kl_div(got, wanted, reduction="sum", log_target=True)
        if ctx.needs_input_grad[0]:
            apart = got.exp_().sub_(wanted.exp_())
            if of_student.cap is not None:
                apart *= 1 - (scores / of_student.cap).square_()
            ctx.save_for_backward(*of_student.back(apart, student))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        of_final, of_rows = ctx.saved_tensors
        own = None if of_rows is None else grads[0] * of_rows
        return grads[0] * of_final, own, None, None, None


def mean_kl(teacher: Tensor, of_teacher: Head, student: Tensor, of_student: Head) -> Tensor:
    """KL(teacher ‖ student) in nats per token.

    Args:
        teacher: [n, d_in].
        of_teacher: its output matrix.
        student: [n, d_in].
        of_student: likewise.
    """
    sums = [
        _SumOfKL.apply(student[part], of_student.rows, of_student, teacher[part], of_teacher)  # type: ignore[no-untyped-call]
        for part in of_student.blocks(len(student))
    ]
    return torch.stack(sums).sum() / len(student)


def token_losses(seen: Seen, head: Head, targets: Tensor) -> Tensor:
    """[n] cross-entropy of the next token in nats; 0 where none follows."""

    def block(final: Tensor, wanted: Tensor) -> Tensor:
        return cross_entropy(head(final), wanted, reduction="none")

    # The logits are formed again for the gradient instead of being kept.
    losses = [
        checkpoint(block, seen.final[part], targets[part], use_reentrant=False)
        for part in head.blocks(len(targets))
    ]
    return torch.cat(losses)


def hidden_distance(side: Side) -> Tensor:
    """Mean over layers and tokens of |u - teacher's u|² / d_in, where u = h / rms(h) is what the
    next block's norm makes of a residual stream. A clamp may make h larger than any weights can.
    """
    found = [
        (normed(side.student.hidden[layer]) - normed(wanted)).square().mean()
        for layer, wanted in side.teacher.hidden.items()
    ]
    return torch.stack(found).mean()


def normed(h: Tensor) -> Tensor:
    """[n, d_in], each row divided by its root mean square."""
    return h * h.square().mean(-1, keepdim=True).clamp(min=1e-12).rsqrt()


def kept(step: Step) -> Tensor:
    """KL to the base on retain text."""
    side = step.retain
    return mean_kl(side.teacher.final, step.teacher_head, side.student.final, step.head)


def merged(step: Step) -> Tensor:
    """KL to the clamped model on forget text, weighed, and to the base on retain text; `strength`
    times how far the residual stream from the hook layer on is from theirs on both, as norms read
    it.
    """
    side = step.forget
    forgot = mean_kl(side.teacher.final, step.teacher_head, side.student.final, step.head)
    apart = hidden_distance(step.forget) + hidden_distance(step.retain)
    return FORGET_WEIGHT * forgot + kept(step) + step.strength * apart


def rmu(step: Step) -> Tensor:
    """A layer's output is steered to a random direction on forget text and held on retain text.

    Source: Li et al., arXiv 2403.03218.
    """
    steered = step.forget.student.hidden[step.layer] - step.direction
    moved = step.retain.student.hidden[step.layer] - step.retain.teacher.hidden[step.layer]
    # Both in the base's own size there, which differs from model to model by orders of magnitude.
    unit = step.retain.teacher.hidden[step.layer].square().mean()
    return (steered.square().mean() + RETAIN_WEIGHT_RMU * moved.square().mean()) / unit


def gradient_difference(step: Step) -> Tensor:
    """The loss on forget text is driven up, `strength` times, and retain text kept.

    Source: Liu et al., arXiv 2203.12817; the retain term is a KL to the base.
    """
    losses = token_losses(step.forget.student, step.head, step.forget.targets)
    return kept(step) - step.strength * losses.sum() / (step.forget.targets >= 0).sum()


def npo(step: Step) -> Tensor:
    """Negative preference optimisation of forget texts, and retain text kept: `strength` is beta.

    Source: Zhang et al., arXiv 2404.05868, with a KL to the base on retain text.
    """
    side, beta = step.forget, step.strength
    now = token_losses(side.student, step.head, side.targets)
    with torch.no_grad():
        was = token_losses(side.teacher, step.teacher_head, side.targets)
    n_rows = int(side.rows.max()) + 1
    ratio = torch.zeros(n_rows, device=now.device).index_add(0, side.rows, was - now)
    return kept(step) - 2 / beta * logsigmoid(-beta * ratio).mean()


def shifted(ids: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """(targets, rows) of the real tokens of padded rows, as `Side` has them."""
    targets = torch.full_like(ids, -100)
    targets[:, :-1] = torch.where(real[:, 1:], ids[:, 1:], -100)
    rows: Any = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)
    return targets[real], rows[real]
