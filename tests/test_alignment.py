"""Alignment by hand."""

from __future__ import annotations

import pytest

from verify.alignment import alignment, retention


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
