"""A base that was loaded in 16 bits, made float32 in place, is what float32 would have loaded."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.worlds import tiny_config
from verify.compare.upcast import _oracle_in_float32


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_a_base_cast_in_place_is_the_base_in_float32(family: str, tmp_path: Path) -> None:
    config = tiny_config(family)
    config.hidden_size = 40  # whose root no 16-bit number is
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert model.dtype == torch.bfloat16
    ids = torch.arange(6, 30)[None]
    before = model(ids).logits
    wide = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    recipe: Any = SimpleNamespace(base=SimpleNamespace(dtype="auto"))
    hooked: Any = SimpleNamespace(model=model, oracles={"reference": model})
    with _oracle_in_float32(recipe, hooked, "cpu") as cast, torch.no_grad():
        torch.testing.assert_close(cast(ids).logits, wide(ids).logits, rtol=0, atol=1e-6)
    assert model.dtype == torch.bfloat16 and torch.equal(model(ids).logits, before)
