"""Where layers stand, against a count of them as runtimes count."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from bake.families import FAMILIES, layer_period
from bake.recipe import Recipe
from bakeout.terminal import compiled_lines
from export.carriers.compiled.compiled_files import LAYERS_SHARD
from export.carriers.compiled.placing import ALL, WINDOW, place_layers
from export.manifest import Manifest
from tests.folders import compile_recipe, rehash
from tests.logits import flat_logits, tiny_prompts
from tests.worlds import save_sae_lens, tiny_config, tiny_sae
from verify.compare.logits import kl_nats
from verify.run import verify_folder


def kinds(n: int, period: int) -> list[str]:
    return [ALL if (i + 1) % period == 0 else WINDOW for i in range(n)]


@pytest.mark.parametrize("period", [2, 3, 6])
def test_every_layer_stands_where_its_kind_is_counted(period: int) -> None:
    n = 14
    for sites in itertools.combinations(range(n), 2):
        types = kinds(n, period)
        found = place_layers(n, sites, types, period)
        assert list(found.types) == kinds(found.n_layers, period)
        assert [found.types[place] for place in found.base] == types
        numbers = [*found.base, *itertools.chain(*found.sites), *found.idle]
        assert sorted(numbers) == list(range(found.n_layers))
        for layer, pair in zip(sites, found.sites, strict=True):
            assert pair == (found.base[layer] + 1, found.base[layer] + 2)
        # None is there without need: the place after an idle one is of another kind.
        assert len(found.idle) <= 2 * (period - 2)


@pytest.mark.parametrize(
    ("family", "n", "sites", "added"),
    [
        ("gemma2", 26, [7], 2),
        ("gemma3_text", 18, [4], 6),
        ("gemma3_text", 18, [4, 7], 12),
        ("gemma3_text", 18, [7, 9], 6),  # no layer between them sees all
        ("gemma3_text", 26, [25], 2),  # nothing behind it has to be counted
    ],
)
def test_how_many_are_added(family: str, n: int, sites: list[int], added: int) -> None:
    period = FAMILIES[family].period
    assert period is not None
    assert place_layers(n, sites, kinds(n, period), period).added == added


def test_kinds_that_follow_no_count_are_kept_as_they_are_listed() -> None:
    types = [ALL, WINDOW, WINDOW, ALL, WINDOW]
    assert layer_period(types, FAMILIES["gemma3_text"]) is None
    found = place_layers(5, [1], types, None)
    assert found.idle == () and found.base == (0, 1, 4, 5, 6)
    assert [found.types[place] for place in found.base] == types
    assert found.types[2:4] == (WINDOW, WINDOW)  # as the next of the base
    assert place_layers(3, [0], [], None).types == ()
    last = place_layers(3, [1, 2], [WINDOW, WINDOW, ALL], None)
    assert last.types == (WINDOW, WINDOW, *[ALL] * 5)
    assert [last.like(number) for number in range(7)] == [0, 1, 2, 2, 2, 2, 2]


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 3 of 8 layers of which the sixth sees all, clamped at 1; its recipe."""
    folder = tmp_path_factory.mktemp("counted")
    tiny = tiny_config("gemma3_text").to_dict() | {"num_hidden_layers": 8}
    tiny |= {"layer_types": kinds(8, 6), "sliding_window_pattern": 6}
    config = tf.Gemma3TextConfig(**tiny)
    torch.manual_seed(0)
    tf.Gemma3ForCausalLM(config).save_pretrained(folder / "base")
    save_sae_lens(folder / "sae", tiny_sae(), layer=1)
    recipe = folder / "recipe.toml"
    recipe.write_text(
        'schema = 1\n[base]\nmodel = "base"\nlicense = "apache-2.0"\n[[clamp]]\n'
        'sae = { path = "sae" }\nmethod = "clamp"\nfeatures = [1, 5, 9]\nvalue = -6.0\n'
    )
    compile_recipe(recipe, folder)
    return recipe


def test_who_counts_layers_instead_of_reading_their_kinds_computes_the_same(counted: Path) -> None:
    folder = counted.parent / "compiled"
    said = json.loads((folder / "config.json").read_text())
    assert said["num_hidden_layers"] == 14 and said["layer_types"] == kinds(14, 6)
    compiled = Manifest.read(folder).compiled
    assert compiled is not None
    assert (compiled.layers_added, compiled.idle) == (6, [5, 8, 9, 10])
    assert compiled_lines(compiled)[-1][1].startswith("layers 5, 8, 9, 10 do nothing")
    ids = tiny_prompts()
    read = tf.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    guessing = tf.AutoConfig.for_model(**said | {"layer_types": None})
    guessed = tf.AutoModelForCausalLM.from_pretrained(
        folder, config=guessing, attn_implementation="eager"
    )
    assert torch.equal(flat_logits(read, ids), flat_logits(guessed, ids))
    clamped = tf.AutoModelForCausalLM.from_pretrained(
        counted.parent / "checkpoint", trust_remote_code=True, attn_implementation="eager"
    )
    assert kl_nats(flat_logits(clamped, ids), flat_logits(read, ids)).mean() <= 1e-8


def test_an_idle_layer_that_does_something_is_found(counted: Path, tmp_path: Path) -> None:
    folder, recipe = tmp_path / "compiled", Recipe.load(counted)
    shutil.copytree(counted.parent / "compiled", folder)
    assert verify_folder(folder, recipe, frozenset({"integrity"})).verdict == "pass"
    tensors = load_file(folder / LAYERS_SHARD)
    tensors["model.layers.9.mlp.down_proj.weight"][0, 0] = 1e-3
    save_file(tensors, folder / LAYERS_SHARD, metadata={"format": "pt"})
    rehash(folder)
    report = verify_folder(folder, recipe, frozenset({"integrity"}))
    assert any("layers.9.mlp.down_proj.weight of an idle layer" in f.what for f in report.failures)
