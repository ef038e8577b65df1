"""The one loop that trains: AdamW, a rate that warms up and falls, a state that survives a kill.

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


@dataclass(frozen=True)
class Schedule:
    """How long, and how fast."""

    n_steps: int
    learning_rate: float
    """At its highest."""

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
    optimizer = torch.optim.AdamW(parameters, lr=1.0, betas=BETAS, weight_decay=0.0)
    start = _resumed(unfinished, parameters, optimizer)
    world.wait_for_everyone()  # before anybody saves
    save = unfinished.saver()
    for step in range(start, schedule.n_steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        optimizer.zero_grad()
        torch.autograd.backward(loss(step))
        if world.num_processes > 1:
            for parameter in parameters:
                parameter.grad = reduce(parameter.grad, "mean")
        torch.nn.utils.clip_grad_norm_(parameters, LARGEST_GRADIENT)
        optimizer.step()
        if world.is_main_process:
            save(_state(step + 1, parameters, optimizer))
        progress((step + 1) / schedule.n_steps)


def _state(
    step: int, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    found = {"step": torch.tensor(step)}
    for i, parameter in enumerate(parameters):
        found[f"{i}"] = parameter.detach()
        found |= {f"{i}.{name}": moment for name, moment in optimizer.state[parameter].items()}
    return found


def _resumed(
    unfinished: Unfinished, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer
) -> int:
    """Changes parameters and optimizer to what was last saved; how many steps that was."""
    state = unfinished.load()
    if state is None:
        return 0
    with torch.no_grad():
        for i, parameter in enumerate(parameters):
            parameter.copy_(state[f"{i}"])
            for key in (key for key in state if key.startswith(f"{i}.")):
                name = key.removeprefix(f"{i}.")
                moment = state[key] if name == "step" else state[key].to(parameter.device)
                optimizer.state[parameter][name] = moment
    return int(state["step"])
