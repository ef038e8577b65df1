"""How far a verification is, and how much of it fits into a budget."""

from __future__ import annotations

from pathlib import Path

import pytest

from bake.recipe import Recipe
from tests.engines import InProcess
from tests.folders import baked_world
from verify.material import FEWEST, evenly
from verify.options import Options
from verify.pace import MOST_PARTS, Pace, parts_within
from verify.run import verify_folder

KINDS = frozenset({"integrity", "parity", "loss", "completions"})


def test_progress_is_of_everything_and_never_falls() -> None:
    told: list[tuple[str, float]] = []
    pace = Pace(lambda stage, share: told.append((stage, share)), {"a": 10, "b": 0, "c": 30})
    for stage, share in [("load", 0.7), ("a", 0.5), ("a", 1), ("b", 1), ("a", 0), ("c", 0.5)]:
        pace(stage, share)
    assert [share for _, share in told] == [0, 0.125, 0.25, 0.25, 0.25, 0.625]
    assert [stage for stage, _ in told] == ["load", "a", "a", "b", "a", "c"]


def test_parts_are_the_fewest_that_fit() -> None:
    assert parts_within(10, 600 * 50, 50) == 1
    assert parts_within(10, 600 * 50 + 1, 50) == 2
    assert parts_within(10, 600 * 50 * 7, 50) == 8
    assert parts_within(0.1, 1e12, 50) == parts_within(0.1, 1, 0) == MOST_PARTS


def test_what_is_left_is_spread_evenly_and_never_too_few() -> None:
    assert evenly(range(64), 4) == list(range(0, 64, 4))
    assert evenly(range(5), 4) == list(range(5))
    for n in (9, 17, 100):
        for one_in in (2, 4, 8, 64):
            assert len(evenly(range(n), one_in)) >= FEWEST


def test_a_budget_asks_less_and_the_report_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("verify.engines.engines.TorchRunner", InProcess)
    work = baked_world(tmp_path, [1, 5, 9], n_texts=40)
    recipe = Recipe.load(work / "recipe.toml")
    stages: list[tuple[str, float]] = []
    whole = verify_folder(
        work / "checkpoint", recipe, KINDS, lambda *found: stages.append(found), Options()
    )
    shares = [share for stage, share in stages if stage in ("compare", "completions")]
    assert shares == sorted(shares) and 0 < shares[0] < 1 and shares[-1] == pytest.approx(1)
    monkeypatch.setattr("verify.gather.tokens_per_second", lambda *_: 1e-6)
    some = verify_folder(work / "checkpoint", recipe, KINDS, options=Options(minutes=1))
    assert whole.items is not None and some.items is not None
    assert (whole.items.one_in, some.items.one_in) == (1, MOST_PARTS)
    assert FEWEST <= some.items.text_tokens < whole.items.text_tokens
    assert some.verdict == whole.verdict == "pass"
    assert any("budget of 1 minutes" in warning for warning in some.warnings)
    assert some.to_dict()["items"]["one_in"] == MOST_PARTS
