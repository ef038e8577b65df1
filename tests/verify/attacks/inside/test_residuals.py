"""Residual streams against what transformers itself gives out, and in front of clamps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from bake.stock import decoder_layers, load_model
from tests.folders import make_adapter
from tests.worlds import FAMILIES, tiny_base
from verify.attacks.inside.residuals import at_ends, clamp_of, everywhere

SEQUENCES = [(2, *range(5, 5 + n)) for n in (7, 3, 20, 3, 11)]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_place_is_that_of_each_sequence_alone(tmp_path: Path, family: str) -> None:
    folder = tiny_base(tmp_path / "base", family)
    where = {"pretrained_model_name_or_path": str(folder), "local_files_only": True}
    auto = AutoModelForImageTextToText if family == "gemma3" else AutoModelForCausalLM
    model = load_model(auto, where)
    ends, all_ = at_ends(model, SEQUENCES, 0), everywhere(model, SEQUENCES, 0)
    assert ends.places == all_.places == tuple(f"layer {n}" for n in range(4))
    by_length = sorted(SEQUENCES, key=lambda ids: -len(ids))
    for number, ids in enumerate(SEQUENCES):
        with torch.no_grad():
            states = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
        alone = torch.cat(states[1:-1])  # [3, seq, d]: the last layer's is normed
        torch.testing.assert_close(ends.h[:-1, number], alone[:, -1], rtol=1e-4, atol=1e-4)
        if ids != SEQUENCES[3]:
            start = sum(len(other) - 1 for other in by_length[: by_length.index(ids)])
            found = all_.h[:-1, start : start + len(ids) - 1]
            torch.testing.assert_close(found, alone[:, 1:], rtol=1e-4, atol=1e-4)
    assert all_.h.shape[1] == sum(len(ids) - 1 for ids in SEQUENCES)


def test_what_a_clamp_is_given_is_the_bases(tmp_path: Path) -> None:
    """A checkpoint and an adapter alike; switched off, an adapter shows none."""
    from peft import PeftModel

    import bakeout  # noqa: F401

    folder = make_adapter(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(folder / "base", attn_implementation="eager")
    plain = at_ends(base, SEQUENCES, 0)
    clamped = AutoModelForCausalLM.from_pretrained(folder / "checkpoint", trust_remote_code=False)
    over: Any = PeftModel.from_pretrained(base, str(folder / "adapter")).base_model.model
    for model in (clamped.eval(), over.eval()):
        found = at_ends(model, SEQUENCES, 0)
        assert found.places[1:3] == ("layer 1, before the clamp", "layer 1")
        torch.testing.assert_close(found.h[1], plain.h[1])
        assert (found.h[2] - plain.h[1]).abs().max() > 0.1
    assert clamp_of(decoder_layers(over)[1]) is not None
    clamp_of(decoder_layers(over)[1])._disable_adapters = True
    assert at_ends(over, SEQUENCES, 0).places == plain.places
