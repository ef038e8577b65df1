"""The recipe that sweeps are tried on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bake.swept import write_swept_recipe
from tests.worlds import RecipeWriter


@pytest.fixture
def swept_recipe(
    tmp_path: Path, write_recipe: RecipeWriter, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A recipe over two layers, whose sweep `GRID` has eight points."""
    monkeypatch.setenv("BAKEOUT_CACHE", str(tmp_path / "cache"))
    return write_swept_recipe(tmp_path, write_recipe)
