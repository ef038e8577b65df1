"""The folder that defects are planted in."""

from __future__ import annotations

from pathlib import Path

import pytest

from export.carriers.onnx.onnx_folder import export_onnx
from tests.defects import REFUSAL_TABLE, bake_tables
from tests.worlds import (
    save_gemma_scope,
    save_sae_lens,
    tiny_base,
    tiny_sae,
    tiny_tokenizer,
    write_questions,
    write_texts,
)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, SAEs, questions and text."""
    folder = tmp_path_factory.mktemp("work")
    for family in ("gemma", "gemma2", "gemma3_text"):
        tiny_tokenizer(tiny_base(folder / family, family))
    save_sae_lens(folder / "sae", tiny_sae())
    save_gemma_scope(folder / "layer_2", tiny_sae(1))
    write_questions(folder / "forget.jsonl", 4, seed=1)
    write_questions(folder / "retain.jsonl", 3, seed=2)
    write_texts(folder / "text.jsonl", 4)
    bake_tables(folder, "sound", [REFUSAL_TABLE])
    export_onnx(folder / "sound")
    return folder
