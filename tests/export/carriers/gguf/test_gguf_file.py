"""GGUF files of stock folders: read back, read by transformers, and run by llama.cpp."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from bake.importing.import_gguf import import_gguf
from bakeout.cli import run
from export.carriers.gguf import gguf_check
from export.carriers.gguf.gguf_check import Checked, has_llama_cpp
from export.carriers.gguf.gguf_file import export_gguf, open_stock
from tests.folders import compile_recipe
from tests.gguf_files import VOCAB, write_gguf
from tests.worlds import D_IN, save_sae_lens, tiny_config, tiny_sae

gguf = pytest.importorskip("gguf")
needs_quantizer = pytest.mark.skipif(
    shutil.which("llama-quantize") is None, reason="llama-quantize is not on PATH"
)
needs_llama = pytest.mark.skipif(not has_llama_cpp(), reason="llama.cpp is not installed")


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By family: a base of 8 layers whose tokenizer has merges, and the folder compiled from it."""
    root = tmp_path_factory.mktemp("gguf")
    import_gguf(write_gguf(root / "tokens.gguf", "gemma3"), root / "tokens")
    for family in ("gemma2", "gemma3_text"):
        folder = root / family
        tiny = tiny_config(family).to_dict() | {"num_hidden_layers": 8, "vocab_size": len(VOCAB)}
        tiny |= {"layer_types": None, "sliding_window_pattern": 2 if family == "gemma2" else 6}
        torch.manual_seed(0)
        config = tf.AutoConfig.for_model(**tiny)
        tf.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(root / "tokens" / name, folder / "base")
        save_sae_lens(folder / "sae", tiny_sae())
        (folder / "recipe.toml").write_text(
            'schema = 1\n[base]\nmodel = "base"\nlicense = "apache-2.0"\n[[clamp]]\n'
            'sae = { path = "sae" }\nmethod = "clamp"\nfeatures = [1, 5, 9]\nvalue = -6.0\n'
        )
        compile_recipe(folder / "recipe.toml", folder)
    return root


@pytest.fixture
def read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_check, "has_llama_cpp", lambda: False)


def fields(file: Path) -> dict[str, Any]:
    return {name: of.contents() for name, of in gguf.GGUFReader(file).fields.items()}


def types(file: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_import_gguf_reads_the_folder_again(
    worlds: Path, tmp_path: Path, read_back: None, family: str
) -> None:
    folder, file = worlds / family / "compiled", tmp_path / "new" / "model.gguf"
    assert export_gguf(folder, file, outtype="bf16").by.startswith("read back")
    import_gguf(file, tmp_path / "again")
    own: dict[str, torch.Tensor] = {}
    for shard in folder.glob("*.safetensors"):
        own |= load_file(shard)
    found = load_file(tmp_path / "again" / "model.safetensors")
    assert found.keys() == own.keys()
    for name, tensor in own.items():
        off = (found[name].double() - tensor.double()).abs()
        assert (off <= 2.0**-8 * tensor.double().abs() + 2.0**-9 * ("norm" in name)).all(), name
    both = folder, tmp_path / "again"
    one, other = (json.loads((at / "config.json").read_text()) for at in both)
    for key in ("hidden_size", "num_hidden_layers", "intermediate_size", "layer_types", "head_dim"):
        assert one[key] == other[key], key
    first, second = (tf.AutoTokenizer.from_pretrained(at) for at in both)
    for text in gguf_check.SAMPLES:
        assert first(text)["input_ids"] == second(text)["input_ids"]


def test_the_clamps_layers_stay_float32_and_the_embedding_exact(
    worlds: Path, tmp_path: Path, read_back: None
) -> None:
    folder = worlds / "gemma3_text" / "compiled"
    for outtype, matrix in {"f32": "F32", "bf16": "BF16", "f16": "F16", "q8_0": "Q8_0"}.items():
        export_gguf(folder, tmp_path / outtype, outtype=outtype)
        found = types(tmp_path / outtype)
        for layer in (2, 3):
            assert {found[f"blk.{layer}.ffn_{part}.weight"] for part in ("gate", "up", "down")} == {
                "F32"
            }
        # A row of 48 numbers holds no whole blocks of 32.
        assert found["blk.1.ffn_down.weight"] == ("F16" if outtype == "q8_0" else matrix)
        assert found["blk.1.attn_q.weight"] == matrix
        assert found["token_embd.weight"] == ("F16" if outtype == "q8_0" else matrix)
        assert {of for name, of in found.items() if "norm" in name} == {"F32"}
        table = next(
            t for t in gguf.GGUFReader(tmp_path / outtype).tensors if t.name == "token_embd.weight"
        )
        kept = gguf.dequantize(table.data, table.tensor_type)[:, D_IN:]
        own = load_file(folder / "model-00001-of-00001.safetensors")["model.embed_tokens.weight"]
        assert np.array_equal(kept, own[:, D_IN:].float().numpy()) and kept.any()
    assert fields(tmp_path / "f32")["gemma3.block_count"] == 14
    assert fields(tmp_path / "f32")["gemma3.attention.sliding_window"] == 8


def test_it_says_how_llama_cpp_is_to_quantize_it(
    worlds: Path, tmp_path: Path, read_back: None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file = worlds / "gemma3_text" / "compiled", tmp_path / "my model.gguf"
    found = export_gguf(folder, file, outtype="bf16")
    kept = ["--tensor-type", r"blk\.(2|3)\.ffn_.*=f32", "--token-embedding-type", "f16"]
    made = str(tmp_path / "my model-q4_k_m.gguf")
    assert shlex.split(found.quantize) == ["llama-quantize", *kept, str(file), made, "Q4_K_M"]
    assert run(["export", "gguf", str(folder), "--out", str(tmp_path / "f16.gguf")]) == 0
    assert "\n4 bits llama-quantize --tensor-type" in capsys.readouterr().out
    assert not export_gguf(folder, tmp_path / "8", outtype="q8_0").quantize
    assert not export_gguf(worlds / "gemma2" / "base", tmp_path / "base").quantize


@needs_llama
@needs_quantizer
@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_llama_cpp_in_4_bits_shows_the_clamp(worlds: Path, tmp_path: Path, family: str) -> None:
    folder = worlds / family / "compiled"
    found = export_gguf(folder, tmp_path / "model.gguf", outtype="f32")
    subprocess.run(shlex.split(found.quantize), check=True, capture_output=True)
    made = tmp_path / "model-q4_k_m.gguf"
    kept = {name for name, of in types(made).items() if of == "F32" and "norm" not in name}
    assert kept == {f"blk.{n}.ffn_{part}.weight" for n in (2, 3) for part in ("gate", "up", "down")}
    stock = open_stock(folder)
    checked = gguf_check.check_file(made, stock, tf.AutoTokenizer.from_pretrained(folder), [])
    assert checked.clamp is not None and checked.clamp.shown == pytest.approx(1, abs=0.2)


def test_the_same_folder_gives_the_same_file(worlds: Path, tmp_path: Path, read_back: None) -> None:
    for name in ("one", "two"):
        export_gguf(worlds / "gemma2" / "compiled", tmp_path / name, outtype="q8_0")
    digests = {hashlib.sha256((tmp_path / n).read_bytes()).hexdigest() for n in ("one", "two")}
    assert len(digests) == 1


def test_a_file_that_holds_something_else_is_not_kept(
    worlds: Path, tmp_path: Path, read_back: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from export.carriers.gguf import gguf_file

    monkeypatch.setattr(gguf_file, "encoded", lambda values, kind: (1.01 * values).tobytes())
    with pytest.raises(gguf_check.CheckError, match="holds other numbers than model-"):
        export_gguf(worlds / "gemma2" / "compiled", tmp_path / "model.gguf", outtype="f32")
    assert not list(tmp_path.iterdir())


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert run(["export", "gguf", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_what_is_refused(
    worlds: Path, tmp_path: Path, read_back: None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = worlds / "gemma2" / "compiled", tmp_path / "model.gguf"
    said = refused(capsys, worlds / "gemma2" / "checkpoint", "--out", out)
    assert "is carried as layer" in said and "bakeout export compiled" in said
    assert "lies in" in refused(capsys, folder, "--out", folder / "model.gguf")
    assert "expected one of f32" in refused(capsys, folder, "--out", out, "--outtype", "q2")
    out.write_bytes(b"text")
    assert "exists; choose" in refused(capsys, folder, "--out", out)
    assert "is no GGUF file" in refused(capsys, folder, "--out", out, "--force")
    out.unlink()
    base = tmp_path / "base"
    for key, value, named in (
        ("layer_types", ["full_attention", "sliding_attention"] * 4, "every n-th layer"),
        ("query_pre_attn_scalar", 11, "query_pre_attn_scalar is 11"),
        ("final_logit_softcapping", None, "with both only"),
        ("hidden_activation", "relu", "hidden_activation is 'relu'"),
    ):
        shutil.copytree(worlds / "gemma2" / "base", base, dirs_exist_ok=True)
        path = base / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
        assert named in refused(capsys, base, "--out", out)
    assert not out.exists()


@needs_llama
@pytest.mark.parametrize(
    ("family", "outtype", "bar"),
    [
        ("gemma2", "f32", 0.01),
        ("gemma3_text", "f32", 0.01),
        ("gemma3_text", "bf16", 0.5),
        ("gemma2", "q8_0", 0.5),
    ],
)
def test_llama_cpp_shows_the_clamp(
    worlds: Path, tmp_path: Path, family: str, outtype: str, bar: float
) -> None:
    found = export_gguf(worlds / family / "compiled", tmp_path / "model.gguf", outtype=outtype)
    assert isinstance(found, Checked) and found.by.startswith("llama.cpp")
    assert found.clamp is not None and found.tokens
    assert found.clamp.error <= bar < found.clamp.effect
    assert found.clamp.shown == pytest.approx(1, abs=0.05)
    assert found.split_alike == len(gguf_check.SAMPLES)
    assert outtype != "f32" or found.same_top == found.tokens


@needs_llama
def test_llama_cpp_says_what_torch_says_of_a_base(worlds: Path, tmp_path: Path) -> None:
    found = export_gguf(worlds / "gemma3_text" / "base", tmp_path / "model.gguf", outtype="f32")
    assert found.clamp is None and found.kl is not None and found.kl <= 1e-4
    assert found.same_top == found.tokens


@needs_llama
def test_one_whose_clamp_does_nothing_in_llama_cpp_is_not_kept(
    worlds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a stock quantiser leaves it: the clamp's layers in blocks of 8 bits."""
    from export.carriers.gguf import gguf_file

    whole = gguf_file.plan_tensors

    def coarse(stock: Any, chosen: Any) -> Any:
        from dataclasses import replace

        return whole(replace(stock, compiled_layers=(), d=0), chosen)

    monkeypatch.setattr(gguf_file, "plan_tensors", coarse)
    with pytest.raises(gguf_check.CheckError, match="of the clamp's effect"):
        export_gguf(worlds / "gemma2" / "compiled", tmp_path / "model.gguf", outtype="q8_0")
    assert not list(tmp_path.iterdir())
