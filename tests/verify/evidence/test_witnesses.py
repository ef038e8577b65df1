"""Witnesses: made when a folder is baked, and what they show of folders that were tampered with."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tomli_w
import torch
from safetensors.numpy import load_file, save_file

from bake.errors import FolderError
from bake.recipe import Recipe
from bake.stock import load_base
from bakeout.cli import run
from bakeout.verbs.baking import witness_prompts
from export.clamped import open_clamped, weights_sha256
from export.witness_file import Witnesses
from export.witness_prompts import LENGTH, MOST, find_witnesses
from tests.clamps import METHOD_TABLES
from tests.defects import rewrite_file
from tests.engines import InProcess
from tests.worlds import (
    VOCAB,
    cut,
    room_for,
    sae_table,
    save_gemma_scope,
    save_sae_lens,
    tiny_base,
    tiny_sae,
    tiny_tokenizer,
    write_questions,
    write_texts,
)
from verify.engines.onnx_files import find_graphs
from verify.evidence.witnesses import load_witnesses
from verify.reference.oracle import Oracle
from verify.reference.whole_sae import load_sites
from verify.report.findings import VerifyReport
from verify.run import verify_folder

FEATURES = [1, 5, 9, 20, 33]
ARRAYS = (
    "input_ids",
    "attention_mask",
    "places",
    "token_ids",
    "logits",
    "unclamped",
    "sensitivity",
)
CLAMP_SHARD, SHARD = "model-sae-clamp.safetensors", "model-00001-of-00001.safetensors"


def write_recipe(folder: Path, name: str, *tables: dict[str, Any], questions: bool) -> Path:
    verify = {
        "forget_questions": {"path": "forget.jsonl"},
        "retain_questions": {"path": "retain.jsonl"},
        "text": {"path": "text.jsonl"},
    }
    data: dict[str, Any] = {
        "schema": 1,
        "base": {"model": "base", "license": "apache-2.0"},
        "clamp": [
            {**sae_table(sae), "features": FEATURES, **table}
            for sae, table in zip(("sae", "layer_2"), tables, strict=False)
        ],
    }
    path = folder / f"{name}.toml"
    path.write_text(tomli_w.dumps({**data, "verify": verify} if questions else data))
    return path


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a tokenizer, SAEs, questions, and `checkpoint/` with graphs in it."""
    folder = tmp_path_factory.mktemp("work")
    tiny_tokenizer(tiny_base(folder / "base"))
    save_sae_lens(folder / "sae", tiny_sae())
    save_gemma_scope(folder / "layer_2", tiny_sae(1))
    write_questions(folder / "forget.jsonl", 90, seed=1)
    write_questions(folder / "retain.jsonl", 5, seed=2)
    write_texts(folder / "text.jsonl", 2)
    bake(folder, "checkpoint", METHOD_TABLES["clamp"], questions=True)
    for precision in ("shared", "int8"):
        assert run(["export", "onnx", str(folder / "checkpoint"), "--precision", precision]) == 0
    return folder


def bake(work: Path, name: str, *tables: dict[str, Any], questions: bool) -> Path:
    recipe = write_recipe(work, name, *tables, questions=questions)
    assert run(["bake", str(recipe), "--out", str(work / name)]) == 0
    return work / name


@pytest.fixture
def folder(work: Path, tmp_path: Path) -> Path:
    """A copy to work in, with a shared graph and one in int8."""
    return shutil.copytree(work / "checkpoint", tmp_path / "checkpoint")


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("verify.engines.engines.TorchRunner", InProcess)


def hash_again(folder: Path, *names: str) -> None:
    for name in names:
        rewrite_file(folder, name, (folder / name).read_bytes())


def change_graph(folder: Path, name: str, change: Callable[[onnx.ModelProto], None]) -> None:
    """Change a graph, and its hash in the manifest."""
    model = onnx.load(folder / name, load_external_data=False)
    change(model)
    rewrite_file(folder, name, model.SerializeToString())


# --------------------------------------------------------------------------- how they are made


def assert_true(found: Witnesses, recipe: Recipe) -> None:
    """Layout, and that the logits are the hooked reference's and the base's."""
    n, seq = found.input_ids.shape
    m, w = found.token_ids.shape
    assert 1 <= n <= MOST and seq <= LENGTH and m >= n and 50 < w <= VOCAB
    assert found.places.shape == (m, 2) and found.logits.shape == found.unclamped.shape == (m, w)
    assert found.logits.dtype == found.unclamped.dtype == torch.float32
    for row, mask in zip(found.input_ids, found.attention_mask, strict=True):
        begin = int(mask.argmax())
        assert mask[begin:].all() and not mask[:begin].any()  # padded on the left
        assert row[begin] == 2 and not (row[begin + 1 :] == 2).any()
    rows, columns = found.places.unbind(-1)
    assert found.attention_mask[rows, columns].all() and set(rows.tolist()) == set(range(n))
    assert all(len(set(row)) == w for row in found.token_ids.tolist())
    oracle = Oracle(load_base(recipe, dtype="float32"), load_sites(recipe))
    given = {
        "input_ids": found.input_ids,
        "attention_mask": found.attention_mask,
        "position_ids": (found.attention_mask.cumsum(-1) - 1).clamp(min=0),
        "use_cache": False,
    }

    def recorded(logits: torch.Tensor) -> torch.Tensor:
        return logits[rows, columns].gather(-1, found.token_ids)

    with torch.no_grad():
        base = recorded(oracle.model(**given).logits)
        with oracle.applied() as hooked:
            reference = recorded(hooked(**given).logits)
    assert oracle.tokens_fired >= n
    assert (reference - found.logits).abs().max() <= 1e-4
    assert (base - found.unclamped).abs().max() <= 1e-4
    assert (reference - base).abs().amax(dim=-1).min() > 1e-3  # the clamp shows at every place


@pytest.mark.parametrize("questions", [True, False])
@pytest.mark.parametrize("method", ["conditional clamp", "refusal", "scale"])
def test_baking_writes_them(work: Path, method: str, questions: bool) -> None:
    name = f"{method.split()[0]}-{questions}"
    folder = bake(work, name, METHOD_TABLES[method], METHOD_TABLES[method], questions=questions)
    found = Witnesses.load(folder)
    recipe = Recipe.load(work / f"{name}.toml")
    assert_true(found, recipe)
    manifest = json.loads((folder / "manifest.json").read_text())
    stored = hashlib.sha256((folder / "witnesses.npz").read_bytes()).hexdigest()
    assert manifest["files"]["witnesses.npz"] == stored
    asked = {tuple(ids[:k]) for ids in witness_prompts(recipe) for k in range(1, len(ids) + 1)}
    taken = {
        tuple(row[mask.bool()].tolist())
        for row, mask in zip(found.input_ids, found.attention_mask, strict=True)
    }
    assert (taken <= asked) == questions  # beginnings of forget questions, or arbitrary tokens


def test_they_are_the_same_every_time_and_hold_no_path(work: Path, tmp_path: Path) -> None:
    folder = work / "checkpoint"
    clamped = open_clamped(folder)
    prompts = witness_prompts(Recipe.load(work / "checkpoint.toml"))
    assert len(prompts) == 90 and all(ids[0] == 2 for ids in prompts)
    again = find_witnesses(clamped, prompts)
    assert again is not None
    again.save(tmp_path)
    data = (tmp_path / "witnesses.npz").read_bytes()
    assert data == (folder / "witnesses.npz").read_bytes()
    assert str(work).encode() not in data
    with np.load(folder / "witnesses.npz", allow_pickle=False) as arrays:
        assert tuple(arrays) == ARRAYS
    with room_for(500, layer=0) as asked:
        halved = find_witnesses(clamped, prompts)
    assert asked[:4] == [855, 418, 418, 19] and halved is not None  # of 45 prompts, 19 tokens each
    assert torch.equal(halved.input_ids, again.input_ids)
    assert torch.equal(halved.token_ids, again.token_ids)
    torch.testing.assert_close(halved.logits, again.logits)


def test_they_show_every_feature_that_their_candidates_show(work: Path) -> None:
    """Counted by the oracle, on the questions themselves."""
    recipe = Recipe.load(work / "checkpoint.toml")
    oracle = Oracle(load_base(recipe, dtype="float32"), load_sites(recipe))

    def seen(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), oracle.applied() as hooked:
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            hooked(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
        return oracle.last_active[1].any(dim=0)

    shown = torch.zeros(len(FEATURES), dtype=torch.bool)
    for ids in witness_prompts(recipe)[::2]:  # of 90 every second one is tried
        row = torch.tensor([ids[:LENGTH]])
        shown |= seen(row, torch.ones_like(row))
    found = Witnesses.load(work / "checkpoint")
    assert torch.equal(seen(found.input_ids, found.attention_mask), shown)


def test_where_nothing_fires_there_are_none(work: Path) -> None:
    silent = {**METHOD_TABLES["clamp"], "trigger": 1e6}
    folder = bake(work, "silent", silent, questions=True)
    assert not (folder / "witnesses.npz").exists()
    assert find_witnesses(open_clamped(folder), []) is None
    assert load_witnesses(folder) is None


def test_a_rare_feature_is_found_by_search(work: Path) -> None:
    """One that fires on few of many random tokens: prompts are changed until it does."""
    rare = {**METHOD_TABLES["clamp"], "features": [5], "trigger": 2.5}
    folder = bake(work, "rare", rare, questions=False)
    assert_true(Witnesses.load(folder), Recipe.load(work / "rare.toml"))


def test_the_command_line_may_leave_them_out(work: Path) -> None:
    for flag, there in (("--no-witnesses", False), ("--witnesses", True)):
        out = work / flag.strip("-")
        assert run(["bake", str(work / "checkpoint.toml"), "--out", str(out), flag]) == 0
        assert (out / "witnesses.npz").exists() == there


def test_exporting_makes_them_where_there_are_none(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = work / "checkpoint.toml", tmp_path / "out"
    assert run(["bake", str(recipe), "--out", str(out), "--no-witnesses"]) == 0
    capsys.readouterr()
    assert run(["verify", str(out), "--only", "witnesses"]) == 2
    said = capsys.readouterr().err
    assert "error: out: has no witnesses; expected some, which `bakeout bake" in said
    assert run(["verify", str(out)]) == 0
    assert run(["export", "onnx", str(out)]) == 0
    assert_true(Witnesses.load(out), Recipe.load(recipe))
    assert run(["verify", str(out), "--only", "integrity"]) == 0


# --------------------------------------------------------------------------- what they show


def test_a_stranger_verifies_every_engine(work: Path, tmp_path: Path) -> None:
    """From the command line, with the folder alone; the checkpoint in a process of its own."""
    report = tmp_path / "report.json"
    assert run(["verify", str(work / "checkpoint"), "--json", str(report)]) == 0
    data = json.loads(report.read_text())
    assert (data["verdict"], data["scope"]) == ("pass", "integrity+witnesses")
    assert list(data["engines"]) == ["checkpoint", "onnx", "onnx-int8"]
    assert str(work) not in report.read_text()


@pytest.mark.usefixtures("in_process")
def test_what_a_good_folder_measures(work: Path) -> None:
    found = verify_folder(work / "checkpoint")
    assert (found.verdict, found.scope) == ("pass", "integrity+witnesses")
    witnesses = Witnesses.load(work / "checkpoint")
    for name in ("checkpoint", "onnx", "onnx-int8"):
        engine = found.engine(name)
        assert engine is not None and engine.witnessed is not None and engine.parity is None
        assert engine.witnessed.tokens == len(witnesses.places)
        exact = name != "onnx-int8"
        assert (engine.witnessed.max_abs_logit <= witnesses.rounding < 1e-4) == exact
        assert engine.witnessed.effect == pytest.approx(1.0, abs=1e-4 if exact else 0.2)


def failed(report: VerifyReport) -> dict[str, set[str]]:
    """What failed, by engine."""
    found: dict[str, set[str]] = {}
    for failure in report.failures:
        found.setdefault(failure.engine, set()).add(failure.kind)
    return found


@pytest.fixture(scope="module")
def conditional(work: Path) -> Path:
    """A folder with two clamps that act above a trigger."""
    method = METHOD_TABLES["conditional clamp"]
    return bake(work, "changed", method, method, questions=True)


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("tensor", "index", "add"), [("value", 1, 0.05), ("theta", 1, 40.0), ("W_dec", (1, 3), 0.2)]
)
def test_a_changed_clamp_with_new_hashes_fails(
    conditional: Path, tmp_path: Path, tensor: str, index: Any, add: float
) -> None:
    folder = shutil.copytree(conditional, tmp_path / "changed")
    tensors = load_file(folder / CLAMP_SHARD)
    tensors[f"model.layers.1.sae_clamp.{tensor}"][index] += np.float32(add)
    save_file(tensors, folder / CLAMP_SHARD, metadata={"format": "pt"})
    hash_again(folder, CLAMP_SHARD)
    found = verify_folder(folder)
    assert (found.verdict, failed(found)) == ("fail", {"checkpoint": {"witnesses"}})
    assert found.failures[0].what == "max_abs_logit"


@pytest.mark.usefixtures("in_process")
def test_a_clamp_that_was_switched_off_shows_none_of_its_effect(folder: Path) -> None:
    """In the checkpoint and, through the same bytes, in the graph that is bound to them anew."""
    tensors = load_file(folder / CLAMP_SHARD)
    tensors["model.layers.1.sae_clamp.scale"][:] = 1.0
    tensors["model.layers.1.sae_clamp.value"][:] = 0.0
    save_file(tensors, folder / CLAMP_SHARD, metadata={"format": "pt"})
    hash_again(folder, CLAMP_SHARD)
    manifest = json.loads((folder / "manifest.json").read_text())
    new = weights_sha256({name: manifest["files"][name] for name in (CLAMP_SHARD, SHARD)})

    def bind(model: onnx.ModelProto) -> None:
        for entry in model.metadata_props:
            if entry.key == "bakeout.weights_sha256":
                entry.value = new

    for name in ("model.onnx", "onnx/model_int8.onnx"):
        change_graph(folder, name, bind)
    found = verify_folder(folder)
    assert failed(found) == {"checkpoint": {"witnesses"}, "onnx": {"witnesses"}}
    for name in ("checkpoint", "onnx"):
        engine = found.engine(name)
        assert engine is not None and engine.witnessed is not None
        assert engine.witnessed.effect == pytest.approx(0.0, abs=1e-4)
    rounded = found.engine("onnx-int8")  # has a copy of its own
    assert rounded is not None and rounded.witnessed is not None
    assert rounded.witnessed.effect > 0.8


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("name", ["model.onnx", "onnx/model_int8.onnx"])
def test_a_graph_without_its_clamp_is_no_graph_of_this_folder(folder: Path, name: str) -> None:
    def drop(model: onnx.ModelProto) -> None:
        (clamp,) = (node for node in model.graph.node if node.op_type == "SAEClamp")
        clamp.op_type, clamp.domain = "Identity", ""
        del clamp.input[1:]

    change_graph(folder, name, drop)
    found = verify_folder(folder)
    engine = "onnx" if name == "model.onnx" else "onnx-int8"
    assert failed(found) == {engine: {"integrity"}}
    assert f"{name}: holds 0 clamps, config.json places 1" in str(found.failures[0])


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("name", ["model.onnx", "onnx/model_int8.onnx"])
def test_a_clamp_that_stands_aside_in_the_graph_is_seen(folder: Path, name: str) -> None:
    """The node is there, and its output is used by nobody; or its body does nothing."""

    def bypass(model: onnx.ModelProto) -> None:
        (clamp,) = (node for node in model.graph.node if node.op_type == "SAEClamp")
        for node in model.graph.node:
            for i, used in enumerate(node.input):
                if used == clamp.output[0]:
                    node.input[i] = clamp.input[0]

    def hollow(model: onnx.ModelProto) -> None:
        (body,) = model.functions
        del body.node[:]
        body.node.append(onnx.helper.make_node("Identity", ["h"], ["output"]))

    for defect in (bypass, hollow):
        original = (folder / name).read_bytes()
        change_graph(folder, name, defect)
        engine = "onnx" if name == "model.onnx" else "onnx-int8"
        assert failed(verify_folder(folder)) == {engine: {"integrity"}}
        found = verify_folder(folder, only=frozenset({"witnesses"}))
        assert failed(found) == {engine: {"witnesses"}}
        rewrite_file(folder, name, original)


@pytest.mark.usefixtures("in_process")
def test_a_changed_shard_makes_every_graph_of_it_stale(folder: Path) -> None:
    path = folder / SHARD
    data = bytearray(path.read_bytes())
    data[-4:] = np.float32(0.5).tobytes()
    rewrite_file(folder, SHARD, bytes(data))
    found = verify_folder(folder)
    assert found.scope == "integrity" and found.engines == ()  # nothing was run
    assert failed(found) == {"onnx": {"integrity"}, "onnx-int8": {"integrity"}}
    for name, failure in zip(("model.onnx", "onnx/model_int8.onnx"), found.failures, strict=True):
        assert failure.what == (
            f"{name}: was made from other weights than the folder holds; export it again"
        )


def test_a_changed_graph_or_witness_is_seen_by_its_hash(folder: Path) -> None:
    for name in ("witnesses.npz", "onnx/model_int8.onnx_data", "model.onnx"):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        found = verify_folder(folder)
        assert [str(failure.what) for failure in found.failures] == [f"{name}: changed"]
        (folder / name).write_bytes(data)


# --------------------------------------------------------------------------- damaged files


def one_line(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a verification that ends with exit code 2."""
    capsys.readouterr()
    assert run(["verify", str(folder), *arguments]) == 2
    out, err = capsys.readouterr()
    bar = "Loading weights"  # of the checkpoint, which is in this process here
    (line,) = (line for line in err.splitlines() if line and not line.startswith(bar))
    assert out == "" and line.startswith("error: ")
    return line


def arrays_of(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "witnesses.npz") as found:
        return {name: found[name] for name in found}


def wrong_arrays(folder: Path) -> list[dict[str, Any]]:
    arrays, padded = arrays_of(folder), ("input_ids", "attention_mask")
    return [
        {name: array for name, array in arrays.items() if name != "unclamped"},
        {**arrays, "more": np.zeros(1)},
        {**arrays, "logits": arrays["logits"][:0]},
        {**arrays, "logits": arrays["logits"][:, :-1]},
        {**arrays, "places": arrays["places"] + 1000},
        {**arrays, "token_ids": arrays["token_ids"] + 10**6},
        {**arrays, "token_ids": arrays["token_ids"].astype(np.float32)},
        {**arrays, "input_ids": arrays["input_ids"] + 10**6},
        {**arrays, "input_ids": arrays["input_ids"] - 10**6},
        {**arrays, "attention_mask": arrays["attention_mask"][:, 1:]},
        {**arrays, "attention_mask": arrays["attention_mask"] * 0},
        arrays | {name: np.pad(arrays[name], ((0, 0), (0, 1))) for name in padded},
        {**arrays, "logits": arrays["logits"].astype(object)},
        {**arrays, "logits": arrays["logits"].astype("U8")},
        {**arrays, "logits": arrays["logits"] * np.float32("nan")},
        {**arrays, "unclamped": arrays["logits"]},
    ]


@pytest.mark.usefixtures("in_process")
def test_damaged_witnesses_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = (folder / "witnesses.npz").read_bytes()
    for data in (good[: len(good) // 2], b"", b"not a zip", good[:100] + b"\0" * 400 + good[500:]):
        rewrite_file(folder, "witnesses.npz", data)
        assert "witnesses.npz: " in one_line(folder, capsys)
    rewrite_file(folder, "witnesses.npz", good)
    for arrays in wrong_arrays(folder):
        np.savez(folder / "witnesses.npz", **arrays)
        hash_again(folder, "witnesses.npz")
        line = one_line(folder, capsys, "--only", "integrity", "witnesses")
        assert ("witnesses.npz: " in line and "expected" in line) or "cannot be read" in line
        with pytest.raises(FolderError):
            Witnesses.load(folder)  # an export looks at stored witnesses too
        rewrite_file(folder, "witnesses.npz", good)


@pytest.mark.usefixtures("in_process")
def test_external_data_may_not_lead_out_of_the_folder(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outside = tmp_path / "outside.safetensors"
    shutil.copyfile(folder / SHARD, outside)
    good = (folder / "model.onnx").read_bytes()

    def point(location: str) -> Callable[[onnx.ModelProto], None]:
        def change(model: onnx.ModelProto) -> None:
            tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = location

        return change

    for location in ("../outside.safetensors", str(outside), f"onnx/../../{outside.name}", ""):
        change_graph(folder, "model.onnx", point(location))
        line = one_line(folder, capsys)
        assert "model.onnx" in line and "expected a file beside the graph" in line
    rewrite_file(folder, "model.onnx", good)
    (folder / SHARD).unlink()
    (folder / SHARD).symlink_to(outside)  # the same bytes, and the same hash
    (failure,) = verify_folder(folder).failures
    assert failure.what == f"{SHARD}: is a link, which is followed in the hub's cache only"
    line = one_line(folder, capsys, "--only", "witnesses")
    assert SHARD in line and "is a link" in line


@pytest.mark.usefixtures("in_process")
def test_a_constant_may_not_lead_out_either(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """External data of a node's attribute, which is no initializer."""

    def hide(model: onnx.ModelProto) -> None:
        tensor = onnx.TensorProto(
            data_type=onnx.TensorProto.FLOAT,
            dims=[1],
            data_location=onnx.TensorProto.EXTERNAL,
        )
        for key, value in (("location", "../outside"), ("offset", "0"), ("length", "4")):
            tensor.external_data.add(key=key, value=value)
        (clamp,) = (node for node in model.graph.node if node.op_type == "SAEClamp")
        at = list(model.graph.node).index(clamp)
        constant = onnx.helper.make_node("Constant", [], ["hidden"], name="hidden", value=tensor)
        add = onnx.helper.make_node("Add", [clamp.input[0], "hidden"], ["added"], name="added")
        clamp.input[0] = "added"
        model.graph.node.insert(at, add)
        model.graph.node.insert(at, constant)

    (tmp_path / "outside").write_bytes(b"\0" * 4)
    change_graph(folder, "model.onnx", hide)
    for only in ([], ["--only", "witnesses"]):
        line = one_line(folder, capsys, *only)
        assert 'lies in "../outside"; expected a file beside the graph' in line


def test_another_graph_may_be_of_other_versions(folder: Path) -> None:
    def bypass(model: onnx.ModelProto) -> None:
        node = model.graph.node[0]
        more = onnx.helper.make_node("Identity", [node.output[0]], ["hidden"], name="hidden")
        model.graph.node.insert(1, more)

    change_graph(folder, "model.onnx", bypass)
    said = str(verify_folder(folder).failures[0])
    assert "model.onnx: has node hidden" in said and "was written with" not in said
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["tools"]["torch"] = "2.0.1"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    said = str(verify_folder(folder).failures[0])
    assert "model.onnx: has node hidden" in said and "was written with torch 2.0.1 (here" in said


@pytest.mark.usefixtures("in_process")
def test_damaged_graphs_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = (folder / "model.onnx").read_bytes()
    for data in (b"", good[: len(good) // 2], good[:-1], b"\xff" * 500):
        rewrite_file(folder, "model.onnx", data)
        line = one_line(folder, capsys)
        assert "model.onnx: " in line and "export or download it again" in line

    def shift(key: str, value: str) -> Callable[[onnx.ModelProto], None]:
        def change(model: onnx.ModelProto) -> None:
            tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
            for entry in tensor.external_data:
                if entry.key == key:
                    entry.value = value

        return change

    for key, value in (("offset", "999999999"), ("length", "-4"), ("offset", "ten")):
        rewrite_file(folder, "model.onnx", good)
        change_graph(folder, "model.onnx", shift(key, value))
        assert "model.onnx" in one_line(folder, capsys)
    rewrite_file(folder, "model.onnx", good)
    assert len(find_graphs(folder)) == 2


@pytest.mark.usefixtures("in_process")
def test_missing_and_short_data_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = "onnx/model_int8.onnx_data"
    cut(folder / data, 5000)
    hash_again(folder, data)
    assert "lies beyond the end of model_int8.onnx_data" in one_line(folder, capsys)
    (folder / data).unlink()
    assert [f.what for f in verify_folder(folder).failures] == [f"{data}: missing"]
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"][data]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "needs model_int8.onnx_data, which is not there" in one_line(folder, capsys)
