"""A streamed model's layers run on the device that it is given, and what they give comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bake.modeling_clamped_gemma import SAEClamp
from export import streamed
from export.clamped import open_clamped
from export.streamed import StreamedModel
from tests.folders import baked_world

DEVICE = "lazy"
"""Of it only places and shapes are computed, no numbers, which needs no such device; and torch
refuses tensors of it and of the CPU together, as it does a GPU's."""


def test_all_that_is_computed_with_lies_on_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clamped = open_clamped(baked_world(tmp_path, [1, 5, 9], n_texts=4) / "checkpoint")
    moved = torch.nn.Module.to

    def rows(self: Any, input_ids: torch.Tensor) -> torch.Tensor:  # which rows, nobody knows
        assert input_ids.device.type == DEVICE
        return torch.empty(*input_ids.shape, 32, device=DEVICE)

    monkeypatch.setattr(streamed._Table, "forward", rows)
    monkeypatch.setattr(SAEClamp, "look", lambda _: True)  # nor whether a number is one
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(
        torch.nn.Module, "to", lambda of, where: of if where == "meta" else moved(of, where)
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = StreamedModel(clamped, DEVICE)
        ids = torch.zeros(3, 9, dtype=torch.long)
        mask, places = torch.ones_like(ids), torch.tensor([[0, 8], [1, 8]])
        with pytest.raises(RuntimeError, match="same device"):
            torch.empty(3, device=DEVICE) + torch.empty(3)
        run = model.run(ids, mask, places)
        (read,) = run.read.values()
        assert read.shape == (3, 9, 32) and run.logits.shape == (2, 99)
        found = [run.logits, read, *run.moved.values(), *run.active.values()]
        found += [*run.margins, *run.edges, *model.run_disturbed(ids, mask, places)]
        assert len(found) == 8 and {of.device.type for of in found} == {"cpu"}
