"""What reads a stranger's files: each reader with a good folder, and the file of it that varies."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from bake.base import open_base
from bake.importing.import_gguf import open_gguf
from bake.questions.corpora import corpus_texts
from bake.questions.multiple_choice import load_questions, load_texts
from bake.questions.open_prompts import load_prompts
from bake.questions.trivia import load_trivia
from bake.recipe import Recipe
from bake.sae.folding import load_decoder, load_encoder, load_slice, size_of
from bake.sae.layouts import open_sae_folder, resolve_layer
from bake.sources import Corpus, QuestionSource, RowSource, SAESource, TextSource
from bakeout.terminal import show_folder
from export.carriers.checkpoint import clamped_config
from export.clamped import clamped_layers, open_clamped, read_config
from export.manifest import Manifest
from export.witness_file import WITNESSES, Witnesses
from model_cards.facts import facts_of_folder
from model_cards.render import render
from tests.folders import rehash
from tests.fuzz import mutators
from tests.fuzz.mutators import Mutator
from tests.reports import full_evidence
from tests.worlds import (
    save_gemma_scope,
    save_gemma_scope_2,
    save_sae_lens,
    tiny_base,
    tiny_sae,
    write_jsonl,
    write_questions,
    write_texts,
)
from verify.clamped_folder import own_recipe
from verify.engines.onnx_files import graph_failures, open_graph
from verify.page.html import render_html
from verify.reference.whole_sae import _load_sae
from verify.report.reading import read_report


@dataclass(frozen=True)
class Reader:
    """One way into bakeout."""

    file: str
    """Of the folder of all good files: what varies."""
    read: Callable[[Path], object]
    """Is given the folder that the file lies in."""
    mutate: Mutator
    slow: bool = False
    """It takes more than a few milliseconds."""


def _recipe(folder: Path) -> None:
    recipe = Recipe.load(folder / "recipe.toml")
    recipe.shareable().to_toml()
    assert recipe.local_sources


def _sae(folder: Path) -> None:
    files = open_sae_folder(folder)
    resolve_layer(files, "blocks.1.hook_resid_post", "sae")
    d_in, d_sae = size_of(files)
    assert d_in and d_sae
    load_slice(files, [0, d_sae - 1])
    load_encoder(files)
    load_decoder(files)


def _reference(folder: Path) -> None:
    _load_sae(SAESource(path=str(folder)), Recipe.load(folder.parent / "recipe.toml"), "sae")


def _manifest(folder: Path) -> None:
    with redirect_stdout(io.StringIO()):
        show_folder(folder)


def _base(folder: Path) -> None:
    base = open_base(folder, name="base", revision=None)
    recipe = Recipe.load(folder.parent / "recipe.toml")
    json.dumps(clamped_config(recipe, base, []), allow_nan=False)


def _rows(kind: str) -> Callable[[Path], object]:
    def read(folder: Path) -> None:
        recipe = Recipe.load(folder.parent / "recipe.toml")
        path = {"path": f"rows/{kind}.jsonl"}
        match kind:
            case "questions":
                load_questions(QuestionSource(**path), recipe)
            case "texts":
                load_texts(TextSource(**path), recipe)
                load_texts(Corpus(**path, chat=True), recipe)
                list(corpus_texts(Corpus(**path), recipe, None))
            case "prompts":
                load_prompts(RowSource(**path), recipe, answered=True)
            case "trivia":
                load_trivia(RowSource(**path), recipe, None)

    return read


def _parquet(folder: Path) -> None:
    recipe = Recipe.load(folder.parent / "recipe.toml")
    load_questions(QuestionSource(path="rows/questions.parquet"), recipe)


def _checkpoint(folder: Path) -> None:
    clamped_layers(read_config(folder))
    rehash(folder)  # what reads a file is to meet it, not its hash
    assert open_clamped(folder).base_config["model_type"] == "gemma2"


def _compiled(folder: Path) -> None:
    clamped_layers(read_config(folder, "compiled"))


def _adapter(folder: Path) -> None:
    clamped_layers(read_config(folder, "adapter"))


def _report(folder: Path) -> None:
    report = read_report(folder / "report.json")
    render(facts_of_folder(folder.parent / "checkpoint"), report)
    render_html(report)


def _graph(folder: Path) -> None:
    graph_failures([open_graph("onnx", folder / "model.onnx")], [1], {"a.safetensors": "0" * 64})


def good_files(root: Path) -> Path:
    """Fills a folder with a good file of every kind."""
    from tests.folders import baked_world, manifest_data
    from tests.gguf_files import write_gguf

    baked_world(root, [1, 5, 9])
    tiny_base(root / "sharded", shards=3)
    save_gemma_scope(root / "layer_1", tiny_sae())
    save_gemma_scope_2(root / "scope2/resid_post/layer_1", tiny_sae())
    save_sae_lens(root / "gated", tiny_sae(), architecture="gated")
    rows = root / "rows"
    write_questions(rows / "questions.jsonl", 4, subject="bells")
    write_texts(rows / "texts.jsonl", 4)
    write_jsonl(rows / "prompts.jsonl", [{"prompt": "a b", "answers": ["c", "d"]}] * 3)
    write_jsonl(rows / "trivia.jsonl", [{"question": "a?", "right": "b", "wrong": "c"}] * 3)
    table = [json.loads(line) for line in (rows / "questions.jsonl").read_text().splitlines()]
    parquet.write_table(pa.Table.from_pylist(table), rows / "questions.parquet")
    write_witnesses(root / "checkpoint")
    rehash(root / "checkpoint", WITNESSES)
    (root / "report").mkdir()
    (root / "report/report.json").write_text(json.dumps(full_evidence().to_dict()))
    (root / "adapter").mkdir()
    config = json.loads((root / "checkpoint/config.json").read_text())
    small = {"hidden_size": 32, "vocab_size": 99, "num_hidden_layers": 4}
    adapter = {"peft_type": "SAE_CLAMP", "base_sha256": ["0" * 64], **small}
    adapter["sae_clamp"] = config["sae_clamp"]
    (root / "adapter/adapter_config.json").write_text(json.dumps(adapter))
    write_compiled_manifest(root / "compiled", manifest_data, small)
    (root / "graph").mkdir()
    (root / "graph/model.onnx").write_bytes(_tiny_graph(root / "graph"))
    (root / "gguf").mkdir()
    write_gguf(root / "gguf/model.gguf")
    return root


def write_witnesses(folder: Path) -> None:
    """Witnesses that fit a tiny model."""
    ones = np.ones((1, 3), np.float32)
    np.savez(
        folder / WITNESSES,
        input_ids=np.array([[2, 5, 6, 7]]),
        attention_mask=np.array([[1, 1, 1, 1]]),
        places=np.array([[0, 3]]),
        token_ids=np.array([[1, 2, 3]]),
        logits=ones,
        unclamped=2 * ones,
        sensitivity=np.array([[1e-6]], np.float32),
    )


def write_compiled_manifest(folder: Path, data: Callable[..., Any], small: dict[str, int]) -> None:
    """A manifest and config as a compiled folder has them."""
    folder.mkdir()
    clamp = {
        "layer": 1,
        "hook_point": "blocks.1.hook_resid_post",
        "method": "clamp",
        "parameters": {"value": -6.0},
        "features": [1, 5],
        "k": 2,
        "sae": {"name": "sae", "architecture": "jumprelu", "sha256": "0" * 64},
    }
    distance = {"what": "x", "tokens": 3, "median": 0.1, "largest": 0.2}
    distance["largest_share_of_bound"] = 0.5
    site = {"layers": [2, 3], "flags": 2, "neurons": [4, 4], "parameters": {}, "distance": distance}
    added = {"dtype": "float32", "hidden_size": [32, 40], "layers_added": 2, "kappa": 1.0}
    entry = {**added, "sites": [site]}
    manifest = data({"config.json": "0" * 64}, carrier="compiled", clamps=[clamp], compiled=entry)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "config.json").write_text(json.dumps({**small, "hidden_size": 40}))


def _tiny_graph(folder: Path) -> bytes:
    from onnx import TensorProto, helper

    (folder / "w.bin").write_bytes(bytes(64))
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 4])
    weight.data_location = TensorProto.EXTERNAL
    for key, text in (("location", "w.bin"), ("offset", "0"), ("length", "64")):
        entry = weight.external_data.add()
        entry.key, entry.value = key, text
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])
    model = helper.make_model(helper.make_graph([node], "g", [value], [out], [weight]))
    return bytes(model.SerializeToString())


READERS: dict[str, Reader] = {
    "recipe": Reader("recipe.toml", _recipe, mutators.mutated_toml),
    "sae_config": Reader("sae/cfg.json", _sae, mutators.mutated_json),
    "sae_weights": Reader("sae/sae_weights.safetensors", _sae, mutators.mutated_safetensors),
    "gated_weights": Reader("gated/sae_weights.safetensors", _sae, mutators.mutated_safetensors),
    "gemma_scope": Reader("layer_1/params.npz", _sae, mutators.mutated_npz),
    "reference_npz": Reader("layer_1/params.npz", _reference, mutators.mutated_npz),
    "gemma_scope_2": Reader(
        "scope2/resid_post/layer_1/params.safetensors", _sae, mutators.mutated_safetensors
    ),
    "gemma_scope_2_config": Reader(
        "scope2/resid_post/layer_1/config.json", _sae, mutators.mutated_json
    ),
    "base_config": Reader("base/config.json", _base, mutators.mutated_json),
    "base_weights": Reader("base/model.safetensors", _base, mutators.mutated_safetensors),
    "index": Reader("sharded/model.safetensors.index.json", _base, mutators.mutated_json),
    "manifest": Reader("checkpoint/manifest.json", _manifest, mutators.mutated_json),
    "folder_config": Reader(
        "checkpoint/config.json", _checkpoint, mutators.mutated_json, slow=True
    ),
    "folder_index": Reader(
        "checkpoint/model.safetensors.index.json", _checkpoint, mutators.mutated_json, slow=True
    ),
    "folder_recipe": Reader("checkpoint/recipe.toml", own_recipe, mutators.mutated_toml),
    "folder_manifest": Reader("checkpoint/manifest.json", Manifest.read, mutators.mutated_json),
    "compiled_manifest": Reader("compiled/manifest.json", _compiled, mutators.mutated_json),
    "compiled_config": Reader("compiled/config.json", _compiled, mutators.mutated_json),
    "adapter_config": Reader("adapter/adapter_config.json", _adapter, mutators.mutated_json),
    "witnesses": Reader("checkpoint/witnesses.npz", Witnesses.load, mutators.mutated_npz),
    "questions": Reader("rows/questions.jsonl", _rows("questions"), mutators.mutated_lines),
    "texts": Reader("rows/texts.jsonl", _rows("texts"), mutators.mutated_lines),
    "prompts": Reader("rows/prompts.jsonl", _rows("prompts"), mutators.mutated_lines),
    "trivia": Reader("rows/trivia.jsonl", _rows("trivia"), mutators.mutated_lines),
    "parquet": Reader("rows/questions.parquet", _parquet, mutators.mutated_bytes),
    "report": Reader("report/report.json", _report, mutators.mutated_json, slow=True),
    "onnx": Reader("graph/model.onnx", _graph, mutators.mutated_bytes),
    "gguf": Reader(
        "gguf/model.gguf",
        lambda folder: open_gguf(folder / "model.gguf"),
        mutators.mutated_bytes,
        slow=True,
    ),
}
"""By the names of their folders in `corpus/`."""
