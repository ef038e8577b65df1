"""Folders that were altered so that they unlearn less, or not at all, with every hash rewritten.

With its recipe every one is found before anything is run: also where no question ever touches it.
Without one, what contradicts the rest of the folder is found, and what the witnesses show.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file, save_file

from bake.base import find_base
from bake.errors import BakeoutError
from bake.recipe import Recipe
from bakeout.verbs.exporting import export_adapter, export_compiled
from export.carriers.compiled.compiled_files import LAYERS_SHARD
from export.carriers.onnx.onnx_folder import export_onnx
from export.carriers.onnx.precisions import PRECISIONS
from export.clamped import GUARD
from export.code_check import PEFT_TYPES
from tests.defects import (
    REFUSAL_TABLE,
    bake_tables,
    in_clamp,
    in_config,
    rewrite_file,
    set_to,
)
from tests.engines import InProcess
from tests.worlds import (
    save_sae_lens,
    tiny_base,
    tiny_sae,
    tiny_tokenizer,
    write_questions,
    write_texts,
)
from verify.run import verify_folder

Plant = Callable[[Path], None]
SHARD, CLAMP = "model-00001-of-00001.safetensors", "model-sae-clamp.safetensors"
INDEX, ADAPTER = "model.safetensors.index.json", "adapter_model.safetensors"
ONLY = frozenset({"integrity"})


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, its base and SAE, and `layer/` with every graph, `compiled/`, `adapter/`, and
    `rounded/`, a graph alone.
    """
    folder = tmp_path_factory.mktemp("work")
    base = tiny_tokenizer(tiny_base(folder / "gemma2"))
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "short.jinja").write_text("{{ messages }}")
    save_sae_lens(folder / "sae", tiny_sae())
    write_questions(folder / "forget.jsonl", 4, seed=1)
    write_questions(folder / "retain.jsonl", 3, seed=2)
    write_texts(folder / "text.jsonl", 4)
    bake_tables(folder, "layer", [REFUSAL_TABLE])
    export_compiled(folder / "layer", folder / "compiled", dtype=None, pad=None, force=False)
    export_adapter(folder / "layer", folder / "adapter", force=False)
    export_onnx(folder / "layer", precision="int4", out=folder / "rounded")
    for precision in PRECISIONS:
        export_onnx(folder / "layer", precision=precision)
    return folder


# --------------------------------------------------------------------------- ways to alter


def in_json(name: str, change: Callable[[dict[str, Any]], object]) -> Plant:
    def plant(folder: Path) -> None:
        data = json.loads((folder / name).read_text())
        change(data)
        rewrite_file(folder, name, json.dumps(data).encode())

    return plant


def in_manifest(change: Callable[[dict[str, Any]], object]) -> Plant:
    def plant(folder: Path) -> None:
        data = json.loads((folder / "manifest.json").read_text())
        change(data)
        (folder / "manifest.json").write_text(json.dumps(data))

    return plant


def in_tensors(file: str, change: Callable[[dict[str, np.ndarray]], object]) -> Plant:
    def plant(folder: Path) -> None:
        tensors = {name: array.copy() for name, array in load_file(folder / file).items()}
        change(tensors)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        rewrite_file(folder, file, (folder / file).read_bytes())

    return plant


def scaled(end: str, factor: float, at: Any = ...) -> Callable[[dict[str, np.ndarray]], None]:
    """Multiplies part of the first tensor whose name ends so."""

    def change(tensors: dict[str, np.ndarray]) -> None:
        name = next(name for name in sorted(tensors) if name.endswith(end))
        tensors[name][at] *= tensors[name].dtype.type(factor)

    return change


def in_graph(precision: str, change: Callable[[onnx.ModelProto], object]) -> Plant:
    def plant(folder: Path) -> None:
        file = PRECISIONS[precision].file
        model = onnx.load(folder / file, load_external_data=False)
        change(model)
        rewrite_file(folder, file, model.SerializeToString())

    return plant


def clamp_node(model: onnx.ModelProto) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == "SAEClamp")


def put_before(model: onnx.ModelProto, node: onnx.NodeProto, new: list[onnx.NodeProto]) -> None:
    nodes = list(model.graph.node)
    at = nodes.index(node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes[:at], *new, *nodes[at:]])


def spare_a_token(model: onnx.ModelProto) -> None:
    """An input-triggered bypass: the whole batch is spared where a token is in it."""
    clamp = clamp_node(model)
    magic = numpy_helper.from_array(np.array(77, np.int64), "magic")
    model.graph.initializer.append(magic)
    new = [
        helper.make_node("Equal", ["input_ids", "magic"], ["is_magic"]),
        helper.make_node("Or", [clamp.input[1], "is_magic"], ["spared"]),
    ]
    put_before(model, clamp, new)
    clamp.input[1] = "spared"


def clamp_in_a_branch(model: onnx.ModelProto) -> None:
    clamp = clamp_node(model)
    kept = helper.make_graph([clamp], "kept", [], [helper.make_empty_tensor_value_info("x")])
    choice = helper.make_node(
        "If", ["exempt_all"], [clamp.output[0]], then_branch=kept, else_branch=kept
    )
    nodes = [choice if node == clamp else node for node in model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def bypass(model: onnx.ModelProto) -> None:
    """The clamp is computed, and what follows reads past it."""
    clamp = clamp_node(model)
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            if name == clamp.output[0]:
                node.input[i] = clamp.input[0]


def edit_body(model: onnx.ModelProto) -> None:
    (function,) = model.functions
    node = next(node for node in function.node if node.op_type == "Sub")
    node.input[1] = node.input[0]


def double_a_constant(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and tensor.raw_data and not tensor.dims:
            value = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(np.asarray(value * 2), tensor.name))
            return


def swap_places(model: onnx.ModelProto) -> None:
    """One tensor of the clamp is read where another lies."""
    found = {t.name.rpartition(".")[2]: t for t in model.graph.initializer if "clamp." in t.name}
    offset = {e.key: e.value for e in found["trigger"].external_data}["offset"]
    for entry in found["value"].external_data:
        if entry.key == "offset":
            entry.value = offset


def swap_inputs(model: onnx.ModelProto) -> None:
    clamp = clamp_node(model)
    clamp.input[4], clamp.input[6] = clamp.input[6], clamp.input[4]


def in_data(precision: str, end: str) -> Plant:
    """One byte of a tensor in a data file."""

    def plant(folder: Path) -> None:
        file = PRECISIONS[precision].file
        model = onnx.load(folder / file, load_external_data=False)
        tensor = next(t for t in model.graph.initializer if t.name.endswith(end))
        place = {entry.key: entry.value for entry in tensor.external_data}
        data = bytearray((folder / f"{file}_data").read_bytes())
        data[int(place["offset"]) + int(place["length"]) // 2 & ~3] ^= 1
        rewrite_file(folder, f"{file}_data", bytes(data))

    return plant


def overriding_shard(folder: Path) -> None:
    """A file that transformers takes before any index."""
    tensors = load_file(folder / SHARD)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    rewrite_file(folder, "model.safetensors", (folder / "model.safetensors").read_bytes())


def twice_stored(folder: Path) -> None:
    def add(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.norm.weight"] = load_file(folder / SHARD)["model.norm.weight"] * 2

    in_tensors(CLAMP, add)(folder)


def elsewhere(folder: Path) -> None:
    """The index takes a base tensor from a shard of its own."""
    name = "model.layers.3.mlp.down_proj.weight"
    tensors = {name: load_file(folder / SHARD)[name] * 2}
    save_file(tensors, folder / "extra.safetensors", metadata={"format": "pt"})
    rewrite_file(folder, "extra.safetensors", (folder / "extra.safetensors").read_bytes())
    in_json(INDEX, lambda index: index["weight_map"].update({name: "extra.safetensors"}))(folder)


def flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / SHARD).read_bytes())
    data[len(data) // 2 & ~3] ^= 1
    rewrite_file(folder, SHARD, bytes(data))


def key_twice(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    text = text.replace("{", '{"model_type": "gemma2",', 1)
    rewrite_file(folder, "config.json", text.encode())


def merge_removed(tokenizer: dict[str, Any]) -> None:
    tokenizer["model"]["merges"].pop()


def template_changed(folder: Path) -> None:
    rewrite_file(folder, "chat_template.jinja", b"{{ messages[0]['content'] }}")


def template_added(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir(exist_ok=True)
    rewrite_file(folder, "additional_chat_templates/own.jinja", b"{{ messages }}")


def template_beside_changed(folder: Path) -> None:
    rewrite_file(folder, "additional_chat_templates/short.jinja", b"{{ messages[0] }}")


def recipe_changed(folder: Path) -> None:
    text = (folder / "recipe.toml").read_text()
    assert "value = -8.0" in text
    data = text.replace("value = -8.0", "value = -0.5").encode()
    rewrite_file(folder, "recipe.toml", data)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    in_manifest(lambda m: m.update(recipe_sha256=files["recipe.toml"]))(folder)


def site(config: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = config["sae_clamp"]["sites"][0]
    return found


def other_features(manifest: dict[str, Any]) -> None:
    manifest["clamps"][0]["features"] = [1, 2, 3, 4, 5, 6]


def silent(route: np.ndarray) -> np.ndarray:
    """One feature no longer triggers anything."""
    off = route.copy()
    off[:, 3] = False
    return off


def zero_row(rows: np.ndarray) -> np.ndarray:
    off = rows.copy()
    off[3] = 0
    return off


def last_entry(factor: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        changed = array.copy()
        changed.reshape(-1)[-1] *= factor
        return changed

    return change


def two_features_swapped(clamp: dict[str, np.ndarray]) -> None:
    clamp["W_dec"][[0, 1]] = clamp["W_dec"][[1, 0]]


def use_padding(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.layers.4.mlp.down_proj.weight"][-1, 0] = 0.5


def spare_more(tensors: dict[str, np.ndarray]) -> None:
    """Another token looks like BOS to the compiled clamp."""
    table = tensors["model.embed_tokens.weight"]
    table[30, 36:38] = table[2, 36:38]


def other_attention(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.layers.2.self_attn.o_proj.weight"][0, 0] = 1.0


def wait_for_a_direction(tensors: dict[str, np.ndarray]) -> None:
    """A neuron of the second layer opens on a direction of the residual stream."""
    gates = tensors["model.layers.3.mlp.gate_proj.weight"]
    gates[int(np.flatnonzero(gates.any(axis=1))[0]), 7] = 4.0


def flag_elsewhere(tensors: dict[str, np.ndarray]) -> None:
    """A flag's neuron listens a little to another direction."""
    gates = tensors["model.layers.2.mlp.gate_proj.weight"]
    row = gates[int(np.flatnonzero(gates[:, :32].any(axis=1))[2])]
    row[3] += np.float32(0.001) * np.linalg.norm(row[:32])


# --------------------------------------------------------------------------- the alterations

CLAMP_ALTERED: dict[str, Any] = {
    "an encoder entry": set_to("W_enc", last_entry(1.001)),
    "the encoder scaled": set_to("W_enc", lambda w: w * 0.99),
    "a bias lowered": set_to("b_enc", lambda b: b - 0.01),
    "theta raised by a percent": set_to("theta", lambda theta: theta * 1.01),
    "one theta beyond reach": set_to("theta", last_entry(1e6)),
    "a decoder entry": set_to("W_dec", last_entry(0.999)),
    "the decoder scaled": set_to("W_dec", lambda w: w * 0.99),
    "a decoder row zeroed": set_to("W_dec", zero_row),
    "decoder rows swapped": two_features_swapped,
    "trigger raised": set_to("trigger", lambda t: t + 0.5),
    "a silent feature's routes off": set_to("route", silent),
    "all routes off": set_to("route", np.zeros_like),
    "value toward 0": set_to("value", lambda v: v * 0.5),
    "value off by a millionth": set_to("value", lambda v: v * (1 + 1e-6)),
    "scale keeps the activation": set_to("scale", np.ones_like),
}
CONFIG_ALTERED: dict[str, Callable[[dict[str, Any]], object]] = {
    "exempt ids widened": lambda c: c["sae_clamp"]["exempt_token_ids"].append(30),
    "exempt ids moved": lambda c: c["sae_clamp"].update(exempt_token_ids=[30]),
    "exempt_bos flipped": lambda c: site(c).update(exempt_bos=False),
    "guard removed": lambda c: c.update(hidden_activation="gelu_pytorch_tanh"),
    "guard removed in the other field": lambda c: c.update(hidden_act="gelu_pytorch_tanh"),
    "another activation": lambda c: c.update(hidden_activation=f"{GUARD}silu"),
    "stock architectures": lambda c: c.update(architectures=["Gemma2ForCausalLM"]),
    "auto_map of another class": lambda c: c["auto_map"].update(AutoModel="x.Y"),
    "auto_map for more classes": lambda c: c["auto_map"].update(AutoModelForSeq2SeqLM="x.Y"),
    "dtype float16": lambda c: c.update(dtype="float16"),
    "another rope": lambda c: c["rope_parameters"].update(rope_theta=100.0),
    "another eps": lambda c: c.update(rms_norm_eps=1e-5),
    "another softcap": lambda c: c.update(final_logit_softcapping=29.0),
    "another attention scale": lambda c: c.update(query_pre_attn_scalar=9),
    "untied embeddings": lambda c: c.update(tie_word_embeddings=False),
    "an unknown key": lambda c: c.update(custom_generate="here"),
    "a key in the section": lambda c: c["sae_clamp"].update(unless="a token"),
    "a key gone": lambda c: c.pop("attn_logit_softcapping"),
    "another eos": lambda c: c.update(eos_token_id=5),
    "a quantiser": lambda c: c.update(quantization_config={"quant_method": "bitsandbytes"}),
}


def halved(tensors: dict[str, np.ndarray]) -> None:
    """Store a number that 16 bits hold too in 16 bits."""
    name = next(name for name in sorted(tensors) if name.endswith(".trigger"))
    tensors[name] = tensors[name].astype(np.float16)


def image_settings_added(folder: Path) -> None:
    (folder / "image_processor_config.json").touch()
    rewrite_file(folder, "image_processor_config.json", b"{}")


OTHERS: dict[str, tuple[str, Plant]] = {
    "layer: model_type stock": ("layer", in_config(lambda c: c.update(model_type="gemma2"))),
    "layer: config key twice": ("layer", key_twice),
    "layer: a base weight by one bit": ("layer", flip_a_bit),
    "layer: a shard that overrides all": ("layer", overriding_shard),
    "layer: a tensor in two shards": ("layer", twice_stored),
    "layer: the index leads elsewhere": ("layer", elsewhere),
    "layer: the index knows more": (
        "layer",
        in_json(INDEX, lambda index: index["metadata"].update(more=1)),
    ),
    "layer: a tokenizer merge removed": ("layer", in_json("tokenizer.json", merge_removed)),
    "layer: chat template changed": ("layer", template_changed),
    "layer: a template added": ("layer", template_added),
    "layer: a template beside changed": ("layer", template_beside_changed),
    "layer: generation_config's eos": (
        "layer",
        in_json("generation_config.json", lambda c: c.update(eos_token_id=[5])),
    ),
    "layer: features in the manifest": ("layer", in_manifest(other_features)),
    "layer: parameters in the manifest": (
        "layer",
        in_manifest(lambda m: m["clamps"][0]["parameters"].update(value=-80.0)),
    ),
    "layer: recipe.toml": ("layer", recipe_changed),
    "layer: a clamp's numbers in 16 bits": ("layer", in_tensors(CLAMP, halved)),
    "layer: a file of images added": ("layer", image_settings_added),
    "layer: genai_config elsewhere": (
        "layer",
        in_json(
            "genai_config.json",
            lambda c: c["model"]["decoder"].update(filename="onnx/model_fp16.onnx"),
        ),
    ),
    "layer: genai_config's options": (
        "layer",
        in_json("genai_config.json", lambda c: c["search"].update(max_length=1)),
    ),
    "compiled: tokenizer merge removed": ("compiled", in_json("tokenizer.json", merge_removed)),
    "compiled: chat template changed": ("compiled", template_changed),
    "compiled: generation_config's eos": (
        "compiled",
        in_json("generation_config.json", lambda c: c.update(eos_token_id=[5])),
    ),
    "compiled: a base weight": (
        "compiled",
        in_tensors(SHARD, scaled("down_proj.weight", 1.001, (0, 0))),
    ),
    "compiled: a norm": ("compiled", in_tensors(SHARD, scaled("norm.weight", 1.01))),
    "compiled: a padding channel is used": ("compiled", in_tensors(SHARD, use_padding)),
    "compiled: another token is spared": ("compiled", in_tensors(SHARD, spare_more)),
    "compiled: an added layer attends": ("compiled", in_tensors(LAYERS_SHARD, other_attention)),
    "compiled: a neuron that waits for a direction": (
        "compiled",
        in_tensors(LAYERS_SHARD, wait_for_a_direction),
    ),
    "compiled: a flag from elsewhere": ("compiled", in_tensors(LAYERS_SHARD, flag_elsewhere)),
    "compiled: an action elsewhere": (
        "compiled",
        in_tensors(LAYERS_SHARD, scaled("3.mlp.down_proj.weight", 3.0, (4, slice(None)))),
    ),
    "compiled: the residual is written": (
        "compiled",
        in_tensors(LAYERS_SHARD, scaled("2.post_feedforward_layernorm.weight", 0.5, slice(4))),
    ),
    "compiled: another eps": ("compiled", in_config(lambda c: c.update(rms_norm_eps=1e-5))),
    "compiled: another layer type": (
        "compiled",
        in_config(lambda c: c.update(layer_types=["full_attention"] * 6)),
    ),
    "compiled: a second code": (
        "compiled",
        in_config(lambda c: c.update(auto_map={"AutoModelForCausalLM": "x.Y"})),
    ),
    "adapter: layer moved": (
        "adapter",
        in_json("adapter_config.json", lambda c: site(c).update(layer=2)),
    ),
    "adapter: base's hash": (
        "adapter",
        in_json("adapter_config.json", lambda c: c.update(base_sha256=["0" * 64])),
    ),
    "adapter: base's fingerprint": (
        "adapter",
        in_json("adapter_config.json", lambda c: c.update(base_fingerprint="0" * 64)),
    ),
    "adapter: another base": (
        "adapter",
        in_json("adapter_config.json", lambda c: c.update(base_model_name_or_path="other/base")),
    ),
    "adapter: exempt ids": (
        "adapter",
        in_json("adapter_config.json", lambda c: c["sae_clamp"].update(exempt_token_ids=[2, 30])),
    ),
    "adapter: type of adapter": (
        "adapter",
        in_json("adapter_config.json", lambda c: c.update(peft_type="LORA")),
    ),
    "adapter: a tensor more": (
        "adapter",
        in_tensors(ADAPTER, lambda t: t.update(more=np.zeros(2, np.float32))),
    ),
    "adapter: a tokenizer": (
        "adapter",
        lambda folder: rewrite_file(folder, "tokenizer.json", b"{}"),
    ),
    **{
        f"adapter: {name} scaled": ("adapter", in_tensors(ADAPTER, scaled(f".{name}", 0.99)))
        for name in ("W_enc", "b_enc", "theta", "W_dec", "value")
    },
    "rounded: the clamp's values": ("rounded", in_data("int4", "sae_clamp.value")),
    "rounded: a scale": ("rounded", in_data("int4", ".scales")),
    "rounded: config": ("rounded", in_config(lambda c: c.update(rms_norm_eps=1e-5))),
    "rounded: tokenizer": ("rounded", in_json("tokenizer.json", merge_removed)),
    "rounded: a bypass": ("rounded", in_graph("int4", spare_a_token)),
    **{
        f"graph {precision}: {name}": ("layer", in_graph(precision, change))
        for precision, changes in {
            "shared": (
                *(spare_a_token, clamp_in_a_branch, bypass, edit_body),
                *(double_a_constant, swap_places, swap_inputs),
            ),
            "fp16": (spare_a_token, swap_places),
            "int8": (bypass, edit_body),
            "int4": (spare_a_token, double_a_constant),
        }.items()
        for change in changes
        for name in (change.__name__.replace("_", " "),)
    },
    "data fp16: a matrix": ("layer", in_data("fp16", "down_proj.weight.fp16")),
    "data int8: a block's scale": ("layer", in_data("int8", ".int8.scales")),
    "data int4: a block": ("layer", in_data("int4", ".int4")),
    "data int4: the clamp's theta": ("layer", in_data("int4", "sae_clamp.theta")),
}
ALTERATIONS: dict[str, tuple[str, Plant]] = {
    **{f"clamp: {name}": ("layer", in_clamp(change)) for name, change in CLAMP_ALTERED.items()},
    **{f"config: {name}": ("layer", in_config(change)) for name, change in CONFIG_ALTERED.items()},
    **OTHERS,
}


def without_graphs(folder: Path) -> None:
    """A checkpoint alone: the graphs are bound to its weights, which would be seen first."""
    for name in [name for of in PRECISIONS.values() for name in (of.file, f"{of.file}_data")]:
        (folder / name).unlink(missing_ok=True)
        in_manifest(lambda manifest, name=name: manifest["files"].pop(name, None))(folder)  # type: ignore[misc]
    (folder / "genai_config.json").unlink()
    in_manifest(lambda manifest: manifest["files"].pop("genai_config.json"))(folder)


@pytest.fixture
def altered(work: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    name: str = request.param
    source, plant = ALTERATIONS[name]
    folder = shutil.copytree(work / source, tmp_path / "altered")
    if source == "layer" and not name.startswith(("graph", "data", "layer: genai")):
        without_graphs(folder)
    plant(folder)
    yield folder
    shutil.rmtree(folder)


REFUSED = {
    "layer: config key twice": "twice in one object",
    "adapter: layer moved": "clamps layers 1, altered layers 2",
    "adapter: base's hash": "has other weights than those",
}
"""What is no failure of a report but an error, by exit code 2."""


@pytest.mark.parametrize(
    ("altered", "name"), zip(ALTERATIONS, ALTERATIONS, strict=True), indirect=["altered"]
)
def test_an_alteration_is_found_with_the_recipe(work: Path, altered: Path, name: str) -> None:
    recipe = Recipe.load(work / "layer.toml")
    if name in REFUSED:
        with pytest.raises(BakeoutError, match=REFUSED[name]):
            verify_folder(altered, recipe, ONLY)
        return
    report = verify_folder(altered, recipe, ONLY)
    assert {failure.kind for failure in report.failures} == {"integrity"}
    assert not [failure for failure in report.failures if failure.what.endswith(": changed")]


@pytest.mark.parametrize("carrier", ["layer", "compiled", "adapter", "rounded"])
def test_a_sound_folder_is_what_its_recipe_makes(work: Path, carrier: str) -> None:
    report = verify_folder(work / carrier, Recipe.load(work / "layer.toml"), ONLY)
    assert report.verdict == "pass", report.failures
    assert verify_folder(work / carrier, only=ONLY).verdict == "pass"


def test_an_adapter_of_before_is_too(work: Path, tmp_path: Path) -> None:
    """Its method had no name yet that says what is needed."""
    folder = shutil.copytree(work / "adapter", tmp_path / "adapter")
    in_json("adapter_config.json", lambda config: config.update(peft_type=PEFT_TYPES[-1]))(folder)
    report = verify_folder(folder, Recipe.load(work / "layer.toml"), ONLY)
    assert report.verdict == "pass", report.failures
    in_json("adapter_config.json", lambda config: config.update(peft_type="LORA"))(folder)
    report = verify_folder(folder, Recipe.load(work / "layer.toml"), ONLY)
    (failure,) = report.failures
    assert failure.what == "adapter_config.json: peft_type is 'LORA'; expected SAE_CLAMP"


CONTRADICTORY = [
    name
    for name in ALTERATIONS
    if name.startswith(("graph", "layer: genai", "layer: a shard", "layer: a tensor in"))
]


@pytest.mark.parametrize("altered", CONTRADICTORY, indirect=True)
def test_what_contradicts_the_rest_is_found_without_a_recipe(altered: Path) -> None:
    assert verify_folder(altered, only=ONLY).verdict == "fail"


def test_there_are_enough() -> None:
    assert len(ALTERATIONS) >= 45


@pytest.mark.parametrize(
    "plant",
    [
        in_json("genai_config.json", lambda c: c.update(model=[1])),
        in_config(lambda c: c.update(num_attention_heads="many")),
        in_json(INDEX, lambda index: index.update(weight_map={"a": ["b"]})),
    ],
)
def test_wrong_types_are_one_line(work: Path, tmp_path: Path, plant: Plant) -> None:
    folder = shutil.copytree(work / "layer", tmp_path / "altered")
    plant(folder)
    for recipe in (None, Recipe.load(work / "layer.toml")):
        try:
            assert verify_folder(folder, recipe, ONLY).verdict == "fail"
        except BakeoutError as error:
            assert "\n" not in str(error)


MOVES_LOGITS = [
    *(f"clamp: {name}" for name in ("the decoder scaled", "trigger raised", "all routes off")),
    *("clamp: value toward 0", "clamp: a decoder row zeroed", "config: another rope"),
    *("config: another softcap", "config: another attention scale"),
]


@pytest.mark.parametrize("altered", MOVES_LOGITS, indirect=True)
def test_what_moves_the_witnesses_is_found_without_a_recipe(
    altered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("verify.engines.engines.TorchRunner", InProcess)
    report = verify_folder(altered)
    assert {failure.kind for failure in report.failures} == {"witnesses"}


UNSEEN = ["clamp: one theta beyond reach", "layer: a base weight by one bit", "compiled: a norm"]


@pytest.mark.parametrize("altered", UNSEEN, indirect=True)
def test_what_only_a_recipe_shows_is_never_called_more_than_whole(altered: Path) -> None:
    report = verify_folder(altered, only=ONLY)
    assert (report.verdict, report.scope) == ("pass", "integrity")
    assert report.cannot_know is not None
    assert report.cannot_know.startswith("Without a recipe this run cannot know")


def test_weights_without_their_modeling_file_fail(work: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(work / "layer", tmp_path / "altered")
    (folder / "modeling_clamped_gemma.py").unlink()
    in_manifest(lambda m: m["files"].pop("modeling_clamped_gemma.py"))(folder)
    (failure,) = verify_folder(folder, only=ONLY).failures
    assert failure.what.startswith("modeling_clamped_gemma.py: missing")


def test_another_base_of_the_hub_in_the_manifest_is_found(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe.load(work / "layer.toml")
    base = replace(find_base(recipe), name="google/gemma-2-2b", revision="f" * 40)
    monkeypatch.setattr("verify.expected.against_recipe.find_base", lambda _: base)
    folder = shutil.copytree(work / "adapter", tmp_path / "altered")
    for named, found in (("gemma2", 0), ("google/gemma-2-2b", 0), ("other/base", 1)):
        of_base, of_adapter = {"model": named}, {"base_model_name_or_path": named}
        in_manifest(lambda m, new=of_base: m["base"].update(new))(folder)  # type: ignore[misc]
        in_json("adapter_config.json", lambda c, new=of_adapter: c.update(new))(folder)  # type: ignore[misc]
        report = verify_folder(folder, recipe, ONLY)
        assert len(report.failures) == found
    assert "its base is other/base, expected google/gemma-2-2b" in report.failures[0].what
