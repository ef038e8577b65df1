"""What every test runs under, and the fixtures that files share."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models gain nothing from more

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import tomli_w
import torch

from tests.verify.engines.kept_workers import end_all, kept_runner

if TYPE_CHECKING:
    from tests.worlds import RecipeWriter

torch.set_num_threads(1)
pytest.register_assert_rewrite("tests.defects", "tests.reports")


@pytest.fixture(autouse=True, scope="session")
def keep_workers() -> Iterator[None]:
    """Confined processes serve one test after the other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("verify.engines.engines.TorchRunner", kept_runner)
        yield
    end_all()


@pytest.fixture
def write_recipe(tmp_path: Path) -> RecipeWriter:
    """Writes a recipe over `base/` and one clamp table per keyword dict."""

    def write(*clamps: dict[str, Any], base: dict[str, Any] | None = None, **extra: Any) -> Path:
        data = {
            "schema": 1,
            "base": {"model": "base", "license": "apache-2.0", **(base or {})},
            "clamp": list(clamps),
            **extra,
        }
        path = tmp_path / "recipe.toml"
        path.write_text(tomli_w.dumps(data))
        return path

    return write


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first, so that no worker is left with it alone at the end."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_collection_finish() -> None:
    """What was imported stays, and is not looked through at every collection of garbage."""
    gc.collect()
    gc.freeze()
