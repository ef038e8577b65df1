"""How much memory there is: the system's, or a GPU's."""

from __future__ import annotations

import pytest
import torch

from bake.files.memory import available_memory


def test_a_gpus_memory_is_what_is_free_and_what_torch_keeps_unused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert available_memory() > 1 << 20
    numbers = {"is_available": True, "memory_reserved": 700, "memory_allocated": 300}
    for name, number in {**numbers, "mem_get_info": (50, 1000)}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, number=number: number)
    assert available_memory(torch.device("cuda:0")) == available_memory("cuda") == 450
    assert available_memory("cpu") > 1 << 20
