"""TopK SAEs, from SAE to every carrier: the whole encoder goes along, and all features decide."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from sae_lens import SAE
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import bakeout
from bake.modeling_clamped_gemma import SAEClamp
from bake.recipe import Recipe
from bake.stock import load_base
from bakeout.cli import run
from bakeout.verbs.baking import bake_recipe
from tests.engines import InProcess
from tests.folders import rehash
from tests.reports import error_line
from tests.worlds import (
    D_SAE,
    VOCAB,
    save_sae_lens,
    tiny_base,
    tiny_sae,
    tiny_tokenizer,
    write_questions,
    write_texts,
)
from verify.reference.oracle import Oracle
from verify.reference.whole_sae import load_sites

bakeout  # noqa: B018  registers the clamped classes and the adapter
FEATURES = [3, 17, 40, 9, 22, 31]
STORED = ["float32", "bfloat16", "float16", "float64"]
NEAR = 1e-5
"""How near to the border of the k largest a pre-activation is a tie but for rounding."""


def topk_world(
    root: Path, *, family: str = "gemma2", stored: str = "float32", k: int = 6, **sae: Any
) -> Path:
    """A base, a TopK SAE, texts and questions; gives the recipe."""
    tiny_tokenizer(tiny_base(root / "base", family, seed=2))
    save_sae_lens(root / "sae", tiny_sae(), architecture="topk", k=k, **sae)
    path = root / "sae" / "sae_weights.safetensors"
    tensors = load_file(path)
    tensors["W_enc"] = tensors["W_enc"].to(getattr(torch, stored))
    save_file(tensors, path)
    for seed, side in enumerate(("forget", "retain")):
        write_questions(root / f"{side}.jsonl", 4, seed=seed, subject="bells")
    write_texts(root / "text.jsonl", 5)
    clamp = {"sae": {"path": "sae"}, "method": "clamp", "features": FEATURES, "value": -2.0}
    data = {
        "schema": 1,
        "base": {"model": "base", "license": "apache-2.0"},
        "clamp": [clamp],
        "verify": {
            "forget_questions": {"path": "forget.jsonl"},
            "retain_questions": {"path": "retain.jsonl"},
            "text": {"path": "text.jsonl"},
        },
    }
    (root / "recipe.toml").write_text(tomli_w.dumps(data))
    return root / "recipe.toml"


def some_ids() -> torch.Tensor:
    ids = torch.randint(6, VOCAB - 4, (3, 40), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = 2
    return ids


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("by_norm", [False, True])
@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("k", [1, 6, D_SAE])
def test_the_same_features_are_active_as_in_sae_lens(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stored: str,
    by_norm: bool,
    on_input: bool,
    k: int,
) -> None:
    monkeypatch.setattr(SAEClamp, "AT_ONCE", 10)  # fewer at once than k, or than are read
    recipe = topk_world(
        tmp_path,
        stored=stored,
        k=k,
        rescale_acts_by_decoder_norm=by_norm,
        apply_b_dec_to_input=on_input,
    )
    bake_recipe(recipe, tmp_path / "out", force=False, witnesses=False)
    clamp = AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.layers[1].sae_clamp
    assert clamp.W_enc.dtype == getattr(torch, "float32" if stored == "float64" else stored)
    sae = SAE.load_from_disk(tmp_path / "sae", dtype="float32").double()
    h = torch.randn(50, 8, 32, generator=torch.Generator().manual_seed(3)) * 2
    x = h.double().flatten(0, 1)
    acts = sae.encode(x)[:, FEATURES]
    found = clamp.feature_acts(h).flatten(0, 1)
    gain = sae.W_dec.norm(dim=-1) if by_norm else 1.0
    pre = (sae.process_sae_in(x) @ sae.W_enc + sae.b_enc) * gain
    least = pre.topk(k).values[:, -1:]
    ties = ((pre[:, FEATURES] - least).abs() < NEAR) & (pre[:, FEATURES] != least)
    differs = (acts > 0) != (found > 0)
    assert not (differs & ~ties & (acts.abs() > NEAR)).any() and ties.float().mean() < 1e-2
    assert (acts > 0).any() and (k == D_SAE or (acts == 0).any())
    assert torch.allclose(found.double(), acts, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3_text", "gemma3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_says_what_the_hook_says(tmp_path: Path, family: str, dtype: str) -> None:
    recipe = topk_world(tmp_path, family=family, stored="bfloat16")
    bake_recipe(recipe, tmp_path / "out", force=False)
    model = bakeout_model(tmp_path / "out", family, dtype)
    loaded = Recipe.load(recipe)
    base, ids = load_base(loaded, dtype=dtype), some_ids()
    oracle = Oracle(base, load_sites(loaded))
    with torch.no_grad():
        said, plain = model(ids).logits, base(ids).logits
        with oracle.applied() as hooked:
            expected = hooked(ids).logits
    assert oracle.tokens_fired and (expected - plain).abs().max() > 0.1
    assert (said - expected).abs().max() < (1e-4 if dtype == "float32" else 0.1)


def bakeout_model(folder: Path, family: str, dtype: str) -> Any:
    from transformers import AutoModelForImageTextToText

    auto = AutoModelForImageTextToText if family == "gemma3" else AutoModelForCausalLM
    return auto.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A baked world, its graphs and its adapter."""
    root = tmp_path_factory.mktemp("topk")
    recipe = topk_world(root, stored="bfloat16", rescale_acts_by_decoder_norm=True)
    assert run(["bake", str(recipe), "--out", str(root / "out")]) == 0
    assert run(["export", "onnx", str(root / "out")]) == 0
    assert run(["export", "adapter", str(root / "out"), "--out", str(root / "adapter")]) == 0
    return root


@pytest.mark.parametrize("folder", ["out", "adapter"])
def test_it_is_verified(world: Path, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    if folder == "out":
        monkeypatch.setattr("verify.engines.engines.TorchRunner", InProcess)
    report = world / f"{folder}.json"
    asked = ["--recipe", str(world / "recipe.toml"), "--only", "integrity,parity"]
    assert run(["verify", str(world / folder), *asked, "--json", str(report)]) == 0
    engines = json.loads(report.read_text())["engines"]
    names = {"out": {"checkpoint", "onnx"}, "adapter": {"adapter"}}[folder]
    assert names <= engines.keys()
    for name in names:
        parity = engines[name]["parity"]
        assert parity["tokens_fired"] > 0 and parity["rounding"]["worst"] < 8


def test_what_it_ships(world: Path) -> None:
    (site,) = json.loads((world / "out" / "config.json").read_text())["sae_clamp"]["sites"]
    assert site == {
        "layer": 1,
        "k": 6,
        "exempt_bos": True,
        "topk": 6,
        "d_sae": D_SAE,
        "dtype": "bfloat16",
    }
    tensors = load_file(world / "out" / "model-sae-clamp.safetensors")
    whole = load_file(world / "sae" / "sae_weights.safetensors")
    before = "model.layers.1.sae_clamp."
    order = [*FEATURES, *(f for f in range(D_SAE) if f not in FEATURES)]
    assert torch.equal(tensors[f"{before}W_enc"], whole["W_enc"][:, order])
    norms = whole["W_dec"].double().norm(dim=1)
    assert torch.allclose(tensors[f"{before}gain"].double(), norms[order], rtol=1e-6)
    rows = whole["W_dec"].double()[FEATURES] / norms[FEATURES, None]
    assert torch.allclose(tensors[f"{before}W_dec"].double(), rows, rtol=1e-6, atol=1e-7)
    other = load_file(world / "adapter" / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(
            other[f"base_model.model.{name.replace('clamp.', 'clamp_site.')}"], tensor
        )


def change(alter: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def planted(folder: Path) -> None:
        path = folder / "model-sae-clamp.safetensors"
        tensors = load_file(path)
        own = {name.rpartition(".")[2]: name for name in tensors}
        found = {short: tensors[name] for short, name in own.items()}
        alter(found)
        save_file({own[short]: tensor for short, tensor in found.items()}, path)

    return planted


def another_k(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["sae_clamp"]["sites"][0]["topk"] = 7
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def in_float32(tensors: dict[str, torch.Tensor]) -> None:
    tensors["W_enc"] = tensors["W_enc"].float()


DEFECTS = {
    "a competitor's column": change(lambda t: t["W_enc"][:, -1].mul_(1.01)),
    "a listed column": change(lambda t: t["W_enc"][:, 2].mul_(1.01)),
    "two competitors swapped": change(
        lambda t: t["W_enc"].copy_(t["W_enc"][:, [*range(62), 63, 62]])
    ),
    "a gain": change(lambda t: t["gain"][30].mul_(1.0001)),
    "a bias": change(lambda t: t["b_enc"][40].add_(0.01)),
    "one more active": another_k,
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_is_found(
    world: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(world / "out", tmp_path / "out")
    for graph in (tmp_path / "out").glob("*.onnx*"):
        graph.unlink()
    DEFECTS[name](tmp_path / "out")
    rehash(tmp_path / "out", lost={"model.onnx", "genai_config.json"})
    (tmp_path / "out" / "genai_config.json").unlink(missing_ok=True)
    asked = ["--recipe", str(world / "recipe.toml"), "--only", "integrity"]
    assert run(["verify", str(tmp_path / "out"), *asked]) == 1
    assert "integrity" in capsys.readouterr().out


@pytest.mark.parametrize("folder", ["out", "adapter"])
@pytest.mark.parametrize(
    ("field", "value"), [("topk", "6"), ("topk", None), ("d_sae", "64"), ("dtype", 3), ("k", "6")]
)
def test_fields_of_another_type_are_refused_without_a_recipe(
    world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    folder: str,
    field: str,
    value: Any,
) -> None:
    out = shutil.copytree(world / folder, tmp_path / "out")
    name = "config.json" if folder == "out" else "adapter_config.json"
    config = json.loads((out / name).read_text())
    config["sae_clamp"]["sites"][0][field] = value
    (out / name).write_text(json.dumps(config))
    rehash(out)
    capsys.readouterr()
    assert run(["verify", str(out), "--only", "integrity"]) == 2
    assert f"{name}: sae_clamp.sites: {field} is {value!r}; expected" in error_line(capsys)


def test_an_encoder_of_another_dtype_is_refused(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(world / "out", tmp_path / "out")
    change(in_float32)(tmp_path / "out")
    rehash(tmp_path / "out")
    capsys.readouterr()
    assert run(["export", "adapter", str(tmp_path / "out"), "--out", str(tmp_path / "a")]) == 2
    assert "another shape or dtype than config.json says" in error_line(capsys)


def test_compiling_is_refused_by_name(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert run(["export", "compiled", str(world / "out"), "--out", str(tmp_path / "c")]) == 2
    assert "TopK SAE" in error_line(capsys)


@pytest.mark.parametrize("verb", ["select", "sweep"])
def test_selecting_is_refused_by_name(
    tmp_path: Path, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = Recipe.load(topk_world(tmp_path))
    data = recipe.to_dict()
    data["clamp"][0]["features"] = "select"
    corpus = {"path": "text.jsonl"}
    data["select"] = {"forget": corpus, "retain": corpus}
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(data))
    more = ["--out", str(tmp_path / "study"), "--grid", "value=-2"] if verb == "sweep" else []
    capsys.readouterr()
    assert run([verb, str(tmp_path / "recipe.toml"), *more]) == 2
    assert "is a TopK SAE" in error_line(capsys)


@pytest.mark.parametrize(
    ("field", "value"), [("k", 0), ("k", D_SAE + 1), ("k", True), ("k", None), ("k", "6")]
)
def test_a_k_that_cannot_be(
    tmp_path: Path, field: str, value: object, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = topk_world(tmp_path)
    config = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    (tmp_path / "sae" / "cfg.json").write_text(json.dumps({**config, field: value}))
    capsys.readouterr()
    assert run(["bake", str(recipe), "--out", str(tmp_path / "out")]) == 2
    assert f"expected a whole number from 1 to d_sae, {D_SAE}" in error_line(capsys)


def test_a_slice_of_one_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = topk_world(tmp_path)
    config = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    config["metadata"]["slice_of"] = 4096
    (tmp_path / "sae" / "cfg.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert run(["bake", str(recipe), "--out", str(tmp_path / "out")]) == 2
    assert "slice_of is 4096; expected all features of a TopK SAE" in error_line(capsys)


@pytest.mark.parametrize("k", [1, 13, D_SAE])
def test_prompts_that_fire_it_are_found(tmp_path: Path, k: int) -> None:
    recipe, out = topk_world(tmp_path, k=k), tmp_path / "out"
    data = tomllib.loads(recipe.read_text())
    data["clamp"][0]["features"] = list(range(40))  # some of them are the least that is active
    recipe.write_text(tomli_w.dumps(data))
    assert run(["bake", str(recipe), "--out", str(out), "--witnesses"]) == 0
    assert (out / "witnesses.npz").is_file()
    assert run(["export", "onnx", str(out)]) == 0


def test_a_decoder_row_of_no_length_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = topk_world(tmp_path, rescale_acts_by_decoder_norm=True)
    path = tmp_path / "sae" / "sae_weights.safetensors"
    tensors = load_file(path)
    tensors["W_dec"][30] = 0
    save_file(tensors, path)
    capsys.readouterr()  # what transformers says on saving
    assert run(["bake", str(recipe), "--out", str(tmp_path / "out")]) == 2
    assert "W_dec row 30 is zero" in error_line(capsys)


def test_a_dry_run_says_what_it_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = topk_world(tmp_path, stored="float16")
    assert run(["bake", str(recipe), "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "topk   the whole encoder, 64 features in float16: 4.1 kB" in said
    assert np.prod((32, 64, 2)) == 4096
