"""Looking inside, from folder to scores: what is hidden late is seen, what was never known not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.verify.attacks.planted import aimed_at, never_taught, overwritten
from verify.attacks.inside.look_inside import ablated, read_off
from verify.audit.attempts import Attempt
from verify.report.measures import Share


def pooled(attempts: list[Attempt], attack: str) -> Share:
    shares = [a.scores.forget["chat"] for a in attempts if a.attack == attack]
    assert len(shares) == 3
    return Share(sum(s.right for s in shares), sum(s.n for s in shares))


@pytest.mark.parametrize("knows", [True, False])
def test_what_only_the_last_layer_hides(tmp_path: Path, knows: bool) -> None:
    target = aimed_at(overwritten() if knows else never_taught(), tmp_path / "folder")
    attempts = read_off(target, {"seeds": [0, 1, 2]})
    for attack in ("inside: logit lens", "inside: linear probe"):
        share = pooled(attempts, attack)
        assert share.n == 120  # every question once
        assert ((share.accuracy or 0) > 0.85) is knows
        assert knows or (share.accuracy or 0) < 0.4
    assert all(a.needs == ("other facts",) and not a.scores.retain for a in attempts)
    assert all(not a.settings for a in attempts)  # one sweep, over seeds
    lens = [a for a in attempts if a.attack == "inside: logit lens"]
    opened = [a.scores.open for a in lens if a.scores.open is not None]
    assert sum(of.n for of in opened) == 40
    assert (sum(of.right for of in opened) > 30) is knows


def test_directions_are_what_the_folder_shows(tmp_path: Path) -> None:
    target = aimed_at(overwritten(), tmp_path / "folder")
    plain = {"directions": 1, "brief": True, "seed": 1}
    assert ablated(target, {"found by": "clamp", **plain}) == []
    held_out = len(target.held(1).questions)
    for by, needs in (("texts", ("other facts", "benign text")), ("base", ("base", "other facts"))):
        (found,) = ablated(target, {"found by": by, **plain})
        assert found.seed == 1 and found.scores.forget["chat"].n == held_out < 120
        assert found.attack == f"inside: ablation by {by}" and found.needs == needs
        assert found.scores.retain["chat"].n > 0
