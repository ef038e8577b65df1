"""No place on the user's machine leaves in a file that bakeout writes, whatever its inputs say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tomli_w

from bake.reading.model_config import is_local_path, without_paths
from bakeout.cli import run
from tests.gguf_files import write_gguf
from tests.reports import error_line
from tests.worlds import (
    save_sae_lens,
    tiny_base,
    tiny_sae,
    tiny_tokenizer,
    write_questions,
    write_texts,
)


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A recipe that names everything by absolute paths, over a base that says where it lay."""
    tiny_tokenizer(tiny_base(tmp_path / "base"))
    config = tmp_path / "base/config.json"
    data = json.loads(config.read_text())
    places = {"_name_or_path": str(tmp_path / "base"), "tokenizer_file": f"{tmp_path}/t.json"}
    inner = {"rope_parameters": (data.get("rope_parameters") or {}) | places}
    config.write_text(json.dumps(data | places | inner))
    save_sae_lens(tmp_path / "sae", tiny_sae())
    for name in ("forget", "retain"):
        write_questions(tmp_path / f"{name}.jsonl", 3, subject="bells")
    write_texts(tmp_path / "text.jsonl", 3)
    clamp = {"sae": {"path": str(tmp_path / "sae")}, "method": "clamp"}
    recipe = {
        "schema": 1,
        "base": {"model": str(tmp_path / "base"), "license": "apache-2.0"},
        "clamp": [clamp | {"features": [1, 5], "value": -6.0}],
        "verify": {
            "forget_questions": {"path": str(tmp_path / "forget.jsonl")},
            "retain_questions": {"path": str(tmp_path / "retain.jsonl")},
            "text": {"path": str(tmp_path / "text.jsonl")},
        },
    }
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(recipe))
    return tmp_path


def test_no_carrier_names_a_place_on_this_machine(world: Path) -> None:
    out = world / "out"
    report = out / "report.json"
    for arguments in (
        ["bake", str(world / "recipe.toml"), "--out", str(out / "checkpoint"), "--witnesses"],
        ["export", "compiled", str(out / "checkpoint"), "--out", str(out / "compiled")],
        ["export", "adapter", str(out / "checkpoint"), "--out", str(out / "adapter")],
        ["export", "onnx", str(out / "checkpoint")],
        ["export", "onnx", str(out / "checkpoint"), "--precision", "int8"],
        ["verify", str(out / "checkpoint"), "--only", "integrity", "--json", str(report)],
        ["verify", str(out / "compiled"), "--only", "integrity", "--html", str(out / "r.html")],
        ["card", str(out / "checkpoint"), "--report", str(report)],
    ):
        assert run(arguments) == 0, arguments
    written = [path for path in out.rglob("*") if path.is_file()]
    assert len(written) > 25
    for path in written:
        assert str(world).encode() not in path.read_bytes(), path.relative_to(out)


def test_no_imported_gguf_names_a_place_on_this_machine(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_gguf(tmp_path / "in/model.gguf")
    assert (
        run(["import-gguf", str(tmp_path / "in/model.gguf"), "--out", str(tmp_path / "out")]) == 0
    )
    for path in (tmp_path / "out").iterdir():
        data = path.read_bytes()
        assert str(tmp_path).encode() not in data and b"/tmp/" not in data, path.name
        assert b"bakeout-gguf-" not in data, path.name


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
def test_a_companion_that_names_a_place_is_not_copied(
    name: str, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = world / "base" / name
    path.write_text(json.dumps(json.loads(path.read_text()) | {"name_or_path": str(world)}))
    capsys.readouterr()
    assert run(["bake", str(world / "recipe.toml"), "--out", str(world / "out"), "--dry-run"]) == 2
    assert f"{name} says name_or_path = " in error_line(capsys)


@pytest.mark.parametrize(
    ("value", "local"),
    [
        ("/home/me/gemma", True),
        ("~/gemma", True),
        ("C:\\models\\gemma", True),
        ("\\\\host\\gemma", True),
        ("file:///models/gemma", True),
        ("google/gemma-2-2b", False),
        ("gelu_pytorch_tanh", False),
        ("</s>", False),
        ("/", False),
        ("~", False),
        (7, False),
    ],
)
def test_what_is_taken_for_a_place(value: object, local: bool) -> None:
    assert is_local_path(value) is local
    assert without_paths({"a": value, "b": {"c": value}}) == (
        {"b": {}} if local else {"a": value, "b": {"c": value}}
    )
