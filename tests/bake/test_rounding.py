from __future__ import annotations

import math

import pytest
import torch

from bake.rounding import EPSILON, disturbed, disturbed_part, epsilon_of, load_word


def draw(h: torch.Tensor, seed: int = 0, epsilon: float | None = None) -> torch.Tensor:
    size = epsilon_of(h.dtype) if epsilon is None else epsilon
    return disturbed(h, torch.Generator().manual_seed(seed), size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_number_moves_to_the_next_one(dtype: torch.dtype) -> None:
    h = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    moved = draw(h)
    assert moved.dtype == dtype and moved.shape == h.shape
    up = torch.nextafter(h, torch.full_like(h, torch.inf))
    down = torch.nextafter(h, torch.full_like(h, -torch.inf))
    assert ((moved == up) | (moved == down) | (moved == h)).all()
    assert (moved != h).float().mean() > 0.95  # all but powers of two
    assert 0.4 < (moved > h).float().mean() < 0.6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 64), (3, 7, 11), (1,)])
def test_every_number_is_multiplied_exactly_and_rounded_once(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    h = (torch.randn(*shape, generator=torch.Generator().manual_seed(2)) * 100).to(dtype)
    for epsilon in {epsilon_of(dtype), EPSILON["int8"], EPSILON["int4"]}:
        moved = draw(h, epsilon=epsilon)
        up, down = ((h.double() * (1 + sign * epsilon)).to(dtype) for sign in (1, -1))
        assert ((moved == up) | (moved == down)).all()
        assert moved.shape == h.shape


def test_signs_are_even_wherever_a_number_stands() -> None:
    up = (draw(torch.ones(3001, 8), epsilon=EPSILON["int4"]) > 1).float()
    assert (up.mean(dim=0) - 0.5).abs().max() < 0.05
    assert (up.T.corrcoef() - torch.eye(8)).abs().max() < 0.08  # nor do neighbours move together
    assert 0.4 < (up[1:] == up[:-1]).float().mean() < 0.6


def test_a_seed_gives_the_same_and_another_one_does_not() -> None:
    h = torch.randn(8, 8)
    assert torch.equal(draw(h), draw(h)) and not torch.equal(draw(h), draw(h, seed=1))
    assert torch.equal(draw(torch.zeros(3)), torch.zeros(3))


def test_an_activation_keeps_of_a_number_far_below_0_how_its_sum_was_rounded() -> None:
    from transformers.activations import ACT2FN

    act = ACT2FN["gelu_pytorch_tanh"]
    x = torch.linspace(-6, -2, 400)
    y, exact = act(x), torch.nn.functional.gelu(x.double(), approximate="tanh").float()
    draws = torch.Generator().manual_seed(0)
    moved = disturbed_part(act, x, y, draws, EPSILON["float32"])
    allowed = 2 * EPSILON["float32"] * (x.abs() / 2 + y.abs()) * 1.01  # to the next number
    assert ((moved - y).abs() <= allowed).all() and ((moved - y).abs() > allowed / 4).any()
    # As large as what the processor itself was off by; one rounding of y is not.
    assert (y - exact).abs().max() > 10 * EPSILON["float32"] * y[x < -4].abs().max()
    assert (y - exact).abs().max() <= 8 * (moved - y).abs().max()


def test_of_a_matrix_it_is_one_rounding_of_what_it_gives() -> None:
    h = torch.randn(5, 8)
    part = torch.nn.Linear(8, 8)
    found = disturbed_part(part, h, h + 1, torch.Generator().manual_seed(0), EPSILON["float32"])
    assert torch.equal(found, draw(h + 1))


def test_larger_roundings_are_larger() -> None:
    h = torch.randn(1000)
    shift = (draw(h, epsilon=EPSILON["int8"]) - h).abs() / h.abs()
    assert shift.min() > 0.99 * EPSILON["int8"] and shift.max() < 1.01 * EPSILON["int8"]


def test_sizes_are_those_of_the_formats() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert epsilon_of(dtype) == torch.finfo(dtype).eps / 2
    assert epsilon_of("float16") == EPSILON["float16"]


@pytest.mark.parametrize(
    ("to_hook", "to_base", "effect", "word"),
    [
        (1e-12, 0.9, 1.0, "same"),
        (0.01, 0.9, 0.98, "rounds"),
        (0.3, 0.3001, 0.9, "rounds"),  # a clamp that does little, beside coarse weights
        (0.3, 0.2, 0.9, "rounds"),
        (0.9, 0.01, 0.02, "silently base-like"),
        (1.1, 0.4, -0.3, "silently base-like"),
        (12.8, 13.1, 0.4, "breaks loudly"),
        (13.1, 12.8, -2.0, "breaks loudly"),
        (math.nan, math.nan, math.nan, "breaks loudly"),
        (math.inf, 0.1, math.nan, "breaks loudly"),
    ],
)
def test_the_word_for_a_load(to_hook: float, to_base: float, effect: float, word: str) -> None:
    assert load_word(to_hook, to_base, effect) == word
