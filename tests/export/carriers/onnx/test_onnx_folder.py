"""`bakeout export onnx`: what it writes, what it refuses, and what a failure leaves behind."""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import tomli_w
import torch

import export.carriers.onnx.onnx_folder as onnx_folder
from bakeout.cli import run
from export.carriers.onnx.graph_weights import SharedWeights
from export.carriers.onnx.wiring import Architecture
from export.clamped import Clamped, open_clamped
from export.manifest import Manifest
from tests.folders import rehash
from tests.worlds import save_sae_lens, tiny_base, tiny_sae
from verify.engines.onnx_files import find_graphs, graph_failures
from verify.evidence.integrity import check_integrity

TABLE = {"sae": {"path": "sae"}, "method": "clamp", "features": [1, 2, 5, 9, 20], "value": -6.0}
ROUNDED = {
    "fp32": "model.onnx",
    "fp16": "model_fp16.onnx",
    "int8": "model_int8.onnx",
    "int4": "model_q4.onnx",
}
ENGINES = {"shared": "onnx", **{name: f"onnx-{name}" for name in ROUNDED}}


def baked(folder: Path, family: str) -> Path:
    tiny_base(folder / "base", family)
    save_sae_lens(folder / "sae", tiny_sae())
    base = {"model": "base", "license": "apache-2.0"}
    recipe = {"schema": 1, "base": base, "clamp": [TABLE]}
    (folder / "recipe.toml").write_text(tomli_w.dumps(recipe))
    assert run(["bake", str(folder / "recipe.toml"), "--out", str(folder / "checkpoint")]) == 0
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return baked(tmp_path_factory.mktemp("original"), "gemma2")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy to work in."""
    return shutil.copytree(original, tmp_path / "checkpoint")


@pytest.fixture(scope="module")
def exported(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with its shared graph; not to be changed."""
    folder = shutil.copytree(original, tmp_path_factory.mktemp("exported") / "checkpoint")
    assert run(["export", "onnx", str(folder)]) == 0
    return folder


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("Writing model")]
    assert out == "" and len(lines) == 1 and lines[0].startswith("error: "), (out, err)
    return lines[0]


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str) -> str:
    """The one line of an export that ends with exit code 2."""
    capsys.readouterr()
    assert run(["export", "onnx", str(folder), *arguments]) == 2
    return error_line(capsys)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def is_whole(folder: Path) -> bool:
    """Every file as the manifest says, and the graphs made of these weights."""
    manifest = Manifest.read(folder)
    broken = check_integrity(folder, manifest)
    return not broken and not graph_failures(find_graphs(folder), [1], manifest.files)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --------------------------------------------------------------------------- what is written


def test_shared_adds_a_graph_and_touches_nothing_else(original: Path, exported: Path) -> None:
    before, after = contents(original), contents(exported)
    assert set(after) - set(before) == {"model.onnx", "genai_config.json"}
    assert {name for name in before if before[name] != after[name]} == {"manifest.json"}
    assert len(after["model.onnx"]) < 100_000
    old, new = (json.loads(data["manifest.json"]) for data in (before, after))
    assert new["files"] == old["files"] | {
        name: sha256(exported / name) for name in ("model.onnx", "genai_config.json")
    }
    assert {**new, "files": None} == {**old, "files": None}
    assert is_whole(exported)


def test_what_the_verb_says_and_the_same_bytes_every_time(
    folder: Path, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert run(["export", "onnx", str(folder)]) == 0
    out, _ = capsys.readouterr()
    assert "clamps 1" in out and "model.onnx" in out and "max |Δlogit|" in out
    assert contents(folder) == contents(exported)


def test_metadata_says_where_the_graph_comes_from(exported: Path) -> None:
    model = onnx.load(exported / "model.onnx", load_external_data=False)
    properties = {entry.key: entry.value for entry in model.metadata_props}
    shards = sorted(exported.glob("*.safetensors"))
    assert len(shards) == 2
    lines = "".join(f"{path.name} {sha256(path)}\n" for path in shards)
    manifest = json.loads((exported / "manifest.json").read_text())
    assert properties == {
        "bakeout.version": manifest["bakeout"],
        "bakeout.exact": "true",
        "bakeout.precision": "shared",
        "bakeout.recipe_sha256": sha256(exported / "recipe.toml"),
        "bakeout.weights_sha256": hashlib.sha256(lines.encode()).hexdigest(),
    }
    assert model.producer_name == "bakeout"
    assert {(f.domain, f.name) for f in model.functions} == {("ai.bakeout", "SAEClamp")}


def test_genai_config_describes_this_model(exported: Path) -> None:
    found = json.loads((exported / "genai_config.json").read_text())
    config = json.loads((exported / "config.json").read_text())
    decoder = found["model"]["decoder"]
    assert found["model"]["type"] == "gemma2" and decoder["filename"] == "model.onnx"
    assert found["model"]["vocab_size"] == config["vocab_size"]
    assert decoder["num_hidden_layers"] == config["num_hidden_layers"]
    assert decoder["num_key_value_heads"] == config["num_key_value_heads"]
    assert decoder["head_size"] == config["head_dim"]
    model = onnx.load(exported / "model.onnx", load_external_data=False)
    names = {value.name for value in (*model.graph.input, *model.graph.output)}
    stated = [*decoder["inputs"].values(), *decoder["outputs"].values()]
    assert {name.replace("%d", "3") for name in stated} <= names


@pytest.mark.parametrize("precision", ROUNDED)
def test_rounded_graph_beside_the_checkpoint(folder: Path, precision: str) -> None:
    before = contents(folder)
    assert run(["export", "onnx", str(folder), "--precision", precision]) == 0
    after, name = contents(folder), f"onnx/{ROUNDED[precision]}"
    assert set(after) - set(before) == {name, f"{name}_data", "genai_config.json"}
    assert {n for n in before if before[n] != after[n]} == {"manifest.json"}
    assert json.loads(after["genai_config.json"])["model"]["decoder"]["filename"] == name
    assert is_whole(folder)
    model = onnx.load(folder / name, load_external_data=False)
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert properties["bakeout.exact"] == "false"
    assert properties["bakeout.precision"] == precision
    # What runtimes for the web lack.
    casts = [a.i for n in model.graph.node if n.op_type == "Cast" for a in n.attribute]
    assert casts and onnx.TensorProto.DOUBLE not in casts
    assert "GatherBlockQuantized" not in {node.op_type for node in model.graph.node}
    clamps = {i.name: i for i in model.graph.initializer if ".sae_clamp." in i.name}
    assert {i.data_type for i in clamps.values()} == {
        onnx.TensorProto.FLOAT,
        onnx.TensorProto.BOOL,
    }


def test_a_shared_graph_is_what_genai_runs_where_both_are(exported: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(exported, tmp_path / "checkpoint")
    assert run(["export", "onnx", str(folder), "--precision", "int4"]) == 0
    config = json.loads((folder / "genai_config.json").read_text())
    assert config["model"]["decoder"]["filename"] == "model.onnx"
    assert is_whole(folder)


@pytest.mark.parametrize("precision", ROUNDED)
def test_a_folder_of_its_own_stands_alone(
    original: Path, tmp_path: Path, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(original)
    out = tmp_path / "alone"
    assert run(["export", "onnx", str(original), "--precision", precision, "--out", str(out)]) == 0
    assert contents(original) == before
    found = set(contents(out))
    graph = f"onnx/{ROUNDED[precision]}"
    assert {graph, f"{graph}_data", "witnesses.npz", "genai_config.json"} <= found
    assert {"config.json", "manifest.json", "recipe.toml", "README.md"} <= found
    assert not [name for name in found if name.endswith((".safetensors", ".py", ".index.json"))]
    capsys.readouterr()
    report = tmp_path / "report.json"
    assert run(["verify", str(out), "--json", str(report)]) == 0
    data = json.loads(report.read_text())
    assert (data["verdict"], data["scope"]) == ("pass", "integrity+witnesses")
    assert list(data["engines"]) == [ENGINES[precision]]


# --------------------------------------------------------------------------- what is refused


def test_an_existing_graph_needs_force(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(exported, tmp_path / "checkpoint")
    before = contents(folder)
    assert "model.onnx: exists; pass --force to replace it" in refused(capsys, folder)
    assert contents(folder) == before
    assert run(["export", "onnx", str(folder), "--force"]) == 0
    assert contents(folder) == before  # the same graph of the same weights


def test_a_changed_shard_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = folder / "model-00001-of-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    before = contents(folder)
    line = refused(capsys, folder)
    assert shard.name in line and "is not the file that the manifest lists" in line
    assert contents(folder) == before


def test_bad_requests(
    folder: Path, original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    out = ["--precision", "int8", "--out"]
    cases: list[tuple[Path, list[str], str]] = [
        (original.parent / "base", [], "has no manifest.json"),
        (tmp_path / "absent", [], "is no folder"),
        (folder / "config.json", [], "is no folder"),
        (folder, ["--precision", "int5"], '"int5"; expected one of shared, fp32, fp16, int8, int4'),
        (folder, ["--out", str(tmp_path / "out")], "expected --out with fp32, fp16, int8, int4"),
        (folder, [*out, str(folder / "inside")], "overlaps the input"),
        (folder, [*out, str(tmp_path / "full")], "exists; choose another folder"),
        (folder, [*out, str(tmp_path / "full"), "--force"], "bakeout did not write it"),
        (folder, ["--precison", "int8"], "precison"),
    ]
    before = contents(tmp_path)
    for place, arguments, message in cases:
        assert message in refused(capsys, place, *arguments)
    assert contents(tmp_path) == before


def test_a_folder_without_a_clamp(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((folder / "config.json").read_text())
    for section in (None, {"schema": 1, "sites": [], "exempt_token_ids": []}):
        changed = {key: value for key, value in config.items() if key != "sae_clamp"}
        if section is not None:
            changed["sae_clamp"] = section
        (folder / "config.json").write_text(json.dumps(changed))
        rehash(folder)
        assert "has no clamp" in refused(capsys, folder)
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "clamped_llama"}))
    rehash(folder)
    assert "model_type is 'clamped_llama'; expected one of" in refused(capsys, folder)
    assert not (folder / "model.onnx").exists()


def test_a_family_that_is_not_supported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = baked(tmp_path, "gemma3")
    before = contents(folder)
    line = refused(capsys, folder)
    assert "family gemma3: cannot be exported to ONNX; expected one of gemma, gemma2" in line
    assert contents(folder) == before


def test_another_carrier(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "carrier": "woven"}))
    assert "is an export already (carrier woven)" in refused(capsys, folder)


@pytest.mark.parametrize("arguments", [[], ["--precision", "int8"], ["--precision", "fp16"]])
def test_not_enough_disk_is_said_before_anything_is_written(
    folder: Path,
    tmp_path: Path,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        "bake.new_folder.shutil.disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 9)
    )
    before = contents(folder)
    targets = [[], ["--out", str(tmp_path / "out")]] if arguments else [[]]
    for target in targets:
        line = refused(capsys, folder, *arguments, *target)
        assert "MB free" in line and "needs" in line
    assert contents(folder) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


# --------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("arguments", [[], ["--precision", "int4"], ["--out"]])
def test_a_disk_that_fills_up_leaves_nothing(
    folder: Path,
    tmp_path: Path,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fill(clamped: Clamped, architecture: Architecture, precision: Any, graph: Path) -> None:
        graph.write_bytes(b"half")
        graph.with_name(f"{graph.name}_data").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(onnx_folder, "write_graph", fill)
    if arguments == ["--out"]:
        arguments = ["--precision", "int8", "--out", str(tmp_path / "out")]
    before = contents(folder)
    assert "the disk is full; nothing was kept" in refused(capsys, folder, *arguments)
    assert contents(folder) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


def unclamped(monkeypatch: pytest.MonkeyPatch) -> None:
    read = Architecture.from_config
    monkeypatch.setattr(Architecture, "from_config", lambda config: replace(read(config), sites={}))


def bos_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    read = Architecture.from_config
    ids = tuple(range(99))
    monkeypatch.setattr(
        Architecture, "from_config", lambda config: replace(read(config), exempt_token_ids=ids)
    )


def swapped_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = SharedWeights.exact

    def swap(self: SharedWeights, g: Any, name: str) -> str:
        pair = ("gate_proj", "up_proj")
        if name.startswith("model.layers.2.mlp.") and any(word in name for word in pair):
            here, there = pair if pair[0] in name else reversed(pair)
            name = name.replace(here, there)
        return exact(self, g, name)

    monkeypatch.setattr(SharedWeights, "exact", swap)


def no_function(monkeypatch: pytest.MonkeyPatch) -> None:
    make = onnx_folder.make_model
    monkeypatch.setattr(
        onnx_folder, "make_model", lambda graph, functions, **rest: make(graph, **rest)
    )


def no_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    read = Architecture.from_config
    monkeypatch.setattr(
        Architecture, "from_config", lambda config: replace(read(config), windows=(1,) * 4)
    )


DEFECTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "no clamp": (unclamped, "it holds 0 of 1 SAEClamp nodes"),
    "a clamp that spares every token": (bos_everywhere, "it shows -?0.00 of the clamp's effect"),
    "weights swapped": (swapped_weights, "its logits differ from the checkpoint's by"),
    "attention to nothing else": (no_attention, "its logits differ from the checkpoint's by"),
    "no function": (no_function, "a fresh process refuses it"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_graph_that_is_not_the_checkpoint_is_not_kept(
    folder: Path,
    defect: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plant, message = DEFECTS[defect]
    plant(monkeypatch)
    before = contents(folder)
    line = refused(capsys, folder)
    assert "the graph was not kept" in line and re.search(message, line)
    assert contents(folder) == before


def test_rounded_graphs_are_held_to_the_clamp_s_effect(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bos_everywhere(monkeypatch)
    before = contents(folder)
    arguments = ["--precision", "int8", "--out", str(tmp_path / "out")]
    assert "of the clamp's effect (bar 0.5)" in refused(capsys, folder, *arguments)
    assert "the graph was not kept" in refused(capsys, folder, *arguments[:2])
    assert contents(folder) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


@pytest.mark.parametrize("rounding", [0.1, 2.0, 6.0])
def test_what_rounding_does_beside_the_clamp_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounding: float
) -> None:
    """A clamp that moves logits by 10, in a graph whose rounding moves them towards the base."""
    checkpoint, base = torch.full((3, 4), 10.0), torch.zeros(3, 4)
    witnesses = SimpleNamespace(
        **dict.fromkeys(("input_ids", "attention_mask", "places", "token_ids"), torch.ones(1)),
        **{"logits": checkpoint, "unclamped": base, "rounding": 0.0},
    )

    def answer(*arguments: str, scratch: Path) -> None:
        shift = rounding * np.ones((3, 4))
        np.savez(arguments[-1], n_clamps=1, logits=10 - shift, unclamped=-shift)

    monkeypatch.setattr(onnx_folder.confined, "run", answer)
    check: Any = onnx_folder.check_graph
    if rounding > 5:
        with pytest.raises(onnx_folder.CheckError, match=r"nearer the base's than the checkpoint"):
            check(witnesses, tmp_path, n_clamps=1, exact=False)
        return
    found = check(witnesses, tmp_path, n_clamps=1, exact=False)
    assert (found.error, found.effect, found.shown) == pytest.approx((rounding, 10.0, 1.0))
    assert found.warning is None
    warning = found.model_copy(update={"error": 5.5}).warning
    assert (
        warning is not None and "up to 5.5, the clamp by up to 10, of which 100% shows" in warning
    )


def test_a_clamp_that_nothing_fires_cannot_be_checked(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "witnesses.npz").unlink()
    assert "witnesses.npz is missing" in refused(capsys, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]["witnesses.npz"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(onnx_folder, "find_witnesses", lambda *_: None)
    assert "no prompt was found that fires its clamp" in refused(capsys, folder)
    assert not (folder / "model.onnx").exists()


def is_whole_alone(folder: Path) -> bool:
    return not check_integrity(folder, Manifest.read(folder)) and bool(find_graphs(folder))


def test_write_graph_alone_writes_the_data_file_beside(original: Path, tmp_path: Path) -> None:
    clamped = open_clamped(original)
    graph = tmp_path / "some.onnx"
    onnx_folder.write_graph(clamped, Architecture.from_config(clamped.config), "int4", graph)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["some.onnx", "some.onnx_data"]
    model = onnx.load(graph)  # with its data
    shape = clamped.tensors["model.norm.weight"].shape
    norm = next(i for i in model.graph.initializer if i.name == "model.norm.weight")
    np.testing.assert_array_equal(
        onnx.numpy_helper.to_array(norm), clamped.tensors["model.norm.weight"].array()
    )
    assert tuple(norm.dims) == shape
