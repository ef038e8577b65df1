"""The losses, against the same by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import bake.distill.objectives as objectives
from bake.distill.objectives import Head, Seen, Side, Step, mean_kl, shifted

D, VOCAB, N = 6, 11, 9


def side(seed: int, targets: list[int], rows: list[int]) -> Side:
    torch.manual_seed(seed)
    student = Seen(torch.randn(N, D, requires_grad=True), {1: torch.randn(N, D)})
    teacher = Seen(torch.randn(N, D), {1: torch.randn(N, D)})
    return Side(student, teacher, torch.tensor(targets), torch.tensor(rows))


@pytest.fixture
def step() -> Step:
    torch.manual_seed(9)
    targets, rows = [3, 4, 5, -100, 1, 2, 7, 8, -100], [0, 0, 0, 0, 1, 1, 1, 1, 1]
    head = Head(torch.randn(VOCAB, D), cap=3.0)
    return Step(
        side(0, targets, rows),
        side(1, targets, rows),
        head,
        Head(torch.randn(VOCAB, D), cap=3.0),
        strength=0.5,
        layer=1,
        direction=torch.randn(D),
    )


def logits(head: Head, final: Tensor) -> Tensor:
    assert head.cap is not None
    return head.cap * torch.tanh(torch.einsum("nd,vd->nv", final, head.weight) / head.cap)


def plain_kl(teacher: Tensor, student: Tensor) -> Tensor:
    p, q = teacher.softmax(-1), student.softmax(-1)
    return (p * (p.log() - q.log())).sum(-1).mean()


def kept(step: Step) -> Tensor:
    s = step.retain
    return plain_kl(logits(step.teacher_head, s.teacher.final), logits(step.head, s.student.final))


@pytest.mark.parametrize("block", [1, VOCAB, 4 * VOCAB, 1 << 20])
def test_kl_in_blocks_is_kl(step: Step, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectives, "BLOCK", block)
    s = step.forget
    found = mean_kl(s.teacher.final, step.teacher_head, s.student.final, step.head)
    expected = plain_kl(
        logits(step.teacher_head, s.teacher.final), logits(step.head, s.student.final)
    )
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(of, s.student.final)[0] for of in (found, expected)]
    torch.testing.assert_close(gradients[0], gradients[1])


def test_kl_of_a_head_without_a_cap(step: Step) -> None:
    s, head = step.forget, Head(step.head.weight)
    found = mean_kl(s.teacher.final, head, s.student.final, head)
    expected = plain_kl(s.teacher.final @ head.weight.T, s.student.final @ head.weight.T)
    gradients = [torch.autograd.grad(of, s.student.final)[0] for of in (found, expected)]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("block", [1, 3 * VOCAB, 1 << 25])
def test_kl_of_a_head_that_learns_some_rows(
    step: Step, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objectives, "BLOCK", block)
    s, tokens = step.forget, torch.tensor([2, 7, 10])
    rows = torch.randn(3, D, requires_grad=True)
    head = replace(step.head, tokens=tokens, rows=rows)
    found = mean_kl(s.teacher.final, step.teacher_head, s.student.final, head)
    whole = torch.cat([head.weight[:2], rows[:1], head.weight[3:7], rows[1:2], head.weight[8:10]])
    expected = plain_kl(
        logits(step.teacher_head, s.teacher.final),
        logits(Head(torch.cat([whole, rows[2:]]), cap=3.0), s.student.final),
    )
    torch.testing.assert_close(found, expected)
    wanted = (s.student.final, rows)
    gradients = [torch.autograd.grad(of, wanted) for of in (found, expected)]
    torch.testing.assert_close(gradients[0], gradients[1])


def test_kl_to_itself_is_zero(step: Step) -> None:
    final = step.forget.student.final
    found = mean_kl(final, step.head, final, step.head).detach()
    assert float(found) == pytest.approx(0, abs=1e-6)


def cosines_apart(h: Tensor, other: Tensor) -> Tensor:
    """Of unit vectors |a - b|² = 2 (1 - cos), whatever their lengths were."""
    cosines = torch.einsum("nd,nd->n", h, other) / (h.norm(dim=1) * other.norm(dim=1))
    return (2 * (1 - cosines)).mean()


def test_merged(step: Step) -> None:
    f = step.forget
    forgot = plain_kl(
        logits(step.teacher_head, f.teacher.final), logits(step.head, f.student.final)
    )
    apart = sum(cosines_apart(s.student.hidden[1], s.teacher.hidden[1]) for s in (f, step.retain))
    expected = objectives.FORGET_WEIGHT * forgot + kept(step) + 0.5 * apart
    torch.testing.assert_close(objectives.merged(step), expected)


def test_rmu(step: Step) -> None:
    steered = sum(
        float(((h - step.direction) ** 2).sum()) for h in step.forget.student.hidden[1]
    ) / (N * D)
    was = step.retain.teacher.hidden[1]
    moved = float(((step.retain.student.hidden[1] - was) ** 2).mean())
    unit = float((was**2).mean())
    expected = (steered + objectives.RETAIN_WEIGHT_RMU * moved) / unit
    assert float(objectives.rmu(step)) == pytest.approx(expected, rel=1e-5)


def log_likelihoods(head: Head, final: Tensor, of: Side) -> Tensor:
    """[2 rows]."""
    log_p, total = logits(head, final).log_softmax(-1), torch.zeros(2)
    for n, (target, row) in enumerate(zip(of.targets.tolist(), of.rows.tolist(), strict=True)):
        if target >= 0:
            total[row] += log_p[n, target].detach()
    return total


def test_gradient_difference(step: Step) -> None:
    total = log_likelihoods(step.head, step.forget.student.final, step.forget).sum()
    expected = kept(step) + 0.5 * total / 7
    torch.testing.assert_close(objectives.gradient_difference(step), expected)


def test_npo(step: Step) -> None:
    f = step.forget
    now = log_likelihoods(step.head, f.student.final, f)
    was = log_likelihoods(step.teacher_head, f.teacher.final, f)
    # Zhang et al.: 2/beta · E log(1 + (pi / pi_ref)^beta)
    expected = kept(step) + 2 / 0.5 * torch.log1p(torch.exp(0.5 * (now - was))).mean()
    torch.testing.assert_close(objectives.npo(step), expected)
    certain = replace(f, student=f.teacher)
    same = replace(step, forget=certain, head=step.teacher_head)
    at_start = 4 * torch.log(torch.tensor(2.0))
    torch.testing.assert_close(objectives.npo(same) - objectives.kept(same), at_start)


def test_targets_are_the_next_tokens_of_the_same_row() -> None:
    ids = torch.tensor([[2, 5, 6], [2, 7, 0]])
    real = torch.tensor([[True, True, True], [True, True, False]])
    targets, rows = shifted(ids, real)
    assert targets.tolist() == [5, 6, -100, 7, -100]
    assert rows.tolist() == [0, 0, 0, 1, 1]
