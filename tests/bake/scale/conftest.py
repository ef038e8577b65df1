"""The recipe that workers count for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Else Ray kills workers where something else takes this machine's memory.
os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")

import bake.scale.counting
import bake.scale.parts
from tests.bake.scale.counted import BATCH, SEQ
from tests.worlds import (
    RecipeWriter,
    save_sae_lens,
    tiny_base,
    tiny_sae,
    tiny_tokenizer,
    write_texts,
)


@pytest.fixture
def counted_recipe(
    tmp_path: Path, write_recipe: RecipeWriter, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A recipe over two SAEs and corpora of some twenty of the smallest parts."""
    tiny_tokenizer(tiny_base(tmp_path / "base"))
    tables = []
    for layer in (1, 2):
        save_sae_lens(tmp_path / f"sae{layer}", tiny_sae(layer), layer=layer)
        tables.append({"sae": {"path": f"sae{layer}"}, "method": "zero", "features": "select"})
    write_texts(tmp_path / "forget.jsonl", 80, seed=1)
    write_texts(tmp_path / "retain.jsonl", 60, seed=200)
    monkeypatch.setattr(bake.scale.parts, "PART_TOKENS", 1)
    monkeypatch.setattr(bake.scale.counting, "TEXTS_AT_ONCE", 7)
    return write_recipe(
        *tables,
        select={
            "forget": {"path": "forget.jsonl"},
            "retain": {"path": "retain.jsonl"},
            "by": "ratio",
            "n_features": 8,
            "seq_len": SEQ,
            "n_seqs": 20 * BATCH - 3,
            "seed": 5,
        },
    )
