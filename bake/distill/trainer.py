"""The one loop that trains: a rate that warms up and falls, a state that survives a kill.

AdamW; where whole matrices learn much, Muon for them, which took a third of the steps there.

Launched by `accelerate`, every process takes its share of each step's rows, and gradients are
averaged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bake.search.cache import Unfinished

WARM_UP = 0.05
"""Share of the steps in which the rate rises."""
FINAL_RATE = 0.02
"""At the last step, as a share of the highest."""
LARGEST_GRADIENT = 1.0
"""Its norm is cut to this."""
BETAS = (0.9, 0.98)
MUON_RATE = 5.0
"""Muon's learning rate, in that of AdamW."""


@dataclass(frozen=True)
class Schedule:
    """How long, and how fast."""

    n_steps: int
    learning_rate: float
    """At its highest."""
    muon: bool = False
    """Matrices are trained by Muon."""

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 0."""
        rising = max(1, round(WARM_UP * self.n_steps))
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        done = (step - rising) / max(1, self.n_steps - rising)
        falling = 0.5 * (1 + math.cos(math.pi * done))
        return self.learning_rate * (FINAL_RATE + (1 - FINAL_RATE) * falling)


def processes() -> Any:
    """Accelerate's view of the processes that this one trains with; one of its own mostly."""
    from accelerate import PartialState

    return PartialState()


def train(
    parameters: list[nn.Parameter],
    loss: Callable[[int], Tensor],
    schedule: Schedule,
    unfinished: Unfinished,
    progress: Callable[[float], None] = lambda _: None,
) -> None:
    """Changes the parameters. A run that was killed goes on, to the same result.

    Args:
        parameters: what is trained, always in the same order.
        loss: of a step, from 0; it depends on nothing but the parameters.
        schedule: steps and rates.
        unfinished: where the state is kept meanwhile. Whoever calls removes it in the end.
        progress: called with the share that is done.
    """
    from accelerate.utils import reduce

    world = processes()
    optimizers = _optimizers(parameters, muon=schedule.muon)
    start = _resumed(unfinished, parameters, optimizers)
    world.wait_for_everyone()  # before anybody saves
    save = unfinished.saver()
    for step in range(start, schedule.n_steps):
        for optimizer in optimizers:
            faster = MUON_RATE if isinstance(optimizer, torch.optim.Muon) else 1.0
            for group in optimizer.param_groups:
                group["lr"] = faster * schedule.rate(step)
            optimizer.zero_grad()
        torch.autograd.backward(loss(step))
        if world.num_processes > 1:
            for parameter in parameters:
                parameter.grad = reduce(parameter.grad, "mean")
        torch.nn.utils.clip_grad_norm_(parameters, LARGEST_GRADIENT)
        for optimizer in optimizers:
            optimizer.step()
        if world.is_main_process:
            save(_state(step + 1, parameters, optimizers))
        progress((step + 1) / schedule.n_steps)


def _optimizers(parameters: list[nn.Parameter], *, muon: bool) -> list[torch.optim.Optimizer]:
    matrices = [p for p in parameters if muon and p.ndim == 2]
    known = {id(p) for p in matrices}
    others = [p for p in parameters if id(p) not in known]
    found: list[torch.optim.Optimizer] = []
    if matrices:
        found.append(torch.optim.Muon(matrices, lr=1.0, weight_decay=0.0))
    if others:
        found.append(torch.optim.AdamW(others, lr=1.0, betas=BETAS, weight_decay=0.0))
    return found


def _state(
    step: int, parameters: list[nn.Parameter], optimizers: list[torch.optim.Optimizer]
) -> dict[str, Tensor]:
    found = {"step": torch.tensor(step)}
    for i, parameter in enumerate(parameters):
        found[f"{i}"] = parameter.detach()
        for optimizer in optimizers:
            moments = optimizer.state.get(parameter, {})
            found |= {f"{i}.{name}": moment for name, moment in moments.items()}
    return found


def _resumed(
    unfinished: Unfinished,
    parameters: list[nn.Parameter],
    optimizers: list[torch.optim.Optimizer],
) -> int:
    """Changes parameters and optimizers to what was last saved; how many steps that was."""
    state = unfinished.load()
    if state is None:
        return 0
    numbers = {id(parameter): i for i, parameter in enumerate(parameters)}
    with torch.no_grad():
        for i, parameter in enumerate(parameters):
            parameter.copy_(state[f"{i}"])
    for optimizer in optimizers:
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            before = f"{numbers[id(parameter)]}."
            for key in (key for key in state if key.startswith(before)):
                name = key.removeprefix(before)
                moment = state[key] if name == "step" else state[key].to(parameter.device)
                optimizer.state[parameter][name] = moment
    return int(state["step"])
