from __future__ import annotations

import math

import pytest

from verify.intervals import wilson

Z = 1.959964


@pytest.mark.parametrize(("right", "n"), [(0, 10), (1, 10), (35, 120), (119, 120), (7, 7)])
def test_the_ends_are_where_the_score_test_just_rejects(right: int, n: int) -> None:
    low, high = wilson(right, n)
    share = right / n
    assert 0 <= low <= share <= high <= 1
    for end in (low, high):
        if 0 < end < 1:
            # The definition: the measured share is z standard errors from the end.
            assert abs(share - end) == pytest.approx(Z * math.sqrt(end * (1 - end) / n), rel=1e-6)
    assert wilson(n - right, n) == pytest.approx((1 - high, 1 - low))


def test_more_questions_narrow_it_and_none_leave_it_open() -> None:
    widths = [high - low for low, high in (wilson(n // 4, n) for n in (8, 80, 800))]
    assert widths == sorted(widths, reverse=True)
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("right", "n"), [(-1, 4), (5, 4)])
def test_a_count_out_of_range(right: int, n: int) -> None:
    with pytest.raises(ValueError, match="expected 0 to 4"):
        wilson(right, n)
