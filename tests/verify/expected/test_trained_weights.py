"""Trained folders that somebody altered, hashes and all: what they must share with their base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bake.recipe import Recipe
from bakeout.verbs.training import distill_into
from tests.folders import distill_world, rehash
from verify.report.findings import VerifyReport
from verify.run import verify_folder

SHARD = "model-00001-of-00001.safetensors"
MATRIX = "model.layers.2.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = distill_world(tmp_path_factory.mktemp("trained"))
    distill_into(folder / "recipe.toml", folder / "npo", method="npo", cache=folder / "cache")
    return folder


def verified(world: Path, folder: Path) -> VerifyReport:
    return verify_folder(folder, Recipe.load(world / "recipe.toml"), frozenset({"integrity"}))


def altered(world: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """The folder with other tensors, listed as they are."""
    folder = tmp_path / "npo"
    shutil.copytree(world / "npo", folder)
    tensors = load_file(folder / SHARD)
    change(tensors)
    save_file(tensors, folder / SHARD, metadata={"format": "pt"})
    rehash(folder)
    return folder


def test_a_sound_one_passes(world: Path) -> None:
    assert verified(world, world / "npo").verdict == "pass"


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite(world: Path, tmp_path: Path, number: float) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[MATRIX][-1, 3] = number

    (failure,) = verified(world, altered(world, tmp_path, change)).failures
    assert f"{MATRIX} holds numbers that are not finite" in failure.what
    assert (failure.kind, failure.engine) == ("integrity", "npo")


def test_another_dtype(world: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[MATRIX] = tensors[MATRIX].half()

    failures = verified(world, altered(world, tmp_path, change)).failures
    assert any(f"{MATRIX} is F16" in failure.what for failure in failures)


def test_another_shape(world: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[MATRIX] = tensors[MATRIX][:, :-1].contiguous()

    failures = verified(world, altered(world, tmp_path, change)).failures
    assert any(f"{MATRIX} is F32" in failure.what for failure in failures)


def test_a_tensor_more_or_less(world: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.2.extra"] = tensors.pop(MATRIX)

    assert verified(world, altered(world, tmp_path, change)).verdict == "fail"


@pytest.mark.parametrize(
    ("key", "value"),
    [("rms_norm_eps", 1e-3), ("final_logit_softcapping", 1.0), ("hidden_activation", "relu")],
)
def test_another_config(world: Path, tmp_path: Path, key: str, value: object) -> None:
    folder = tmp_path / "npo"
    shutil.copytree(world / "npo", folder)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {key: value}))
    rehash(folder)
    failures = verified(world, folder).failures
    assert [failure.what for failure in failures if f"config.json: {key}" in failure.what]


def test_a_graph_or_witnesses_in_it(world: Path, tmp_path: Path) -> None:
    for name in ("model.onnx", "witnesses.npz"):
        folder = tmp_path / name
        shutil.copytree(world / "npo", folder)
        (folder / name).write_bytes(b"anything")
        rehash(folder, name)
        (failure,) = verified(world, folder).failures
        assert f"{name}: bakeout writes no such file" in failure.what
