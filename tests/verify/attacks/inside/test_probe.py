"""The probe against refitting by plain algebra; it finds what is there, and nothing else."""

from __future__ import annotations

import numpy as np
import torch

from verify.attacks.inside.probe import PENALTY, left_out, probe


def random_rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def classes_of(n: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 4, (n,), generator=torch.Generator().manual_seed(seed))


def plainly(x: np.ndarray, classes: np.ndarray, asked: np.ndarray, penalised_as: int) -> np.ndarray:
    """Normal equations with a free offset, the penalty of so many rows; x is scaled already."""
    y = np.eye(4)[classes]
    mean, offset = x.mean(axis=0), y.mean(axis=0)
    centred = x - mean
    gram = centred.T @ centred + PENALTY * penalised_as * np.eye(x.shape[1])
    weights = np.linalg.solve(gram, centred.T @ (y - offset))
    return ((asked - mean) @ weights + offset).argmax(axis=-1)


def scaled(h: torch.Tensor) -> np.ndarray:
    x = h.double().numpy()
    return (x - x.mean(axis=0)) / x.std(axis=0)


def test_it_is_ridge_regression() -> None:
    h, classes, asked = random_rows(30, 12), classes_of(30), random_rows(9, 12, seed=5)
    x = h.double().numpy()
    there = (asked.double().numpy() - x.mean(axis=0)) / x.std(axis=0)
    expected = plainly(scaled(h), classes.numpy(), there, 30)
    found = probe(h[None], classes, asked[None])
    assert found.place == 0
    np.testing.assert_array_equal(found.chosen.numpy(), expected)


def test_a_row_left_out_is_one_that_was_never_seen() -> None:
    h, classes = random_rows(25, 40), classes_of(25)
    x = scaled(h)
    expected = [
        plainly(np.delete(x, i, axis=0), np.delete(classes.numpy(), i), x[i : i + 1], 25)[0]
        for i in range(25)
    ]
    np.testing.assert_array_equal(left_out(h, classes).numpy(), expected)


def test_it_reads_where_the_answer_is_and_finds_nothing_where_none_is() -> None:
    known, asked = random_rows(3, 120, 50), random_rows(3, 80, 50, seed=2)
    classes, right = classes_of(120), classes_of(80, seed=3)
    nothing = probe(known, classes, asked)
    assert (nothing.chosen == right).float().mean() < 0.4
    directions = random_rows(4, 50, seed=4)
    known[1] += directions[classes]
    asked[1] += directions[right]
    found = probe(known, classes, asked)
    assert found.place == 1
    assert (found.chosen == right).float().mean() > 0.95


def test_a_channel_that_says_the_same_of_all_is_no_trouble() -> None:
    h, classes = random_rows(20, 8), classes_of(20)
    flat = torch.cat([h, torch.full((20, 2), 7.0)], dim=1)
    assert torch.equal(left_out(flat, classes), left_out(h, classes))
