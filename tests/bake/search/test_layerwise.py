"""A model's first layers, one at a time, against the whole model in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from bake.base import open_base
from bake.errors import ModelError, RanOutError
from bake.families import FAMILIES
from bake.search.layerwise import layer_outputs, table_rows
from tests.worlds import KINDS, VOCAB, notes, room_for, tiny_base


def some_ids() -> torch.Tensor:
    ids = torch.randint(6, VOCAB - 4, (3, 40), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 2
    return ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_layers_give_what_the_whole_model_gives(tmp_path: Path, kind: str, dtype: str) -> None:
    folder = tiny_base(tmp_path / "base", kind, seed=1, shards=3, dtype=dtype)
    model_class = getattr(transformers, FAMILIES[kind.partition(",")[0]].architecture)
    model = model_class.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    ids = some_ids()
    with torch.no_grad():
        states = model.get_decoder()(input_ids=ids, output_hidden_states=True).hidden_states
    found = layer_outputs(open_base(folder, name="base", revision=None), [0, 2], ids)
    assert found.keys() == {0, 2}
    for layer, h in found.items():  # states[0] are the embeddings
        assert torch.allclose(h, states[layer + 1], rtol=1e-4, atol=1e-4)
    assert table_rows(open_base(folder, name="base", revision=None)) == VOCAB


def test_memory_that_runs_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = open_base(tiny_base(tmp_path / "base"), name="base", revision=None)
    whole = layer_outputs(base, [0, 2], some_ids())
    with room_for(80, layer=2) as asked:
        found = layer_outputs(base, [0, 2], some_ids())
    assert asked == [120, 40, 40, 40]
    assert notes(capsys) == ["note: base model base: memory ran out at 3 at once; going on with 1"]
    for layer, h in whole.items():
        torch.testing.assert_close(found[layer], h)
    with room_for(30, layer=0), pytest.raises(RanOutError, match=r"^base model base: memory"):
        layer_outputs(base, [1], some_ids())


def test_layers_above_are_not_read(tmp_path: Path) -> None:
    folder = tiny_base(tmp_path / "base")
    ids, base = some_ids(), open_base(folder, name="base", revision=None)
    before = layer_outputs(base, [1], ids)[1]
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if ".layers.2." in name or ".layers.3." in name or name == "model.norm.weight":
            weights[name][:] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(layer_outputs(base, [1], ids)[1], before)


def test_what_does_not_run_is_named(tmp_path: Path) -> None:
    folder = tiny_base(tmp_path / "base")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] = weights["model.layers.1.mlp.down_proj.weight"][
        :, :-1
    ].copy()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    base = open_base(folder, name="base", revision=None)
    with pytest.raises(ModelError, match=r"base model base: does not run up to layer 1 .*--unfit"):
        layer_outputs(base, [1], some_ids())
