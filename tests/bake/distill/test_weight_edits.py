"""Closed forms: against numpy's least squares, and what they move."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import bake.distill.weight_edits as weight_edits
from bake.base import find_base
from bake.clamp import load_clamps
from bake.distill.distill_texts import Rows
from bake.distill.teachers import clamped, read, teach
from bake.distill.weight_edits import Lesson, edit_features, fit_outputs, ridge_solution
from bake.recipe import Recipe
from bake.stock import decoder_layers, load_base
from tests.folders import STOCK_TEXT_CLASSES, distill_world
from tests.worlds import save_sae_lens, tiny_base, tiny_sae

FORGET = Rows(tuple((2, *range(5 + n, 40 + 3 * n, 2)) for n in range(12)))


def test_ridge_is_least_squares_with_more_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_edits, "RIDGE", 0.1)
    rng = np.random.default_rng(0)
    z, y, W = rng.normal(size=(50, 7)), rng.normal(size=(50, 4)), rng.normal(size=(4, 7))
    root = np.sqrt(0.1 * (z**2).sum(0).mean())
    rows, targets = np.vstack([z, root * np.eye(7)]), np.vstack([y, root * W.T])
    expected = np.linalg.lstsq(rows, targets, rcond=None)[0].T
    found = ridge_solution(*(torch.from_numpy(a) for a in (z.T @ z, y.T @ z, W)))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)


def test_nothing_to_change_changes_nothing() -> None:
    z, W = torch.randn(50, 7, dtype=torch.float64), torch.randn(4, 7, dtype=torch.float64)
    found = ridge_solution(z.T @ z, W @ z.T @ z, W)
    torch.testing.assert_close(found, W)


@pytest.mark.parametrize("family", STOCK_TEXT_CLASSES)
def test_the_stream_comes_nearer_to_its_teacher(tmp_path: Path, family: str) -> None:
    tiny_base(tmp_path / "base", family)
    save_sae_lens(tmp_path / "sae", tiny_sae())
    clamp = {"sae": {"path": "sae"}, "method": "clamp", "features": [1, 5, 9], "value": -6.0}
    data = {"schema": 1, "base": {"model": "base"}, "clamp": [clamp]}
    recipe = Recipe.parse(data, name="test", folder=tmp_path)
    clamps = load_clamps(recipe, find_base(recipe))
    model = load_base(recipe, dtype="float32")
    layers = [1, 2]
    teacher = teach(
        model, clamps, FORGET, range(12), layers, cache=tmp_path / "cache", about={"model": "x"}
    )
    wanted = teacher.seen(range(12)).hidden
    ids, real = FORGET.padded()
    untouched = {name: t.clone() for name, t in model.state_dict().items()}

    def distance() -> dict[int, float]:
        with torch.no_grad():
            found = read(model, ids, real, layers).hidden
        return {layer: float((found[layer] - wanted[layer]).square().mean()) for layer in layers}

    before = distance()
    fit_outputs(model, layers, [Lesson(FORGET, range(12), teacher)])
    after = distance()
    assert all(after[layer] < before[layer] for layer in layers)
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, untouched[n])}
    assert changed == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in layers}


@pytest.mark.parametrize("strength", [0.0, 2.0])
def test_features_are_taken_out_of_the_neurons_that_write_them(
    tmp_path: Path, strength: float
) -> None:
    recipe = Recipe.load(distill_world(tmp_path) / "recipe.toml")
    clamps = load_clamps(recipe, find_base(recipe))
    model = load_base(recipe, dtype="float32")
    layer = decoder_layers(model)[1]
    down = layer.mlp.down_proj.weight
    gain = 1 + layer.post_feedforward_layernorm.weight.detach().numpy()
    before = down.detach().numpy().copy()
    n = edit_features(model, [1], clamps, strength=strength, size=8.0)
    after, rows = down.detach().numpy(), clamps[0].tensors
    n_changed = 0
    for neuron in range(before.shape[1]):
        written = before[:, neuron] * gain
        unit = 8.0 * written / np.linalg.norm(written)
        expected = unit.copy()
        for sign in (1, -1):
            pre = sign * unit @ rows["W_enc"] + rows["b_enc"]
            for feature, a in enumerate(pre):
                if a > max(rows["theta"][feature], 0):
                    expected += sign * (-strength * a - a) * rows["W_dec"][feature]
        found = after[:, neuron] * gain * 8.0 / np.linalg.norm(written)
        np.testing.assert_allclose(found, expected, atol=1e-4)
        n_changed += bool(np.abs(expected - unit).max() > 0)
    assert n == n_changed > 0


def test_what_fires_nowhere_is_left_alone(tmp_path: Path) -> None:
    recipe = Recipe.load(distill_world(tmp_path) / "recipe.toml")
    clamp = recipe.clamp[0].model_copy(update={"trigger": 1e6})
    quiet = recipe.with_clamps([clamp])
    model = load_base(recipe, dtype="float32")
    clamps = load_clamps(quiet, find_base(quiet))
    assert edit_features(model, [0, 1, 2], clamps, strength=1.0, size=8.0) == 0
    ids, real = FORGET.padded()
    with torch.no_grad(), clamped(model, clamps) as tell:
        tell(ids, real)
        same = read(model, ids, real, []).final
    assert torch.equal(same, read(model, ids, real, []).final)
