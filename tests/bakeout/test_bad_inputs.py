"""Bad inputs of every verb: refused in one line, exit code 1 or 2, and nothing left behind.

A kind is one thing that is wrong with one file that a verb is given. Kinds that any file of a
format can have (`FILES`) are tried on every file of that format; the others stand by the file.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from safetensors.numpy import load as load_numpy
from safetensors.numpy import save as save_numpy

from bake.errors import DataError, FolderError
from bake.new_folder import MANIFEST
from bake.questions.multiple_choice import load_questions, load_texts
from bake.questions.open_prompts import load_prompts
from bake.questions.trivia import load_trivia
from bake.reading.capped import cap_of
from bake.recipe import Recipe
from bake.sources import QuestionSource, RowSource, TextSource
from bakeout.cli import run
from tests.folders import rehash
from tests.fuzz.readers import good_files
from verify.engines.onnx_files import open_graph

Damage = Callable[[Path], None]
"""Changes a good file where it lies."""


def written(data: bytes) -> Damage:
    return lambda path: path.write_bytes(data) and None


def changed(change: Callable[[bytes], bytes]) -> Damage:
    return lambda path: path.write_bytes(change(path.read_bytes())) and None


def of_json(change: Callable[[Any], Any]) -> Damage:
    return lambda path: path.write_text(json.dumps(change(json.loads(path.read_text())))) and None


def field(key: str, value: Any) -> Damage:
    """A JSON file with one field, `a.b` within another, of another value."""

    def change(data: Any) -> Any:
        *within, last = key.split(".")
        at = data
        for name in within:
            at = at[int(name)] if name.isdecimal() else at[name]
        at[int(last) if isinstance(at, list) else last] = value
        return data

    return of_json(change)


def without(key: str) -> Damage:
    return of_json(lambda data: {k: v for k, v in data.items() if k != key})


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def _huge(path: Path) -> None:
    os.truncate(path, cap_of(path) + 1)


FILES: dict[str, Damage] = {
    "missing": Path.unlink,
    "folder": _folder,
    "pipe": _pipe,
    "link to itself": _loop,
    "empty": written(b""),
    "half": changed(lambda data: data[: len(data) // 2]),
    "zeros": changed(lambda data: bytes(len(data))),
}
TEXTS: dict[str, Damage] = FILES | {
    "beyond its cap": _huge,
    "UTF-16": changed(lambda data: data.decode().encode("utf-16")),
    "not UTF-8": changed(lambda data: b"\xff\xfe\xfa" + data),
    "byte order mark": changed(lambda data: b"\xef\xbb\xbf" + data),
}
JSONS: dict[str, Damage] = TEXTS | {
    "list": written(b"[]"),
    "number": written(b"7"),
    "null": written(b"null"),
    "text": written(b'"a"'),
    "nothing in it": written(b"{}"),
    "100,000 levels": written(b"[" * 100_000),
    "500 levels": changed(lambda data: b'{"deep":' + b"[" * 500 + b"]" * 500 + b"," + data[1:]),
    "6,000 digits": changed(lambda data: b'{"big":' + b"9" * 6000 + b"," + data[1:]),
    "1e999": changed(lambda data: b'{"big":1e999,' + data[1:]),
    "NaN": changed(lambda data: b'{"nan":NaN,' + data[1:]),
    "Infinity": changed(lambda data: b'{"nan":-Infinity,' + data[1:]),
    "key twice": changed(lambda data: b'{"a":1,"a":2,' + data[1:]),
    "half a surrogate": changed(lambda data: b'{"a":"\\ud800",' + data[1:]),
    "NUL": changed(lambda data: b'{"a":"\\u0000",' + data[1:]),
    "Python": changed(lambda data: data.replace(b'"', b"'")),
    "comment": changed(lambda data: b"// config\n" + data),
}


def of_toml(change: Callable[[dict[str, Any]], Any]) -> Damage:
    def damage(path: Path) -> None:
        data = tomllib.loads(path.read_text())
        change(data)
        path.write_text(tomli_w.dumps(data))

    return damage


def clamp(**fields: Any) -> Damage:
    """A recipe whose clamp has other fields; None takes one out."""

    def change(data: dict[str, Any]) -> None:
        table = data["clamp"][0] | fields
        data["clamp"][0] = {key: value for key, value in table.items() if value is not None}

    return of_toml(change)


def table(name: str, **fields: Any) -> Damage:
    return of_toml(lambda data: data.update({name: data.get(name, {}) | fields}))


def text(old: str, new: str) -> Damage:
    def damage(path: Path) -> None:
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    return damage


TOMLS = TEXTS | {"half": changed(lambda data: data[: data.index(b"[[clamp") + 4])}
RECIPES: dict[str, Damage] = TOMLS | {
    "JSON": written(b'{"schema": 1}'),
    "no TOML": written(b"schema: 1\nbase: x\n"),
    "100,000 levels": written(b"a = " + b"[" * 100_000),
    "200 levels": written(b"a = " + b"[" * 200 + b"]" * 200),
    "a key of 100,000 parts": written(b"a." * 100_000 + b"b = 1"),
    "6,000 digits": text("-6.0", "9" * 6000),
    "65 bits": text("-6.0", "18446744073709551616"),
    "huge exponent": text("-6.0", "-1e999"),
    "nan": text("-6.0", "nan"),
    "inf": text("-6.0", "-inf"),
    "beyond float32": text("-6.0", "-3.5e38"),
    "beyond float32 with its decoder rows": text("-6.0", "-3.4e38"),
    "integer value beyond float32": text("-6.0", "9000000000000000000e30"),
    "trigger beyond float32": clamp(trigger=1e39),
    "multiplier beyond float32": clamp(method="scale", value=None, multiplier=-1e300),
    "clamp_value beyond float32": clamp(
        method="refusal", refusal_feature=3, also_clamp=True, clamp_value=1e200
    ),
    "NUL in a path": clamp(sae={"path": "s\0ae"}),
    "NUL in the base": table("base", model="ba\0se"),
    "100,000 features": clamp(features=list(range(100_000))),
    "feature twice": clamp(features=[1, 1]),
    "no features": clamp(features=[]),
    "negative feature": clamp(features=[-1]),
    "feature out of range": clamp(features=[64]),
    "huge feature": clamp(features=[2**62]),
    "feature as text": clamp(features=["1"]),
    "feature as number": clamp(features=[1.0]),
    "feature as truth": clamp(features=[True]),
    "features as text": clamp(features="all"),
    "features as number": clamp(features=7),
    "nested features": clamp(features=[[1]]),
    "value as text": clamp(value="-6"),
    "value as truth": clamp(value=True),
    "no value": clamp(value=None),
    "no method": clamp(method=None),
    "unknown method": clamp(method="wipe"),
    "method as list": clamp(method=["clamp"]),
    "exempt_bos as text": clamp(exempt_bos="no"),
    "exempt_bos as number": clamp(exempt_bos=0),
    "negative trigger": clamp(trigger=-1.0),
    "trigger as text": clamp(trigger="0"),
    "unknown key": clamp(valeu=1.0),
    "long unknown key": clamp(**{"x" * 10_000: 1.0}),
    "field of another method": clamp(multiplier=2.0),
    "multiplier of nothing": clamp(method="scale", value=None, multiplier=0.0),
    "no SAE": clamp(sae=None),
    "SAE as text": clamp(sae="sae"),
    "SAE that is not there": clamp(sae={"path": "absent"}),
    "SAE of no file": clamp(sae={"path": ""}),
    "SAE by both": clamp(sae={"path": "sae", "release": "a", "id": "b"}),
    "SAE by half": clamp(sae={"release": "a"}),
    "unknown release": clamp(sae={"release": "nonsense", "id": "x"}),
    "release that is a path": clamp(sae={"release": "../../etc/passwd", "id": "x"}),
    "very long path": clamp(sae={"path": "a" * 5000}),
    "path of a device": clamp(sae={"path": "/dev/zero"}),
    "hook point of nothing": clamp(hook_point=""),
    "hook point of a head": clamp(hook_point="blocks.1.attn.hook_z"),
    "negative layer": clamp(hook_point="blocks.-1.hook_resid_post"),
    "layer of 6,000 digits": clamp(hook_point=f"blocks.{'9' * 6000}.hook_resid_post"),
    "layer out of range": clamp(hook_point="blocks.99.hook_resid_post"),
    "layer in other digits": clamp(hook_point="blocks.\u0661.hook_resid_post"),
    "embedding": clamp(hook_point="blocks.0.hook_resid_pre"),
    "other layer than the SAE": clamp(hook_point="blocks.2.hook_resid_post"),
    "two at one layer": of_toml(lambda data: data["clamp"].append(data["clamp"][0])),
    "no clamp": of_toml(lambda data: data.update(clamp=[])),
    "clamp as table": of_toml(lambda data: data.update(clamp=data["clamp"][0])),
    "clamp as number": of_toml(lambda data: data.update(clamp=1)),
    "no schema": of_toml(lambda data: data.pop("schema")),
    "schema as text": of_toml(lambda data: data.update(schema="1")),
    "schema of tomorrow": of_toml(lambda data: data.update(schema=2)),
    "schema as truth": of_toml(lambda data: data.update(schema=True)),
    "no base": of_toml(lambda data: data.pop("base")),
    "base as text": of_toml(lambda data: data.update(base="base")),
    "base of no name": table("base", model=""),
    "base that is not there": table("base", model="absent"),
    "base that is a file": table("base", model="recipe.toml"),
    "base out of this world": table("base", model="../" * 40 + "etc"),
    "base of many letters": table("base", model="a" * 5000),
    "base in odd letters": table("base", model="\u202e\x1b[31m"),
    "unknown dtype": table("base", dtype="int8"),
    "revision as number": table("base", revision=1),
    "license as list": table("base", license=["x"]),
    "unknown table": of_toml(lambda data: data.update(extra={"a": 1})),
    "verify without text": of_toml(lambda data: data["verify"].pop("text")),
    "verify as list": of_toml(lambda data: data.update(verify=[1])),
    "unknown form": table("verify", prompt="sung"),
    "select without a table": clamp(features="select"),
    "select with no corpus": of_toml(lambda data: data.update(select={"by": "ratio"})),
    "too many windows": of_toml(
        lambda data: data.update(
            select={"forget": {"path": "a"}, "retain": {"path": "b"}, "n_seqs": 2**62}
        )
    ),
}
SAE_CONFIGS: dict[str, Damage] = {
    **JSONS,
    "d_in as text": field("d_in", "32"),
    "d_in as truth": field("d_in", True),
    "d_in as number": field("d_in", 32.0),
    "no d_in": without("d_in"),
    "d_sae of nothing": field("d_sae", 0),
    "negative d_sae": field("d_sae", -64),
    "huge d_sae": field("d_sae", 10**30),
    "another d_sae": field("d_sae", 65),
    "architecture as list": field("architecture", ["jumprelu"]),
    "architecture of nothing": field("architecture", None),
    "unknown architecture": field("architecture", "magic"),
    "topk": field("architecture", "topk"),
    "transcoder": field("architecture", "transcoder"),
    "other architecture than its tensors": field("architecture", "gated"),
    "apply_b_dec_to_input as text": field("apply_b_dec_to_input", "no"),
    "normalised": field("normalize_activations", "layer_norm"),
    "normalised by a list": field("normalize_activations", []),
    "metadata as list": field("metadata", []),
    "metadata as text": field("metadata", "x"),
    "hook as number": field("metadata.hook_name", 7),
    "hook as list": field("metadata.hook_name", ["blocks.1.hook_resid_post"]),
    "hook of an MLP": field("metadata.hook_name", "blocks.1.hook_mlp_out"),
    "hook of 6,000 digits": field("metadata.hook_name", f"blocks.{'1' * 6000}.hook_resid_post"),
    "negative hook": field("metadata.hook_name", "blocks.-1.hook_resid_post"),
    "hook out of range": field("metadata.hook_name", "blocks.7.hook_resid_post"),
    "version of nothing": field("metadata.sae_lens_version", "x"),
    "version as number": field("metadata.sae_lens_version", 6),
    "version of 6,000 digits": field("metadata.sae_lens_version", "9" * 6000),
    "activation_fn": field("activation_fn", "tanh"),
    "reshaped": field("reshape_activations", "hook_z"),
    "hook head": field("metadata.hook_head_index", 3),
}


def tensors(change: Callable[[dict[str, Any]], None]) -> Damage:
    def damage(path: Path) -> None:
        arrays = load_numpy(path.read_bytes())
        change(arrays)
        path.write_bytes(save_numpy(arrays))

    return damage


def header(change: Callable[[dict[str, Any]], Any]) -> Damage:
    def damage(path: Path) -> None:
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        made = json.dumps(change(json.loads(data[8 : 8 + size]))).encode()
        path.write_bytes(len(made).to_bytes(8, "little") + made + data[8 + size :])

    return damage


def entry(name: str, key: str, value: Any) -> Damage:
    return header(lambda found: found | {name: found[name] | {key: value}})


SAFETENSORS: dict[str, Damage] = FILES | {
    "header of 2^60": changed(lambda data: (1 << 60).to_bytes(8, "little") + data[8:]),
    "header of -1": changed(lambda data: b"\xff" * 8 + data[8:]),
    "header of nothing": changed(lambda data: bytes(8) + data[8:]),
    "header list": header(lambda _: []),
    "header of text": header(lambda _: "a"),
    "header of deep nests": changed(lambda _: (100_000).to_bytes(8, "little") + b"[" * 100_000),
    "bytes after its end": changed(lambda data: data + b"\0" * 64),
    "pickle": written(b"\x80\x04cos\nsystem\n(S'true'\ntR."),
}
SAE_WEIGHTS: dict[str, Damage] = {
    **SAFETENSORS,
    "shape as text": entry("b_dec", "shape", "32"),
    "negative shape": entry("b_dec", "shape", [-32]),
    "huge shape": entry("b_dec", "shape", [2**62, 4]),
    "offsets out of it": entry("b_dec", "data_offsets", [0, 2**50]),
    "offsets backwards": entry("b_dec", "data_offsets", [128, 0]),
    "offsets as a long text": entry("b_dec", "data_offsets", ["x" * 5000, 128]),
    "unknown dtype": entry("b_dec", "dtype", "F7"),
    "no dtype": header(lambda found: found | {"b_dec": {"shape": [32]}}),
    "whole numbers": tensors(lambda a: a.update(b_dec=a["b_dec"].astype("i4"))),
    "truths": tensors(lambda a: a.update(b_dec=a["b_dec"] > 0)),
    "NaN": tensors(lambda a: a["W_enc"].__setitem__((3, 5), np.nan)),
    "inf": tensors(lambda a: a["W_dec"].__setitem__((3, 5), np.inf)),
    "one missing": tensors(lambda a: a.pop("threshold")),
    "one too many": tensors(lambda a: a.update(mystery=a["b_dec"])),
    "another shape": tensors(lambda a: a.update(threshold=a["threshold"][:-1])),
    "turned": tensors(lambda a: a.update(W_enc=np.ascontiguousarray(a["W_enc"].T))),
    "nothing in it": tensors(lambda a: a.clear()),
    "no features": tensors(lambda a: a.update(W_enc=a["W_enc"][:, :0])),
    "one number": tensors(lambda a: a.update(W_enc=np.array(1, "f4"))),
    "beyond float32 once folded": tensors(lambda a: a.update(b_dec=a["b_dec"] * 0 + 3e38)),
}


def arrays(change: Callable[[dict[str, Any]], None], *, packed: bool = False) -> Damage:
    def damage(path: Path) -> None:
        with np.load(path) as opened:
            found = dict(opened)
        change(found)
        (np.savez_compressed if packed else np.savez)(path, **found)

    return damage


def member(data: bytes, name: str = "b_dec.npy", kind: int = zipfile.ZIP_STORED) -> Damage:
    """An npz of which one member has these bytes."""

    def damage(path: Path) -> None:
        out = io.BytesIO()
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w", kind) as new:
            for info in old.infolist():
                if info.filename != name:
                    new.writestr(info.filename, old.read(info))
            new.writestr(name, data)
        path.write_bytes(out.getvalue())

    return damage


def npy(shape: str, descr: str = "'<f4'", data: bytes = bytes(128)) -> bytes:
    about = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}"
    made = about.encode() + b" " * (-(11 + len(about)) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(made)) + made + data


def _encrypted(data: bytes) -> bytes:
    out = bytearray(data)
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = data.find(mark)
        while start >= 0:
            out[start + at] |= 1
            start = data.find(mark, start + 1)
    return bytes(out)


NPZS: dict[str, Damage] = FILES | {
    "cut a little": changed(lambda data: data[:-30]),
    "encrypted": changed(_encrypted),
    "no zip": written(b"PK\x03\x04" + bytes(500)),
    "packed by LZMA": member(npy("(32,)"), kind=zipfile.ZIP_LZMA),
    "packed by BZIP2": member(npy("(32,)"), kind=zipfile.ZIP_BZIP2),
    "bad bytes": changed(lambda data: data[:200] + b"\x13" + data[201:]),
    "bomb": member(npy("(8388608,)", data=bytes(1 << 25)), kind=zipfile.ZIP_DEFLATED),
    "more than is there": member(npy("(1073741824,)")),
    "less than is there": member(npy("(3,)")),
    "negative shape": member(npy("(-32,)")),
    "huge shape": member(npy("(2**62, 2**62)")),
    "9^999 numbers": member(npy(f"({'9' * 999},)")),
    "shape of truths": member(npy("(True, 32)")),
    "shape of text": member(npy("('a',)")),
    "header of code": member(npy("(__import__('os').system('true'),)")),
    "header of deep nests": member(npy("(" * 3000 + ")" * 3000)),
    "long header": member(npy("(32,)" + " " * 20_000)),
    "header of 4 GB": member(b"\x93NUMPY\x02\x00" + b"\xff" * 4 + bytes(100)),
    "npy 3": member(b"\x93NUMPY\x03\x00" + npy("(32,)")[8:]),
    "no npy": member(b"hello"),
    "nothing in it": member(b""),
    "another file": member(b"hello", name="readme.txt"),
    "pickle": member(npy("(1,)", "'|O'", b"\x80\x04cos\nsystem\n(S'true'\ntR.")),
    "unknown dtype": member(npy("(32,)", "'<z9'")),
    "dtype of fields": member(npy("(32,)", "[('a', '<f4')]")),
    "too many": arrays(lambda a: a.update({f"x{i}": np.ones(1) for i in range(100)})),
}
SCOPES: dict[str, Damage] = NPZS | {
    "uint16": arrays(lambda a: a.update(W_dec=a["W_dec"].astype("u2"))),
    "complex": arrays(lambda a: a.update(W_dec=a["W_dec"].astype("c8"))),
    "truths": arrays(lambda a: a.update(threshold=a["threshold"] > 0)),
    "texts": arrays(lambda a: a.update(threshold=a["threshold"].astype("U4"))),
    "raw bytes": arrays(lambda a: a.update(threshold=a["threshold"].view("V4"))),
    "longdouble": arrays(lambda a: a.update(threshold=a["threshold"].astype("g"))),
    "NaN": arrays(lambda a: a["b_enc"].__setitem__(3, np.nan), packed=True),
    "beyond float32": arrays(lambda a: a.update(b_enc=a["b_enc"].astype("f8") + 1e200)),
    "one missing": arrays(lambda a: a.pop("b_dec")),
    "one too many": arrays(lambda a: a.update(more=a["b_dec"])),
    "another shape": arrays(lambda a: a.update(b_dec=a["b_dec"][:5])),
}
BASE_CONFIGS: dict[str, Damage] = {
    **JSONS,
    "hidden_size as text": field("hidden_size", "32"),
    "hidden_size as truth": field("hidden_size", True),
    "another hidden_size": field("hidden_size", 33),
    "layers as number": field("num_hidden_layers", 4.0),
    "a billion layers": field("num_hidden_layers", 10**9),
    "negative layers": field("num_hidden_layers", -4),
    "no heads": field("num_attention_heads", 0),
    "heads as text": field("num_attention_heads", "4"),
    "heads that do not fit": field("num_key_value_heads", 3),
    "head_dim as list": field("head_dim", [8]),
    "vocab_size as text": field("vocab_size", "99"),
    "negative vocab_size": field("vocab_size", -1),
    "eps as text": field("rms_norm_eps", "1e-6"),
    "eps of nothing": field("rms_norm_eps", 0),
    "tied as text": field("tie_word_embeddings", "no"),
    "tied as number": field("tie_word_embeddings", 0),
    "use_cache as text": field("use_cache", "false"),
    "activation as list": field("hidden_activation", ["gelu"]),
    "activation as number": field("hidden_activation", 7),
    "layer_types as text": field("layer_types", "full_attention"),
    "layer_types of numbers": field("layer_types", [1, 2, 3, 4]),
    "bos as text": field("bos_token_id", "2"),
    "bos as truth": field("bos_token_id", True),
    "huge bos": field("bos_token_id", 10**20),
    "eos as object": field("eos_token_id", {}),
    "eos of texts": field("eos_token_id", ["1"]),
    "softcap as text": field("final_logit_softcapping", "no"),
    "window as text": field("sliding_window", "8"),
    "window as number": field("sliding_window", 8.5),
    "dtype as number": field("dtype", 16),
    "rope as text": field("rope_parameters", "default"),
    "rope of magic": field("rope_parameters", {"rope_type": "magic"}),
    "rope theta as text": field("rope_parameters", {"rope_type": "default", "rope_theta": "x"}),
    "unknown activation": field("hidden_activation", "foo"),
    "unknown layer type": field("layer_types", ["x"] * 4),
    "too few layer types": field("layer_types", ["full_attention"] * 3),
    "unknown dtype": field("dtype", "float99"),
    "fewer heads of keys": field("num_key_value_heads", 1),
    "another vocab_size": field("vocab_size", 98),
    "text_config as list": field("text_config", [1]),
    "text_config as text": field("text_config", "x"),
    "model_type of another": field("model_type", "llama"),
    "model_type as list": field("model_type", ["gemma2"]),
    "model_type of a clamped one": field("model_type", "clamped_gemma2"),
    "architecture of another": field("architectures", ["LlamaForCausalLM"]),
    "architectures as text": field("architectures", "Gemma2ForCausalLM"),
    "clamped already": field("sae_clamp", {}),
    "quantised": field("quantization_config", {"quant_method": "gptq"}),
    "quantised by a list": field("quantization_config", [1]),
}
BASE_WEIGHTS: dict[str, Damage] = {
    **SAFETENSORS,
    "no layers": tensors(lambda a: [a.pop(name) for name in list(a) if ".mlp." in name]),
    "one layer missing": tensors(
        lambda a: [a.pop(name) for name in list(a) if "layers.2." in name]
    ),
    "gate as vector": tensors(lambda a: a.update({GATE: np.zeros(3, "f4")})),
    "gate as number": tensors(lambda a: a.update({GATE: np.array(0, "f4")})),
    "whole numbers": tensors(lambda a: a.update({GATE: np.zeros((48, 32), "i1")})),
    "another size": tensors(lambda a: a.update({GATE: np.zeros((47, 32), "f4")})),
}
GATE = "model.layers.0.mlp.gate_proj.weight"
INDEXES: dict[str, Damage] = {
    **JSONS,
    "weight_map as list": field("weight_map", []),
    "weight_map as text": field("weight_map", "x"),
    "nothing in weight_map": field("weight_map", {}),
    "shard outside": field("weight_map.x", "../base/model.safetensors"),
    "shard from the root": field("weight_map.x", "/etc/passwd"),
    "shard that is a folder": field("weight_map.x", "."),
    "shard of no name": field("weight_map.x", ""),
    "shard as number": field("weight_map.x", 3),
    "shard as list": field("weight_map.x", [[]]),
    "shard of many letters": field("weight_map.x", "x" * 5000),
    "shard that is not there": field("weight_map.x", "model-9.safetensors"),
    "shard that is no safetensors": field("weight_map.x", "config.json"),
    "tensor that is not there": field("weight_map.x", "model-00001-of-00004.safetensors"),
}
MANIFESTS: dict[str, Damage] = {
    **JSONS,
    "schema of tomorrow": field("schema", 2),
    "schema as text": field("schema", "1"),
    "schema as truth": field("schema", True),
    "huge schema": field("schema", 10**30),
    "no files": field("files", {}),
    "files as list": field("files", ["config.json"]),
    "hash as number": field("files.x", 3),
    "hash of another length": field("files.x", "abc"),
    "file outside": of_json(lambda m: m | {"files": {"../x": "0" * 64}}),
    "file from the root": field("files./etc/passwd", "0" * 64),
    "file of no name": field("files.", "0" * 64),
    "file backwards": field("files.a\\b", "0" * 64),
    "carrier as list": field("carrier", ["layer"]),
    "no carrier": without("carrier"),
    "exact as text": field("exact", "no"),
    "base as text": field("base", "x"),
    "clamps as object": field("clamps", {}),
    "clamp as text": field("clamps", ["x"]),
    "layer as text": field("clamps.0.layer", "1"),
    "negative layer": field("clamps.0.layer", -1),
    "huge layer": field("clamps.0.layer", 10**20),
    "features as text": field("clamps.0.features", "all"),
    "feature as truth": field("clamps.0.features", [True]),
    "k as number": field("clamps.0.k", 3.5),
    "a million features": field("clamps.0.features", list(range(1_000_000))),
    "a long name": field("base.model", "a" * 100_000),
    "thousands of tools": field("tools", {str(i): "1" for i in range(10_000)}),
    "thousands of clamps": of_json(lambda m: m | {"clamps": m["clamps"] * 5000}),
    "parameters as list": field("clamps.0.parameters", []),
    "sae as text": field("clamps.0.sae", "x"),
    "sources as list": field("sources", []),
    "tools as text": field("tools", "x"),
    "compiled as text": field("compiled", "x"),
}
OF_ANY_CONFIG = (
    *("hidden_size as text", "another hidden_size", "layers as number", "a billion layers"),
    *("no heads", "heads as text", "heads that do not fit", "vocab_size as text"),
    *("negative vocab_size", "eps as text", "tied as text", "activation as number"),
    *("layer_types as text", "bos as text", "window as text", "dtype as number", "rope as text"),
    *("text_config as list", "model_type of another"),
)
CHECKPOINTS: dict[str, Damage] = {
    **JSONS,
    **{name: BASE_CONFIGS[name] for name in OF_ANY_CONFIG},
    "no sae_clamp": without("sae_clamp"),
    "sae_clamp as list": field("sae_clamp", []),
    "no sites": field("sae_clamp", {"schema": 1}),
    "sites as text": field("sae_clamp.sites", "x"),
    "no site": field("sae_clamp.sites", []),
    "site as number": field("sae_clamp.sites", [1]),
    "site without layer": field("sae_clamp.sites", [{"k": 3}]),
    "layer as text": field("sae_clamp.sites.0.layer", "1"),
    "layer as truth": field("sae_clamp.sites.0.layer", True),
    "negative layer": field("sae_clamp.sites.0.layer", -1),
    "huge layer": field("sae_clamp.sites.0.layer", 10**30),
    "layer out of range": field("sae_clamp.sites.0.layer", 9),
    "layer of no clamp": field("sae_clamp.sites.0.layer", 2),
    "k as text": field("sae_clamp.sites.0.k", "3"),
    "huge k": field("sae_clamp.sites.0.k", 10**20),
    "another k": field("sae_clamp.sites.0.k", 2),
    "exempt_bos as text": field("sae_clamp.sites.0.exempt_bos", "no"),
    "exempt_bos as number": field("sae_clamp.sites.0.exempt_bos", 0),
    "no exempt_bos": field("sae_clamp.sites.0", {"layer": 1, "k": 3}),
    "exempt ids as text": field("sae_clamp.exempt_token_ids", "2"),
    "exempt ids of text": field("sae_clamp.exempt_token_ids", ["2"]),
    "exempt ids of numbers": field("sae_clamp.exempt_token_ids", [2.5]),
    "negative exempt id": field("sae_clamp.exempt_token_ids", [-1]),
    "huge exempt id": field("sae_clamp.exempt_token_ids", [10**30]),
    "exempt id as truth": field("sae_clamp.exempt_token_ids", [True]),
}
CLAMP = "model.layers.1.sae_clamp."
CLAMP_WEIGHTS: dict[str, Damage] = {
    **SAFETENSORS,
    "NaN": tensors(lambda a: a[f"{CLAMP}value"].__setitem__(0, np.nan)),
    "one missing": tensors(lambda a: a.pop(f"{CLAMP}route")),
    "another shape": tensors(lambda a: a.update({f"{CLAMP}route": np.ones((2, 3), bool)})),
    "whole numbers": tensors(lambda a: a.update({f"{CLAMP}value": np.zeros(3, "i4")})),
}
WITNESSES: dict[str, Damage] = {
    **{name: damage for name, damage in NPZS.items() if name not in ("missing", "folder", "pipe")},
    "beyond its cap": _huge,
    "one missing": arrays(lambda a: a.pop("places")),
    "one too many": arrays(lambda a: a.update(more=a["places"])),
    "place outside": arrays(lambda a: a.update(places=np.array([[0, 9]]))),
    "negative place": arrays(lambda a: a.update(places=np.array([[-1, 3]]))),
    "token outside": arrays(lambda a: a.update(token_ids=np.array([[1, 2, 99]]))),
    "tokens as float": arrays(lambda a: a.update(token_ids=a["token_ids"].astype("f4"))),
    "uint16": arrays(lambda a: a.update(logits=a["logits"].astype("u2"))),
    "big-endian of another kind": arrays(lambda a: a.update(logits=a["logits"].astype(">f8"))),
    "NaN": arrays(lambda a: a.update(logits=a["logits"] * np.nan)),
    "no sensitivity": arrays(lambda a: a.update(sensitivity=a["sensitivity"] * 0)),
    "nothing in it": arrays(lambda a: a.clear()),
    "mask of nothing": arrays(lambda a: a.update(attention_mask=a["attention_mask"] * 0)),
    "no clamp to be seen": arrays(lambda a: a.update(unclamped=a["logits"])),
}
REPORTS: dict[str, Damage] = {
    **JSONS,
    "no schema": without("schema"),
    "schema as truth": field("schema", True),
    "schema of tomorrow": field("schema", 99),
    "huge schema": field("schema", 10**30),
    "engines as list": field("engines", []),
    "engine as text": field("engines", {"checkpoint": "x"}),
    "engine of nothing": field("engines", {"checkpoint": {}}),
    "no verdict": without("verdict"),
    "verdict of another": field("verdict", "fail"),
    "verdict as list": field("verdict", ["pass"]),
    "failures as text": field("failures", "x"),
    "failure as number": field("failures", [1]),
    "scope as number": field("scope", 3),
    "folder as list": field("folder", ["x"]),
    "another folder's": field("manifest_sha256", "0" * 64),
}
GGUFS: dict[str, Damage] = FILES | {
    "text": written(b"hello"),
    "magic of another": changed(lambda data: b"GGML" + data[4:]),
    "version of tomorrow": changed(lambda data: data[:4] + b"\x63" + data[5:]),
    "other byte order": changed(lambda data: data[:4] + bytes(3) + b"\x03" + data[8:]),
    "2^62 tensors": changed(lambda data: data[:8] + struct.pack("<Q", 1 << 62) + data[16:]),
    "2^62 fields": changed(lambda data: data[:16] + struct.pack("<Q", 1 << 62) + data[24:]),
    "key of 2^62": changed(lambda data: data[:24] + struct.pack("<Q", 1 << 62) + data[32:]),
    "array of 2^60": changed(
        lambda data: (
            b"GGUF"
            + struct.pack("<IQQ", 3, 0, 1)
            + struct.pack("<Q", 1)
            + b"a"
            + struct.pack("<IIQ", 9, 0, 1 << 60)
        )
    ),
    "arrays within arrays": changed(
        lambda data: (
            b"GGUF"
            + struct.pack("<IQQ", 3, 0, 1)
            + struct.pack("<Q", 1)
            + b"a"
            + struct.pack("<IIQ", 9, 9, 1) * 2000
        )
    ),
    "another model": changed(lambda data: data.replace(b"gemma3", b"gemma9")),
    "without its last bytes": changed(lambda data: data[:-100]),
}
BAKE = "bake recipe.toml --dry-run --out new"
SHOW, CARD = "show checkpoint", "card checkpoint"
ADAPTER = "export adapter checkpoint --out new"
NOT_NEEDED = ("missing", "link to itself", "nothing in it")
"""What is nothing wrong with a file that may be left out."""
KINDS: dict[tuple[str, str], dict[str, Damage]] = {
    (BAKE, "recipe.toml"): RECIPES,
    (BAKE, "sae/cfg.json"): SAE_CONFIGS,
    (BAKE, "sae/sae_weights.safetensors"): SAE_WEIGHTS,
    (f"{BAKE} scope", "layer_1/params.npz"): SCOPES,
    (BAKE, "base/config.json"): BASE_CONFIGS,
    (BAKE, "base/model.safetensors"): BASE_WEIGHTS,
    (f"{BAKE} sharded", "sharded/model.safetensors.index.json"): INDEXES,
    (SHOW, "checkpoint/manifest.json"): MANIFESTS,
    ("verify checkpoint --only integrity", "checkpoint/manifest.json"): JSONS,
    (CARD, "checkpoint/recipe.toml"): TOMLS,
    (f"{CARD} --report report/report.json", "report/report.json"): REPORTS,
    (ADAPTER, "checkpoint/config.json"): CHECKPOINTS,
    (ADAPTER, "checkpoint/model.safetensors.index.json"): JSONS,
    (ADAPTER, "checkpoint/recipe.toml"): TOMLS,
    ("chat checkpoint", "checkpoint/config.json"): CHECKPOINTS,
    ("chat checkpoint", "checkpoint/tokenizer.json"): TEXTS,
    ("chat checkpoint", "checkpoint/generation_config.json"): {
        name: damage for name, damage in JSONS.items() if name not in NOT_NEEDED
    },
    (ADAPTER, "checkpoint/model-sae-clamp.safetensors"): CLAMP_WEIGHTS,
    ("verify checkpoint --only witnesses", "checkpoint/witnesses.npz"): WITNESSES,
    ("import-gguf gguf/model.gguf --out new", "gguf/model.gguf"): GGUFS,
}
"""By verb and file, what may be wrong with the file."""
ALL = [
    pytest.param(verb, file, damage, id=f"{file}: {name} ({verb.split()[0]})")
    for (verb, file), kinds in KINDS.items()
    for name, damage in kinds.items()
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = good_files(tmp_path_factory.mktemp("bad"))
    recipe = tomllib.loads((root / "recipe.toml").read_text())
    (root / "recipe.toml").write_text(tomli_w.dumps(recipe))
    for name, change in (
        ("scope", {"clamp": [recipe["clamp"][0] | SCOPE]}),
        ("sharded", {"base": recipe["base"] | {"model": "sharded"}}),
    ):
        (root / f"{name}.toml").write_text(tomli_w.dumps(recipe | change))
    rehash(root / "checkpoint", "witnesses.npz")
    return root


SCOPE = {"sae": {"path": "layer_1"}, "hook_point": "blocks.1.hook_resid_post"}


def state(root: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder with its size and time, links not followed."""
    found = {}
    for folder, folders, files in os.walk(root):
        for name in [*folders, *files]:
            about = os.lstat(Path(folder) / name)
            found[str(Path(folder) / name)] = (about.st_size * (name in files), about.st_ino)
    return found


@pytest.fixture
def restored(world: Path) -> Iterator[Callable[[str], Path]]:
    """Gives a file of the world, which is as it was afterwards."""
    kept: list[tuple[Path, bytes | None]] = []

    def give(name: str) -> Path:
        path = world / name
        kept.append((path, path.read_bytes() if path.exists() else None))
        return path

    yield give
    for path, data in kept:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        if data is not None:
            path.write_bytes(data)


def refused(arguments: list[str], world: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Runs a command line that must be refused; its one line."""
    before = state(world)
    capsys.readouterr()
    code = run(arguments)
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert code in (1, 2), (code, said)
    assert state(world) == before
    if code == 1:
        assert not lines
        return said.out
    assert len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) < 2000, lines
    assert "unexpected" not in lines[0] and "Traceback" not in lines[0], lines
    return lines[0]


@pytest.mark.timeout(30)
@pytest.mark.parametrize(("verb", "file", "damage"), ALL)
def test_a_bad_file_is_refused_in_a_line(
    verb: str,
    file: str,
    damage: Damage,
    world: Path,
    restored: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(world)
    for name in ("scope", "sharded"):
        if verb.endswith(f" {name}"):
            verb = verb.removesuffix(f" {name}").replace("recipe.toml", f"{name}.toml")
    damage(restored(file))
    if file.startswith("checkpoint/") and not file.endswith(MANIFEST):
        restored(f"checkpoint/{MANIFEST}")
        rehash(world / "checkpoint")  # what reads it is to find it, not its hash
    refused(verb.split(), world, capsys)


def test_there_are_many_kinds() -> None:
    rows = len(TABLES) * (len(ROWS) + len(FILES)) + len(FILES) + len(GRAPHS)
    assert len(ALL) + rows >= 250


def test_the_good_files_are_taken(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(world)
    for recipe in ("recipe", "scope", "sharded"):
        assert run(["bake", f"{recipe}.toml", "--dry-run", "--out", "new"]) == 0
    assert run(["show", "checkpoint"]) == 0
    assert run(["export", "adapter", "checkpoint", "--out", "new"]) == 0
    shutil.rmtree(world / "new")


@pytest.mark.parametrize(
    "arguments",
    [
        "bake recipe.toml",
        "bake --out new",
        "bake recipe.toml --out",
        "bake recipe.toml --out new --out",
        "bake recipe.toml --out recipe.toml",
        "bake recipe.toml --out base",
        "bake recipe.toml --out sae/new",
        "bake recipe.toml --out rows",
        "bake recipe.toml --out rows --force",
        "bake base --out new",
        "bake /dev/zero --out new",
        "bake recipe.toml --out /dev/null/new",
        "bake recipe.toml --out new --wintesses",
        "show",
        "show recipe.toml",
        "show base",
        "show absent",
        "verify absent",
        "verify recipe.toml",
        "verify checkpoint --only",
        "verify checkpoint --only everything",
        "verify checkpoint --recipe absent.toml",
        "verify checkpoint --recipe base",
        "verify checkpoint --json absent/r.json",
        "verify checkpoint --html base",
        "verify checkpoint --budget -1",
        "verify checkpoint --budget many",
        "verify checkpoint --budget-minutes 0",
        "verify checkpoint --budget-minutes nan",
        "verify base --only integrity",
        "export",
        "export wings checkpoint",
        "export onnx base",
        "export onnx checkpoint --precision int3",
        "export adapter checkpoint",
        "export adapter checkpoint --out checkpoint",
        "export adapter checkpoint --out checkpoint/new",
        "export adapter compiled --out new",
        "export compiled checkpoint --out new --pad many",
        "card checkpoint --report absent.json",
        "card checkpoint --report base",
        "card checkpoint --report /dev/zero",
        "push checkpoint user/name",
        "push checkpoint ../../x --unverified --dry-run",
        "import-gguf absent --out new",
        "import-gguf gguf --out new",
        "import-gguf /dev/zero --out new",
        "import-gguf gguf/model.gguf --out new --sha256 abc",
        "chat absent",
        "chat checkpoint --temperature -1",
        "chat checkpoint --max-new-tokens 0",
        "chat checkpoint --engine steam",
        "select",
        "select absent.toml",
        "sweep recipe.toml --out base --grid value=1",
        "sweep recipe.toml --out new --grid value",
        "sweep recipe.toml --out new --grid value=nan",
        "sweep recipe.toml --out new --grid wings=2",
        "features recipe.toml --html base",
        "train-sae absent.toml --out new",
        "fly",
        "--fly",
        "bake recipe.toml --out new\0",
        "show check\0point",
    ],
)
def test_bad_usage_is_refused_in_a_line(
    arguments: str,
    world: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(world)
    refused(arguments.split(" "), world, capsys)


ROWS: dict[str, bytes] = {
    "a number": b"7",
    "a list": b"[]",
    "nothing": b"null",
    "no field": b"{}",
    "no JSON": b"{",
    "half a character": b'{"F": "\\ud800"}',
    "no UTF-8": b'{"F": "\xff"}',
    "a number for a text": b'{"F": 7}',
    "a list for a text": b'{"F": [1]}',
    "NaN for a text": b'{"F": NaN}',
    "an object for a text": b'{"F": {"a": 1}}',
    "500 levels for a text": b'{"F": ' + b"[" * 500 + b"]" * 500 + b"}",
    "100,000 levels": b"[" * 100_000,
    "6,000 digits": b'{"F": ' + b"9" * 6000 + b"}",
    "a key of many letters": b'{"' + b"x" * 100_000 + b'": 1}',
}
"""A row that is wrong, `F` for the field that is read."""
TABLES: dict[str, tuple[str, Callable[[Recipe], object]]] = {
    "questions": (
        "question",
        lambda r: load_questions(QuestionSource(path="rows/questions.jsonl"), r),
    ),
    "texts": ("text", lambda r: load_texts(TextSource(path="rows/texts.jsonl"), r)),
    "prompts": (
        "prompt",
        lambda r: load_prompts(RowSource(path="rows/prompts.jsonl"), r, answered=True),
    ),
    "trivia": ("right", lambda r: load_trivia(RowSource(path="rows/trivia.jsonl"), r, None)),
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("row", ROWS)
def test_a_bad_row_is_refused_in_a_line(
    name: str, row: str, world: Path, restored: Callable[[str], Path]
) -> None:
    key, load = TABLES[name]
    path = restored(f"rows/{name}.jsonl")
    recipe = Recipe.load(world / "recipe.toml")
    load(recipe)
    path.write_bytes(path.read_bytes() + ROWS[row].replace(b'"F"', f'"{key}"'.encode()) + b"\n")
    with pytest.raises(DataError) as refusal:
        load(recipe)
    assert len(str(refusal.value)) < 1000 and "\n" not in str(refusal.value)
    assert "row" in str(refusal.value) or "UTF-8" in str(refusal.value)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("damage", [name for name in FILES if name != "half"])
def test_a_bad_file_of_rows_is_refused_in_a_line(
    name: str, damage: str, world: Path, restored: Callable[[str], Path]
) -> None:
    FILES[damage](restored(f"rows/{name}.jsonl"))
    with pytest.raises(DataError, match=f"rows/{name}.jsonl"):
        TABLES[name][1](Recipe.load(world / "recipe.toml"))


@pytest.mark.parametrize("damage", FILES)
def test_a_bad_parquet_file_is_refused_in_a_line(
    damage: str, world: Path, restored: Callable[[str], Path]
) -> None:
    FILES[damage](restored("rows/questions.parquet"))
    with pytest.raises(DataError, match=r"rows/questions.parquet"):
        load_questions(
            QuestionSource(path="rows/questions.parquet"), Recipe.load(world / "recipe.toml")
        )


GRAPHS: dict[str, Damage] = {
    "empty": written(b""),
    "text": written(b"hello"),
    "half": changed(lambda data: data[: len(data) // 2]),
    "beyond its cap": lambda path: os.truncate(path, (256 << 20) + 1),
    "data outside": changed(lambda data: data.replace(b"w.bin", b"../w.")),
    "data from the root": changed(lambda data: data.replace(b"w.bin", b"/dev/")),
    "data that is not there": changed(lambda data: data.replace(b"w.bin", b"v.bin")),
    "data as bytes": changed(lambda data: data.replace(b"w.bin", b"w\xff\xfe\xfdn")),
    "no offset": changed(lambda data: data.replace(b"\x12\x0264", b"\x12\x02x4")),
    "data beyond its end": changed(lambda data: data.replace(b"\x12\x0264", b"\x12\x0299")),
    "deep nests": written(b"\x3a\xff\xff\x03" * 500),
}


@pytest.mark.parametrize("damage", GRAPHS)
def test_a_bad_graph_is_refused_in_a_line(damage: str, restored: Callable[[str], Path]) -> None:
    path = restored("graph/model.onnx")
    GRAPHS[damage](path)
    with pytest.raises(FolderError) as refusal:
        open_graph("onnx", path)
    assert "model.onnx" in str(refusal.value) and "\n" not in str(refusal.value)
