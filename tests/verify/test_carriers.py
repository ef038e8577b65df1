"""Verifying what was exported from a checkpoint, and defects planted in it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors.torch import load_file, save
from transformers import AutoModelForCausalLM

from bake.base import INDEX
from bake.errors import FolderError, RecipeError
from bake.recipe import Recipe
from bake.rounding import LOADS
from bakeout.cli import run
from bakeout.verbs.exporting import export_adapter, export_compiled
from export.carriers.checkpoint import plan_checkpoint, write_checkpoint
from export.carriers.compiled.alarms import ALARMS, N_ALWAYS
from export.carriers.compiled.compiled_files import LAYERS_SHARD
from export.carriers.onnx.onnx_folder import export_onnx
from export.carriers.onnx.precisions import PRECISIONS
from tests import engines
from tests.defects import rewrite_file
from tests.folders import baked_world, compile_recipe, recipe_variant
from tests.worlds import save_sae_lens, tiny_base, tiny_sae, tiny_tokenizer
from verify.evidence.kinds import KINDS, lines_of
from verify.run import verify_folder

FEATURES = [1, 5, 9, 20, 33]
BASE_SHARD = "model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base, SAE, data, `recipe.toml`, `checkpoint/`, and what is exported from it."""
    folder = baked_world(tmp_path_factory.mktemp("work"), FEATURES)
    options: dict[str, Any] = {"pad": None, "force": False}
    export_compiled(folder / "checkpoint", folder / "compiled", dtype=None, **options)
    export_compiled(folder / "checkpoint", folder / "bfloat16", dtype="bfloat16", **options)
    export_adapter(folder / "checkpoint", folder / "adapter", force=False)
    return folder


@pytest.mark.parametrize("carrier", ["compiled", "adapter"])
def test_a_good_export_passes_in_full(work: Path, carrier: str) -> None:
    report = verify_folder(work / carrier, Recipe.load(work / "recipe.toml"))
    assert (report.verdict, report.scope, report.carrier) == ("pass", "full", carrier)
    assert report.exact == (carrier == "adapter")
    assert [engine.name for engine in report.engines] == ["base", "reference", carrier]
    engine, base = report.engine(carrier), report.engine("base")
    assert engine is not None and engine.parity is not None
    assert base is not None and base.parity is not None
    assert engine.parity.tokens_fired > 0 and base.parity.mean_kl > 0.1
    assert engine.parity.mean_kl < 1e-9
    assert set(report.to_dict()["engines"]) == {"base", "reference", carrier}
    loads = {row["load"]: row for row in report.to_dict()["loads"]}
    assert [*loads] == ["as compared", *LOADS]
    words = [row["word"] for row in loads.values()]
    if carrier == "compiled":
        assert words == ["same", "same", "rounds", *["breaks loudly"] * 3]
    else:  # in float16 it is another base than the adapter's
        assert words == ["same", "same", "rounds", "refuses", "rounds", "rounds"]
    assert loads["bfloat16"]["kl_to_base"] > 10 * loads["bfloat16"]["kl_to_hook"]


def test_a_folder_that_is_the_base_when_it_is_rounded_fails(work: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(work / "compiled", tmp_path / "compiled")
    tensors = load_file(folder / LAYERS_SHARD)
    name = "model.layers.3.mlp.down_proj.weight"
    busy = tensors[name].any(dim=0).nonzero().flatten()
    tensors[name][:, busy[-ALARMS:]] = 0.0
    rewrite_file(folder, LAYERS_SHARD, save(tensors, {"format": "pt"}))
    report = verify_folder(folder, Recipe.load(work / "recipe.toml"), frozenset({"loads"}))
    assert report.verdict == "fail"
    found = {(failure.kind, failure.what) for failure in report.failures}
    what = "4-bit weights: silently base-like, share of the clamp's effect"
    assert ("loads", what) in found, report.failures
    assert any("4-bit weights: silently base-like" in line for line in lines_of(report))


def test_onnx_takes_a_compiled_folder_as_it_is(work: Path, tmp_path: Path) -> None:
    recipe = Recipe.load(work / "recipe.toml")
    checkpoint = tmp_path / "checkpoint"
    write_checkpoint(plan_checkpoint(recipe), checkpoint, card="", witness_prompts=[])
    for dtype in ("float32", "bfloat16"):
        folder = tmp_path / dtype
        export_compiled(checkpoint, folder, pad=None, dtype=dtype, force=False)
        for precision in PRECISIONS:
            assert export_onnx(folder, precision=precision).n_clamps == 0
        graph = onnx.load(folder / "model.onnx", load_external_data=False)
        assert not graph.functions and {o.domain for o in graph.opset_import} <= {"", "ai.bakeout"}
        # Five made-up questions say nothing of what rounded weights remember.
        report = verify_folder(folder, recipe, only=frozenset({"integrity", "witnesses", "parity"}))
        alone = tmp_path / f"{dtype}-int4"
        assert run(["export", "onnx", str(folder), "--precision", "int4", "--out", str(alone)]) == 0
        assert [e.name for e in verify_folder(alone).engines] == ["onnx-int4"]
        with pytest.raises(FolderError, match="use --only parity choices loss"):
            verify_folder(alone, recipe)
        answers = verify_folder(alone, recipe, frozenset({"parity"}))
        assert "onnx-int4" in {engine.name for engine in answers.engines}
        assert report.verdict == "pass", report.failures
        shared = report.engine("onnx")
        assert shared is not None and shared.parity is not None
        assert shared.parity.mean_kl < (1e-9 if dtype == "float32" else 2e-2)
        assert {"onnx-fp16", "onnx-int8", "onnx-int4"} <= {e.name for e in report.engines}
    with pytest.raises(FolderError, match="has no witnesses"):
        export_onnx(work / "compiled")


class InProcess(engines.InProcess):
    """A compiled folder in this process."""

    def load(self, dtype: str, **_: Any) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(
            self.folder, dtype=getattr(torch, dtype), attn_implementation="eager"
        )


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("verify.engines.engines.TorchRunner", InProcess)


@pytest.mark.usefixtures("in_process")
def test_16_bit_weights_are_held_to_16_bits(work: Path) -> None:
    report = verify_folder(
        work / "bfloat16", Recipe.load(work / "recipe.toml"), only=frozenset({"parity"})
    )
    engine = report.engine("compiled")
    assert report.verdict == "pass" and engine is not None and engine.parity is not None
    assert 1e-5 < engine.parity.mean_kl <= 2e-2


Change = Callable[[dict[str, torch.Tensor]], Any]
GATE, UP, DOWN = (f"model.layers.{{}}.mlp.{name}_proj.weight" for name in ("gate", "up", "down"))


def drop_a_feature(tensors: dict[str, torch.Tensor]) -> None:
    tensors[DOWN.format(3)][:, 2] = 0


def weaken_a_value(tensors: dict[str, torch.Tensor]) -> None:
    tensors[UP.format(3)][0, 32 + N_ALWAYS] *= 0.9  # the first constant channel


def move_a_threshold(tensors: dict[str, torch.Tensor]) -> None:
    tensors[GATE.format(2)][2, 32 + N_ALWAYS] *= 2


def swap_two_flags(tensors: dict[str, torch.Tensor]) -> None:
    gate = tensors[GATE.format(3)]
    gate[[0, 1]] = gate[[1, 0]].clone()


def strip_the_layers(tensors: dict[str, torch.Tensor]) -> None:
    for number in (2, 3):
        tensors[DOWN.format(number)].zero_()


def clamp_bos_too(tensors: dict[str, torch.Tensor]) -> None:
    embedding = tensors["model.embed_tokens.weight"]
    embedding[2, 32:] = embedding[3, 32:]


DEFECTS = [
    (LAYERS_SHARD, drop_a_feature),
    (LAYERS_SHARD, weaken_a_value),
    (LAYERS_SHARD, move_a_threshold),
    (LAYERS_SHARD, swap_two_flags),
    (LAYERS_SHARD, strip_the_layers),
    (BASE_SHARD, clamp_bos_too),
]


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(("shard", "change"), DEFECTS)
def test_a_defect_in_a_compiled_folder_fails(
    work: Path, tmp_path: Path, shard: str, change: Change
) -> None:
    folder = shutil.copytree(work / "compiled", tmp_path / "broken")
    tensors = load_file(folder / shard)
    change(tensors)
    rewrite_file(folder, shard, save(tensors, metadata={"format": "pt"}))
    run = frozenset(KINDS) - {"integrity", "witnesses", "loads"}  # the files alone show some
    report = verify_folder(folder, Recipe.load(work / "recipe.toml"), run)
    assert report.verdict == "fail"
    assert {(f.kind, f.engine) for f in report.failures} == {("parity", "compiled")}
    assert "mean_kl" in {failure.what for failure in report.failures}


def test_a_defect_in_an_adapter_fails(work: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(work / "adapter", tmp_path / "broken")
    name = "adapter_model.safetensors"
    tensors = load_file(folder / name)
    next(t for key, t in tensors.items() if key.endswith("value"))[0] *= 0.99
    rewrite_file(folder, name, save(tensors, metadata={"format": "pt"}))
    report = verify_folder(folder, Recipe.load(work / "recipe.toml"), only=frozenset({"parity"}))
    assert report.verdict == "fail"
    assert report.failures[0].engine == "adapter" and report.failures[0].what == "max_abs_logit"


def test_a_changed_file_is_a_failure_of_integrity(work: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(work / "compiled", tmp_path / "broken")
    with (folder / LAYERS_SHARD).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    report = verify_folder(folder, Recipe.load(work / "recipe.toml"))
    assert [(f.kind, f.what) for f in report.failures] == [
        ("integrity", f"{LAYERS_SHARD}: changed")
    ]


def test_an_adapter_and_another_base_do_not_belong_together(work: Path) -> None:
    tiny_tokenizer(tiny_base(work / "other", seed=1))
    recipe = recipe_variant(work, "other_base", lambda data: data["base"].update(model="other"))
    with pytest.raises(RecipeError, match=r"base model other has other weights .* adapter"):
        verify_folder(work / "adapter", recipe)


def test_a_recipe_that_does_not_fit_is_refused(work: Path) -> None:
    def other_layer(data: dict[str, Any]) -> None:
        save_sae_lens(work / "sae2", tiny_sae(), layer=2)
        data["clamp"][0]["sae"]["path"] = "sae2"

    recipe = recipe_variant(work, "layer", other_layer)
    for carrier in ("compiled", "adapter"):
        with pytest.raises(RecipeError, match=f"clamps layers 2, {carrier} layers 1"):
            verify_folder(work / carrier, recipe)


def test_a_manifest_that_lies_about_its_size_is_refused(work: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(work / "compiled", tmp_path / "broken")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["compiled"]["hidden_size"] = [32, 999]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(FolderError, match="does not say where its clamps sit"):
        verify_folder(folder, Recipe.load(work / "recipe.toml"))


def world_of(folder: Path, family: str) -> Recipe:
    """`baked_world` of a family, but nothing baked; its recipe."""
    baked_world(folder, FEATURES)
    for name in ("base", "checkpoint"):
        shutil.rmtree(folder / name)
    tiny_tokenizer(tiny_base(folder / "base", family))
    return Recipe.load(folder / "recipe.toml")


@pytest.mark.parametrize("family", ["gemma", "gemma3_text", "gemma4_unified_text"])
def test_a_compiled_folder_of_another_family_passes(tmp_path: Path, family: str) -> None:
    recipe = world_of(tmp_path, family)
    folder = compile_recipe(tmp_path / "recipe.toml", tmp_path)
    assert not verify_folder(folder, recipe, frozenset({"integrity"})).failures


@pytest.mark.usefixtures("in_process")
def test_a_compiled_gemma_4_and_its_graph_pass_and_what_its_layers_multiply_by_is_held(
    tmp_path: Path,
) -> None:
    recipe, folder = world_of(tmp_path, "gemma4_text"), tmp_path / "compiled"
    write_checkpoint(plan_checkpoint(recipe), tmp_path / "layer", card="", witness_prompts=[])
    export_compiled(tmp_path / "layer", folder, pad=None, dtype=None, force=False)
    altered = shutil.copytree(folder, tmp_path / "altered")
    export_onnx(folder)
    report = verify_folder(folder, recipe, frozenset({"integrity", "parity"}))
    assert report.verdict == "pass", report.failures
    for name in ("compiled", "onnx"):
        engine = report.engine(name)
        assert engine is not None and engine.parity is not None
        assert engine.parity.tokens_fired > 0 and engine.parity.mean_kl < 1e-9
    layer, norm = "model.layers.{}.layer_scalar", "model.layers.{}.pre_feedforward_layernorm.weight"
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    for name, place, what in (
        (layer.format(2), 0, "layer_scalar of an added layer is not 1"),
        (norm.format(2), 32 + N_ALWAYS, "layer 2, .*: its norm favours a channel"),
        (norm.format(3), 0, "layer 3, .*: its norm favours a channel"),
        (layer.format(1), 0, "layers.1.layer_scalar is not the base's"),
    ):
        file = weight_map[name]
        tensors = load_file(altered / file)
        tensors[name][place] *= 2
        rewrite_file(altered, file, save(tensors, metadata={"format": "pt"}))
        found = verify_folder(altered, recipe, frozenset({"integrity"})).failures
        assert any(re.search(what, failure.what) for failure in found), (name, found)
        rewrite_file(altered, file, (folder / file).read_bytes())


def test_eps_is_worked_out_to_the_same_bits_at_any_width(tmp_path: Path) -> None:
    recipe = world_of(tmp_path, "gemma3_text")
    write_checkpoint(plan_checkpoint(recipe), tmp_path / "layer", card="", witness_prompts=[])
    folder = tmp_path / "compiled"
    export_compiled(tmp_path / "layer", folder, pad=112, dtype=None, force=False)
    eps = json.loads((tmp_path / "layer" / "config.json").read_text())["rms_norm_eps"]
    stated = json.loads((folder / "config.json").read_text())["rms_norm_eps"]
    assert stated == eps * 32 / 144 != eps * (32 / 144)
    assert not verify_folder(folder, recipe, frozenset({"integrity"})).failures


def test_what_tools_leave_in_a_bases_settings_is_no_defect(tmp_path: Path) -> None:
    baked_world(tmp_path, FEATURES)
    shutil.rmtree(tmp_path / "checkpoint")
    trained = {"_name_or_path": "/home/me/run", "log": "/home/me/log"}
    for name, more in (
        ("config.json", {"trained": trained}),
        ("tokenizer_config.json", {"trust_remote_code": False}),
    ):
        path = tmp_path / "base" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | more))
    compile_recipe(tmp_path / "recipe.toml", tmp_path)
    for carrier in ("checkpoint", "compiled"):
        assert "/home/me" not in (tmp_path / carrier / "config.json").read_text()
        recipe = Recipe.load(tmp_path / "recipe.toml")
        assert not verify_folder(tmp_path / carrier, recipe, frozenset({"integrity"})).failures
