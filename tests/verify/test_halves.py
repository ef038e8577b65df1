"""A verification for which memory runs out ends with the same report, but for rounding."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bake.errors import RanOutError
from bake.recipe import Recipe
from tests.engines import InProcess
from tests.folders import baked_world
from tests.worlds import notes, room_for
from verify.run import verify_folder

SAMPLED = ("rounding", "errors")
"""What is told in roundings of the reference, whose draws are others in halves."""


def numbers_of(found: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of JSON data by its path."""
    if isinstance(found, dict | list):
        for name, of in found.items() if isinstance(found, dict) else enumerate(found):
            if name not in SAMPLED:
                yield from numbers_of(of, f"{path}/{name}")
    else:
        yield path, found


def test_a_whole_verification_in_halves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("verify.engines.engines.TorchRunner", InProcess)
    work = baked_world(tmp_path, [1, 5, 9], n_texts=4)
    recipe = Recipe.load(work / "recipe.toml")

    def verified() -> dict[str, Any]:
        return dict(numbers_of(verify_folder(work / "checkpoint", recipe).to_dict()))

    whole = verified()
    assert notes(capsys) == []
    with room_for(400, layer=3) as asked:
        halved = verified()
    assert len([n for n in asked if n <= 400]) > 300
    said = " ".join(notes(capsys))
    for what in ("reading prompts", "checkpoint: decoded", "reading trees"):
        assert f"note: {what}: memory ran out at " in said
    assert "/fit/0/fit/variance_explained" in whole and whole["/verdict"] == "pass"
    assert "/controls/3/name" in whole
    assert halved.keys() == whole.keys()
    for path, of in whole.items():
        near = isinstance(of, float)
        assert halved[path] == (pytest.approx(of, rel=1e-3, abs=1e-6) if near else of), path
    with (
        room_for(5, layer=3),
        pytest.raises(
            RanOutError, match=r"^reading prompts: memory ran out at one alone \(CUDA out of"
        ),
    ):
        verified()
