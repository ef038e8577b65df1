"""Rounding and pruning by plain arithmetic; and a change that is known to round away does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from bake.rounding import coarsen, rounded_to_integers
from bake.stock import decoder_layers
from tests.logits import flat_logits, tiny_prompts
from tests.worlds import tiny_base
from verify.attacks.weights.coarse_weights import (
    ROUNDINGS,
    pruned,
    rounded_to_float16,
)
from verify.compare.logits import kl_nats


def random_weight(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def coarsened(model: Any, name: str) -> Any:
    changed = copy.deepcopy(model)
    coarsen(decoder_layers(changed), ROUNDINGS[name])
    return changed


@pytest.fixture
def base(tmp_path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_base(tmp_path / "base")).eval()


@pytest.mark.parametrize("bits", [4, 8])
def test_integers_are_even_steps_of_every_row(bits: int) -> None:
    weight = random_weight(7, 33)
    weight[4] = 0.0
    found = rounded_to_integers(weight, bits)
    for row, coarse in zip(weight.numpy().astype(float), found.numpy().astype(float), strict=True):
        step = np.abs(row).max() / (2 ** (bits - 1) - 1)
        if not step:
            assert not coarse.any()
            continue
        np.testing.assert_allclose(coarse / step, np.rint(coarse / step), atol=1e-4)
        assert np.abs(coarse - row).max() <= step / 2 * (1 + 1e-4)
    torch.testing.assert_close(rounded_to_integers(found, bits), found)


def test_float16_is_numpys() -> None:
    weight = random_weight(5, 9)
    expected = weight.numpy().astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(rounded_to_float16(weight).numpy(), expected)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_pruning_drops_the_smallest(share: float) -> None:
    weight = random_weight(6, 50)
    found = pruned(weight, share)
    dropped = found == 0
    assert dropped.sum() == round(share * 300)
    assert torch.equal(found[~dropped], weight[~dropped])
    if share:
        assert weight[dropped].abs().max() <= weight[~dropped].abs().min()


@pytest.mark.parametrize("name", ROUNDINGS)
def test_matrices_of_layers_alone_are_changed(base: Any, name: str) -> None:
    after = coarsened(base, name).state_dict()
    for key, weight in base.state_dict().items():
        is_changed = ".layers." in key and key.endswith("proj.weight")
        assert torch.equal(after[key], weight) != is_changed


def disturbed(base: Any, by: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The base, with something added to every matrix of its layers."""
    model = copy.deepcopy(base)
    for parameter in decoder_layers(model).parameters():
        if parameter.ndim == 2:
            parameter.data += by(parameter.data)
    return model


def distance(one: Any, other: Any) -> float:
    """Mean KL in nats."""
    ids = tiny_prompts()
    return float(kl_nats(flat_logits(one, ids), flat_logits(other, ids)).mean())


def test_what_was_changed_by_less_than_half_a_step_rounds_away(base: Any) -> None:
    coarse = coarsened(base, "int4")

    def less_than_half(weight: torch.Tensor) -> torch.Tensor:
        sizes, noise = weight.abs(), random_weight(*weight.shape).clamp(-1, 1)
        most = sizes.amax(dim=1, keepdim=True)
        return 0.45 / 7 * most * noise * (sizes < most)

    changed = disturbed(coarse, less_than_half)
    assert distance(coarse, changed) > 0.05
    assert distance(coarse, coarsened(changed, "int4")) < 1e-9
    assert distance(coarse, coarsened(changed, "int8")) > 0.05


def test_what_was_hidden_in_small_numbers_is_pruned_away(base: Any) -> None:
    sparse = coarsened(base, "50% pruned")

    def small(weight: torch.Tensor) -> torch.Tensor:
        least = weight[weight != 0].abs().min()
        hidden = random_weight(*weight.shape).clamp(-1, 1)
        return 0.99 * least * hidden.sign() * (weight == 0)

    changed = disturbed(sparse, small)
    assert distance(sparse, changed) > 0.05
    assert distance(sparse, coarsened(changed, "50% pruned")) < 1e-9
