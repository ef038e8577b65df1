"""Compiled clamps, every feature of which is tried."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from bake.recipe import Recipe
from bake.stock import load_base, load_tokenizer
from bakeout.verbs.exporting import export_compiled
from tests.defects import REFUSAL_TABLE, bake_tables
from tests.worlds import (
    room_for,
    save_sae_lens,
    tiny_base,
    tiny_sae,
    tiny_tokenizer,
    write_questions,
    write_texts,
)
from verify.compare import feature_trial
from verify.compare.feature_trial import trial_failures
from verify.hooked import Hooked
from verify.material import load_material
from verify.reference.whole_sae import load_sites

DIVISOR = 64.0
LAYERS = "model-compiled-layers.safetensors"
Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recipe, Hooked]:
    """A folder with `float32/` and `bfloat16/`, their recipe, and its base."""
    folder = tmp_path_factory.mktemp("world")
    tiny_tokenizer(tiny_base(folder / "gemma2"))
    save_sae_lens(folder / "sae", tiny_sae())
    write_questions(folder / "forget.jsonl", 4, seed=1)
    write_questions(folder / "retain.jsonl", 3, seed=2)
    write_texts(folder / "text.jsonl", 4)
    bake_tables(folder, "layer", [REFUSAL_TABLE])
    for dtype in ("float32", "bfloat16"):
        export_compiled(folder / "layer", folder / dtype, dtype=dtype, pad=None, force=False)
    recipe = Recipe.load(folder / "layer.toml")
    material = load_material(recipe, load_tokenizer(recipe))
    return folder, recipe, Hooked(load_base(recipe), load_sites(recipe), {}, material)


def neurons(tensors: Tensors, layer: int) -> list[int]:
    """Of an added layer, those that do something."""
    down = tensors[f"model.layers.{layer}.mlp.down_proj.weight"]
    return [int(n) for n in np.flatnonzero(down.any(axis=0))]


def cut(layer: int, which: int) -> Callable[[Tensors], None]:
    """One neuron writes nothing."""

    def change(tensors: Tensors) -> None:
        down = tensors[f"model.layers.{layer}.mlp.down_proj.weight"]
        down[:, neurons(tensors, layer)[which]] = 0

    return change


def no_divisor(tensors: Tensors) -> None:
    """The last of several triggers is not counted."""
    down = tensors["model.layers.3.mlp.down_proj.weight"]
    down[:, np.flatnonzero(down.max(axis=0) == DIVISOR)[-1]] = 0


def never_on(tensors: Tensors) -> None:
    """One flag's neuron holds it off, whatever comes."""
    gates = tensors["model.layers.2.mlp.gate_proj.weight"]
    gates[neurons(tensors, 2)[4]] = gates[neurons(tensors, 2)[0]] * 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sound_one_does_what_the_sae_says(world: tuple[Path, Recipe, Hooked], dtype: str) -> None:
    folder, recipe, hooked = world
    assert list(trial_failures(folder / dtype, recipe, hooked)) == []
    streams = feature_trial._streams(hooked)
    with room_for(250, layer=3) as asked:
        halved = feature_trial._streams(hooked)
    assert len([n for n in asked if n <= 250]) >= 1 < len(asked)
    for layer, h in streams.items():
        assert len(h) == feature_trial.TOKENS
        torch.testing.assert_close(halved[layer][:9], h[:9], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [cut(2, 3), cut(2, 6), cut(3, 0), cut(3, 5), no_divisor, never_on],
    ids=["a flag", "another flag", "an action", "another action", "a divisor", "a feature off"],
)
def test_a_neuron_that_is_cut_is_seen(
    world: tuple[Path, Recipe, Hooked], tmp_path: Path, change: Callable[[Tensors], None]
) -> None:
    folder, recipe, hooked = world
    altered = shutil.copytree(folder / "float32", tmp_path / "altered")
    tensors = {name: array.copy() for name, array in load_file(altered / LAYERS).items()}
    change(tensors)
    save_file(tensors, altered / LAYERS, metadata={"format": "pt"})
    found = list(trial_failures(altered, recipe, hooked))
    assert found and {(f.kind, f.engine) for f in found} == {("parity", "compiled")}
