"""A small sweep, and what must be the same whoever measures it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.worlds import (
    RecipeWriter,
    save_sae_lens,
    tiny_base,
    tiny_sae,
    tiny_tokenizer,
    write_corpora,
)

GRID = ["--grid", "n_features=2,4", "--grid", "value=-3,-9", "--grid", "layer=1,2"]
AXES: dict[str, list[Any]] = {"layer": [1, 2], "n_features": [2, 4], "value": [-3.0, -9.0]}
"""The same, as `parse_grid` gives it: 8 points."""
TABLE: dict[str, Any] = {
    "sae": {"path": "layer_1"},
    "hook_point": "blocks.1.hook_resid_post",
    "method": "clamp",
    "features": "select",
    "value": -6.0,
}


def write_swept_recipe(folder: Path, write_recipe: RecipeWriter) -> Path:
    tiny_tokenizer(tiny_base(folder / "base"))
    for layer in (1, 2):
        save_sae_lens(folder / f"layer_{layer}", tiny_sae(layer), layer=layer)
    write_corpora(folder)
    select = {
        "forget": {"path": "forget.jsonl"},
        "retain": {"path": "retain.jsonl"},
        "retain_threshold": 0.3,
        "n_features": 4,
        "seq_len": 24,
        "n_seqs": 20,
    }
    verify = {
        "forget_questions": {"path": "forget_questions.jsonl"},
        "retain_questions": {"path": "retain_questions.jsonl"},
        "text": {"path": "text.jsonl"},
    }
    return write_recipe(TABLE, select=select, verify=verify)


def without_times(report: dict[str, Any]) -> dict[str, Any]:
    """A sweep's report. Changes it."""
    for point in report["validation"]["points"]:
        assert point.pop("seconds") >= 0
    return report
