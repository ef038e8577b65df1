"""The loop: its rate, and that a run that is killed goes on to the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bake.distill.trainer import FINAL_RATE, Schedule, train
from bake.search.cache import Unfinished


class Killed(Exception):  # noqa: N818
    pass


def problem() -> tuple[list[nn.Parameter], Callable[[int], Tensor]]:
    torch.manual_seed(0)
    weight, bias = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.zeros(5))
    inputs, wanted = torch.randn(40, 8, 3), torch.randn(40, 8, 5)
    return [
        weight,
        bias,
    ], lambda step: (inputs[step] @ weight.T + bias - wanted[step]).square().mean()


def test_the_rate_rises_and_falls() -> None:
    schedule = Schedule(100, 0.5)
    rates = [schedule.rate(step) for step in range(100)]
    assert max(rates) == rates[4] == rates[5] == 0.5
    assert rates[:5] == sorted(rates[:5]) and rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[-1] == pytest.approx(FINAL_RATE * 0.5, rel=0.05)


def test_it_minimises(tmp_path: Path) -> None:
    parameters, loss = problem()
    before = float(loss(0).detach())
    schedule = Schedule(40, 0.1)
    train(parameters, lambda _: loss(0), schedule, Unfinished(tmp_path / "state"))
    assert float(loss(0).detach()) < 0.7 * before


@pytest.mark.parametrize("killed_after", [0.3, 0.8])
def test_a_killed_run_goes_on_to_the_same(
    tmp_path: Path, killed_after: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bake.search.cache.SAVING_SHARE", 1e9)  # every step is saved
    whole, loss = problem()
    schedule = Schedule(20, 0.1)
    train(whole, loss, schedule, Unfinished(tmp_path / "one"))

    def kill(share: float) -> None:
        if share >= killed_after:
            raise Killed

    cut, loss = problem()
    with pytest.raises(Killed):
        train(cut, loss, schedule, Unfinished(tmp_path / "other"), kill)
    after_kill = [p.detach().clone() for p in cut]
    again, loss = problem()
    seen: list[float] = []
    train(again, loss, schedule, Unfinished(tmp_path / "other"), seen.append)
    assert seen[0] == pytest.approx(killed_after + 0.05)  # it did go on, not begin anew
    assert not torch.equal(after_kill[0], whole[0])
    assert all(torch.equal(a, b) for a, b in zip(again, whole, strict=True))
