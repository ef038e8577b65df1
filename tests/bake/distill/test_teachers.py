"""What teachers say: kept outputs against a forward of the whole clamped model."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import bake.distill.teachers as teachers
from bake.base import find_base
from bake.clamp import ClampWeights, load_clamps
from bake.distill.distill_texts import Rows
from bake.distill.objectives import mean_kl
from bake.distill.teachers import Teacher, clamp_sha256, clamped, head_of, read, teach
from bake.recipe import Recipe
from bake.stock import load_base
from tests.folders import baked_world
from tests.insertion import insert

ROWS = Rows(tuple((2, *range(5 + n, 40 + 3 * n, 2)) for n in range(12)))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[ClampWeights]]:
    folder = baked_world(tmp_path_factory.mktemp("teachers"), [1, 5, 9])
    recipe = Recipe.load(folder / "recipe.toml")
    return load_base(recipe, dtype="float32"), load_clamps(recipe, find_base(recipe))


def taught(world: tuple[Any, list[ClampWeights]], cache: Path, *, clamp: bool = True) -> Teacher:
    model, clamps = world
    return teach(
        model, clamps if clamp else [], ROWS, range(12), [1, 2], cache=cache, about={"model": "x"}
    )


@torch.no_grad()
def direct(model: Any, row: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(logits, output of layer 2) of one row alone."""
    found = model(input_ids=torch.tensor([row]), output_hidden_states=True, use_cache=False)
    return found.logits[0], found.hidden_states[3][0]


def test_the_clamped_teacher_is_the_clamped_model(
    world: tuple[Any, list[ClampWeights]], tmp_path: Path
) -> None:
    model, clamps = world
    teacher = taught(world, tmp_path)
    product = insert(model, clamps)
    moved = 0
    for number in (0, 7, 11):
        logits, hidden = direct(product, ROWS.ids[number])
        seen = teacher.seen([number])
        found = head_of(model)(seen.final)
        kl = (logits.softmax(-1) * (logits.log_softmax(-1) - found.log_softmax(-1))).sum(-1)
        assert float(kl.mean()) < 1e-3  # bfloat16
        torch.testing.assert_close(seen.hidden[2], hidden, rtol=2e-2, atol=2e-2)
        base, _ = direct(model, ROWS.ids[number])
        moved += int(((base - logits).abs().amax(-1) > 0.1).sum())
    assert moved > 10


def test_kl_to_a_kept_teacher_is_that_to_the_teacher(
    world: tuple[Any, list[ClampWeights]], tmp_path: Path
) -> None:
    model, clamps = world
    ids, real = ROWS.padded()
    with torch.no_grad():
        base = read(model, ids, real, [])
        with clamped(model, clamps) as tell:
            tell(ids, real)
            live = read(model, ids, real, [])
    kept = taught(world, tmp_path).seen(range(12))
    head = head_of(model)
    now, then = (float(mean_kl(of.final, head, base.final, head)) for of in (live, kept))
    assert now > 0.01 and then == pytest.approx(now, rel=0.02)


def test_outside_the_block_no_clamp_acts(world: tuple[Any, list[ClampWeights]]) -> None:
    model, clamps = world
    ids, real = ROWS.padded()
    before = read(model, ids, real, [1]).hidden[1]
    with clamped(model, clamps):
        pass
    assert torch.equal(before, read(model, ids, real, [1]).hidden[1])


def test_rows_are_found_again_whatever_is_asked_together(
    world: tuple[Any, list[ClampWeights]], tmp_path: Path
) -> None:
    teacher = taught(world, tmp_path)
    both = teacher.seen([9, 2])
    alone = [teacher.seen([n]) for n in (9, 2)]
    assert torch.equal(both.final, torch.cat([of.final for of in alone]))
    assert len(alone[0].final) == len(ROWS.ids[9])


def test_what_was_kept_is_not_run_again(
    world: tuple[Any, list[ClampWeights]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = taught(world, tmp_path).seen([3])
    other = taught(world, tmp_path, clamp=False).seen([3])
    assert not torch.equal(first.final, other.final)
    monkeypatch.setattr(teachers, "read", None)
    assert torch.equal(taught(world, tmp_path).seen([3]).final, first.final)
    kept = sorted(tmp_path.rglob("*.safetensors"))
    assert len(kept) == 2 and len([*tmp_path.rglob("*.bits")]) == 0
    with safe_open(kept[0], framework="pt") as file:
        assert file.get_tensor("final").dtype == torch.bfloat16
    kept[0].write_bytes(b"half")
    kept[1].write_bytes(b"half")
    with pytest.raises(TypeError):  # damaged: it would be run again
        taught(world, tmp_path)


def test_a_clamp_has_a_hash_of_its_own(world: tuple[Any, list[ClampWeights]]) -> None:
    _, (clamp,) = world
    digest = clamp_sha256(clamp)
    assert len(digest) == len(hashlib.sha256().hexdigest())
    clamp.rows.value[0] += 1
    assert clamp_sha256(clamp) != digest
    clamp.rows.value[0] -= 1
    assert clamp_sha256(clamp) == digest
