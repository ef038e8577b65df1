from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bake.base import open_base
from bake.errors import ModelError, OutputError
from bake.importing import import_gguf as importing
from bake.importing.import_gguf import import_gguf
from bakeout.cli import run
from tests.gguf_files import write_gguf
from tests.worlds import tiny_tokenizer


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3"])
def test_every_tensor_is_what_transformers_reads(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = write_gguf(tmp_path / "model.gguf", architecture)
    monkeypatch.setattr(importing, "ROW_BYTES", 4 * 64 * 7)  # several parts of a tensor
    import_gguf(file, tmp_path / "base")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=torch.bfloat16
    ).state_dict()
    ours = tensors_of(tmp_path / "base")
    assert ours.keys() == theirs.keys() - {"lm_head.weight"}
    for name, tensor in ours.items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, theirs[name]), name
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert loaded.dtype == torch.bfloat16
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    rebuilt = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    text = "ab a<start_of_turn>\n dab!"
    assert tokenizer(text)["input_ids"] == rebuilt(text)["input_ids"]
    assert tokenizer(text)["input_ids"].count(2) == 1
    base = open_base(tmp_path / "base", name="base", revision=None)
    assert (base.n_layers, base.d_in) == (3, 64)
    config = json.loads((tmp_path / "base/config.json").read_text())
    assert str(tmp_path) not in json.dumps(config)


def test_what_lies_beside_the_file_is_not_read(tmp_path: Path) -> None:
    """A stranger's folder: another tokenizer and config, and code that would run."""
    import_gguf(write_gguf(tmp_path / "alone.gguf"), tmp_path / "alone")
    folder = tmp_path / "stranger"
    file = write_gguf(tiny_tokenizer(folder) / "alone.gguf")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    evil = {"auto_map": {"AutoConfig": "evil.X", "AutoTokenizer": ["evil.X", "evil.X"]}}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **evil}))
    known = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**known, **evil}))
    import_gguf(file, tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    for path in (tmp_path / "alone").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_large_model_is_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_gguf(tmp_path / "model.gguf")
    import_gguf(file, tmp_path / "one")
    monkeypatch.setattr(importing, "SHARD_BYTES", 40_000)
    import_gguf(file, tmp_path / "many")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    one, many = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "many")
    assert one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one)
    assert open_base(tmp_path / "many", name="base", revision=None).n_layers == 3


def test_a_model_of_turns_ends_with_them(tmp_path: Path) -> None:
    plain = write_gguf(tmp_path / "plain.gguf")
    turns = write_gguf(tmp_path / "turns.gguf", template="{{ messages }}")
    for file, ends in ((plain, 1), (turns, [1, 5])):
        import_gguf(file, tmp_path / file.stem)
        found = json.loads((tmp_path / file.stem / "generation_config.json").read_text())
        assert found["eos_token_id"] == ends


def test_scaled_positions_are_taken_over(tmp_path: Path) -> None:
    import_gguf(write_gguf(tmp_path / "model.gguf", factor=8.0), tmp_path / "base")
    rope = json.loads((tmp_path / "base/config.json").read_text())["rope_parameters"]
    assert rope["full_attention"] == {"rope_theta": 20_000.0, "rope_type": "linear", "factor": 8.0}
    assert rope["sliding_attention"]["rope_type"] == "default"


def test_bad_files_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write_gguf(tmp_path / "good.gguf")
    data = good.read_bytes()
    cut, early = tmp_path / "cut.gguf", tmp_path / "early.gguf"
    cut.write_bytes(data[: len(data) // 2])
    early.write_bytes(data[:100])
    text = tmp_path / "text.gguf"
    text.write_text("hello, this is not what was meant")
    bad = {
        cut: "truncated",
        early: "truncated",
        text: "is no GGUF file",
        tmp_path / "none.gguf": "is no file",
        write_gguf(tmp_path / "llama.gguf", called="llama"): "of the family llama; expected one",
        write_gguf(tmp_path / "less.gguf", without="blk.1.ffn_up.weight"): "has no tensor for",
        write_gguf(tmp_path / "dumb.gguf", tokens=False): "tokenizer cannot be rebuilt",
        write_gguf(tmp_path / "deep.gguf", layers=10**9): "has no config that fits",
        write_gguf(tmp_path / "odd.gguf", stored="I8"): "is stored as I8",
    }
    for file, message in bad.items():
        assert run(["import-gguf", str(file), "--out", str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1
        assert message in said, said
        assert not (tmp_path / "out").exists()


def test_the_file_that_was_expected(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    import_gguf(file, tmp_path / "base", sha256=digest.upper())
    with pytest.raises(OutputError, match="exists"):
        import_gguf(file, tmp_path / "base")
    with pytest.raises(ModelError, match=f"has sha256 {digest}; expected 0000"):
        import_gguf(file, tmp_path / "other", sha256="0" * 64)
    assert not (tmp_path / "other").exists()


def test_no_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_gguf(tmp_path / "model.gguf")
    usage = os.statvfs(tmp_path)
    monkeypatch.setattr(
        "bake.new_folder.shutil.disk_usage", lambda _: type("", (), {"free": usage.f_bsize})()
    )
    with pytest.raises(OutputError, match="MB free"):
        import_gguf(file, tmp_path / "base")
    assert not (tmp_path / "base").exists()
