"""Alignment by hand."""

from __future__ import annotations

import pytest

from bake.questions.alignment import alignment, retention


def test_retention_is_what_is_left_above_chance() -> None:
    assert retention(0.75, 0.75) == 1.0
    assert retention(0.5, 0.75) == pytest.approx(0.5)
    assert retention(0.9, 0.75) == 1.0
    assert retention(0.2, 0.75) == pytest.approx(2e-6)
    assert retention(0.2, 0.2) == 1.0


def test_alignment_by_hand() -> None:
    assert alignment(0.25, 0.75, 0.75, 0.75) == pytest.approx(1.0, abs=1e-5)
    assert alignment(0.75, 0.75, 0.75, 0.75) == 0.0
    assert alignment(0.5, 0.75, 0.5, 0.75) == pytest.approx(0.5 * 0.5)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        # gemma-2-2b with the refusal clamp: (forget, retained), as Shportko et al. report it.
        ((0.5860, 0.574), (0.2718, 0.535), 0.8226),
        ((0.9, 0.9), (0.1, 0.9), 1.0),  # worse than chance is no better than it
        ((0.9, 0.8), (0.25, 0.9), 1.0),  # nor is better than before
        ((0.9, 0.8), (0.25, 0.25), 0.0),
        ((0.2, 0.8), (0.2, 0.8), 0.0),  # nothing there to forget
    ],
)
def test_alignment_at_its_ends(
    before: tuple[float, float], after: tuple[float, float], expected: float
) -> None:
    found = alignment(after[0], before[0], after[1], before[1])
    assert found == pytest.approx(expected, abs=1e-3)
