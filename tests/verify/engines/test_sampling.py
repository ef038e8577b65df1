"""Draws, and the arguments of generation."""

from __future__ import annotations

import math

import pytest
import torch

from verify.engines.sampling import Chooser, check_prompts

LOGITS = torch.tensor([[0.0, 2.0, 1.0, -1.0], [3.0, 0.0, 0.0, 1.0]])


def drawn(n: int, **how: float) -> torch.Tensor:
    """[n, 2]: draws from both rows."""
    choose = Chooser(True, **{"temperature": 1.0, "seed": 3, **how})  # type: ignore[arg-type]
    return torch.stack([choose(LOGITS) for _ in range(n)])


def shares(tokens: torch.Tensor) -> list[float]:
    return [float((tokens == token).float().mean()) for token in range(4)]


def test_greedy_is_the_likeliest() -> None:
    assert Chooser(False, 1.0)(LOGITS).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draws_follow_the_distribution(temperature: float) -> None:
    tokens = drawn(3000, temperature=temperature)
    for row in range(2):
        weights = [math.exp(float(x) / temperature) for x in LOGITS[row]]
        expected = [weight / sum(weights) for weight in weights]
        assert shares(tokens[:, row]) == pytest.approx(expected, abs=0.03)


def test_top_k_and_top_p_leave_the_likeliest_with_their_proportions() -> None:
    e = math.e
    by_k = shares(drawn(3000, top_k=2)[:, 0])
    assert by_k == pytest.approx([0, e / (e + 1), 1 / (e + 1), 0], abs=0.03)
    # Shares are .64, .24, .09, .03: the first two have .88.
    assert shares(drawn(3000, top_p=0.8)[:, 0]) == pytest.approx(by_k, abs=0.03)
    assert set(drawn(200, top_p=0.6)[:, 0].tolist()) == {1}
    assert set(drawn(200, top_k=1)[:, 1].tolist()) == {0}


def test_seeds() -> None:
    assert torch.equal(drawn(50), drawn(50))
    assert not torch.equal(drawn(50), drawn(50, seed=4))


def test_next_to_no_temperature_is_greedy() -> None:
    assert set(drawn(20, temperature=1e-45)[:, 0].tolist()) == {1}


@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 0.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
    ],
)
def test_what_is_out_of_range(how: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected above 0"):
        drawn(1, **how)


@pytest.mark.parametrize(
    ("ids", "mask", "match"),
    [
        ([[2, 3]], [[1]], r"attention_mask \(1, 1\); expected both \[batch, seq\]"),
        ([2, 3], [1, 1], r"input_ids \(2,\)"),
        ([[]], [[]], "not empty"),
        ([[2, 9]], [[1, 1]], "from 2 to 9; expected 0 to 8"),
        ([[-1, 2]], [[1, 1]], "from -1"),
        ([[2, 0]], [[1, 0]], "padded on the left"),
        ([[2, 0, 3]], [[1, 0, 1]], "holes"),
    ],
)
def test_prompts(ids: list[object], mask: list[object], match: str) -> None:
    check_prompts(torch.tensor([[0, 2]]), torch.tensor([[0, 1]]), 9)
    with pytest.raises(ValueError, match=match):
        check_prompts(torch.tensor(ids), torch.tensor(mask), 9)
