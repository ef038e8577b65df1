"""How close gates are to their other side: against loops, and against what rounding does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bake.rounding import EPSILON, disturbed
from tests.clamps import (
    ORACLE_TABLES,
    SAE_KINDS,
    random_residual,
    save_sae_of_kind,
    sites_of_tables,
)
from tests.worlds import sae_table
from verify.reference.gates import gates_of


@pytest.mark.parametrize("kind", SAE_KINDS)
@pytest.mark.parametrize("method", ["zero", "clamp", "refusal, also"])
def test_a_feature_is_active_where_all_its_gates_are_open(
    kind: str, method: str, tmp_path: Path, write_recipe: Callable[..., Path]
) -> None:
    save_sae_of_kind(kind, tmp_path)
    (site,) = sites_of_tables(write_recipe, {**sae_table("layer_1/sae"), **ORACLE_TABLES[method]})
    h, exempt = random_residual(), torch.zeros(1, 40, dtype=torch.bool)
    exempt[0, 3] = True
    gates = gates_of(h, site, exempt)
    k = len(site.features)
    acts = site.sae.encode(h.double())[..., list(site.features)]
    open_ = (gates.margin > 0).unflatten(-1, (-1, k)).all(dim=-2)
    assert torch.equal(open_[~exempt], (acts > site.clamp.trigger)[~exempt])
    assert open_.any() and not open_.all()
    assert gates.margin[exempt].isinf().all() and gates.margin[~exempt].isfinite().all()


@pytest.mark.parametrize("kind", SAE_KINDS)
def test_the_spread_is_what_one_rounding_does(
    kind: str, tmp_path: Path, write_recipe: Callable[..., Path]
) -> None:
    save_sae_of_kind(kind, tmp_path)
    (site,) = sites_of_tables(write_recipe, {**sae_table("layer_1/sae"), **ORACLE_TABLES["zero"]})
    h, nowhere = random_residual(), torch.zeros(1, 40, dtype=torch.bool)
    before = gates_of(h, site, nowhere)
    shifts = []
    for seed in range(64):
        other = disturbed(h, torch.Generator().manual_seed(seed), EPSILON["float32"])
        shifts.append(gates_of(other, site, nowhere).margin - before.margin)
    measured = torch.stack(shifts).square().mean().sqrt()
    stated = EPSILON["float32"] * before.spread.square().mean().sqrt()
    # A number moves by its spacing, which is up to twice epsilon; the bias's own rounding is added.
    assert 0.5 < measured / stated < 2
