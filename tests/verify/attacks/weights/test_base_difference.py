"""Undoing a change with the base at hand: what was changed is found, and nothing else."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from bake.errors import ModelError
from bake.stock import decoder_layers
from tests.logits import flat_logits, tiny_prompts
from tests.worlds import tiny_base
from verify.attacks.weights.base_difference import (
    noise_edge,
    rank_of,
    subtract_difference,
    towards_base,
)
from verify.compare.logits import kl_nats


@pytest.fixture
def base(tmp_path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_base(tmp_path / "base")).eval()


def changed_by(base: Any, rank: int, noise: float) -> Any:
    """The base after a change of some rank in two matrices, with noise on every weight."""
    model, draw = copy.deepcopy(base), torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += noise * torch.randn(parameter.shape, generator=draw)
    for layer in list(decoder_layers(model))[1:3]:
        weight = layer.mlp.down_proj.weight
        out, into = (torch.randn(n, rank, generator=draw) for n in weight.shape)
        weight.data += 0.5 * out @ into.T
    return model


def distance(one: Any, other: Any) -> float:
    """Mean KL in nats."""
    ids = tiny_prompts()
    return float(kl_nats(flat_logits(one, ids), flat_logits(other, ids)).mean())


def test_a_change_of_low_rank_is_found_beneath_noise_and_taken_out(base: Any) -> None:
    model = changed_by(base, rank=3, noise=1e-4)
    assert distance(base, model) > 0.3
    ranks = subtract_difference(model, base)
    names = [f"model.layers.{number}.mlp.down_proj.weight" for number in (1, 2)]
    assert {name: rank for name, rank in ranks.items() if name in names} == dict.fromkeys(names, 3)
    assert all(rank <= 2 for name, rank in ranks.items() if name not in names)
    assert distance(base, model) < 1e-4


def test_too_few_directions_leave_some_of_it(base: Any) -> None:
    model = changed_by(base, rank=6, noise=0.0)
    distances = []
    for n in (1, 3, 6, 99):
        changed = copy.deepcopy(model)
        subtract_difference(changed, base, n)
        distances.append(distance(base, changed))
    assert distances[0] > 1e-3 and distances[1] > 1e-3
    assert max(distances[2:]) < 1e-8


def test_nothing_is_found_where_nothing_was_changed_or_by_noise_alone(base: Any) -> None:
    assert subtract_difference(copy.deepcopy(base), base) == {}
    draw = torch.Generator().manual_seed(0)
    for shape in ((60, 200), (200, 60), (150, 150), (400, 20)):
        noise = torch.randn(shape, generator=draw, dtype=torch.float64)
        assert rank_of(torch.linalg.svdvals(noise), torch.Size(shape)) <= 1
        noise[:, :1] += 4 * torch.randn(shape[0], 1, generator=draw)
        noise[0] += 4 * torch.randn(shape[1], generator=draw)
        assert rank_of(torch.linalg.svdvals(noise), torch.Size(shape)) >= 1


def test_the_edge_of_noise_is_the_published_one() -> None:
    assert noise_edge(torch.Size((50, 50))) == pytest.approx(2.858, abs=5e-3)
    assert noise_edge(torch.Size((5, 100))) == pytest.approx(1.5194, abs=5e-3)


def test_towards_the_base(base: Any) -> None:
    model = changed_by(base, rank=2, noise=1e-3)
    assert distance(towards_base(copy.deepcopy(model), base, 0.0), model) < 1e-12
    assert distance(towards_base(copy.deepcopy(model), base, 1.0), base) < 1e-12
    half = towards_base(copy.deepcopy(model), base, 0.5)
    name = "model.layers.1.mlp.down_proj.weight"
    weights = [dict(of.named_parameters())[name] for of in (model, base, half)]
    torch.testing.assert_close((weights[0] + weights[1]) / 2, weights[2])


def test_another_base_is_refused(base: Any, tmp_path: Path) -> None:
    other = AutoModelForCausalLM.from_pretrained(tiny_base(tmp_path / "other", "gemma3_text"))
    for undo in (lambda: towards_base(base, other, 1.0), lambda: subtract_difference(base, other)):
        with pytest.raises(ModelError, match=r"^weight .*; expected folders of one base"):
            undo()
