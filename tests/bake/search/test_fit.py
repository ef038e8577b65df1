"""Whether an SAE fits: sound ones do, and one of another layer, model or scale does not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
import transformers

from bake.base import find_base
from bake.clamp import find_site
from bake.recipe import Recipe
from bake.sae.fit_figures import UNMEASURED, Fit
from bake.search.fit import checked_fits, measure_fits
from bakeout.cli import run
from bakeout.verbs.demo import MINIATURE
from tests.defects import UNFIT, at_layer
from tests.reports import error_line
from tests.worlds import (
    RecipeWriter,
    save_sae_lens,
    tiny_base,
    tiny_sae,
    tiny_tokenizer,
    write_jsonl,
)

FEATURES = [745, 693, 1475]
TABLE = {"sae": {"path": "sae"}, "method": "clamp", "features": [1, 2], "value": -2.0}


@pytest.fixture
def recipe_of(tmp_path: Path) -> Callable[..., Path]:
    """A recipe over copies of the miniature's model and SAE, with its text."""
    for name in ("model", "sae"):
        shutil.copytree(MINIATURE / name, tmp_path / name)
    shutil.copy(MINIATURE / "retain.jsonl", tmp_path)

    def write(**data: Any) -> Path:
        clamp = {"sae": {"path": "sae"}, "method": "clamp", "features": FEATURES, "value": -9.0}
        corpora = {"path": "retain.jsonl"}
        whole = {
            "schema": 1,
            "base": {"model": "model", "license": "apache-2.0"},
            "clamp": [clamp],
            "select": {"forget": corpora, "retain": corpora},
        }
        path = tmp_path / "recipe.toml"
        path.write_text(tomli_w.dumps(whole | data))
        return path

    return write


def test_a_sound_sae_fits(
    recipe_of: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of()
    (fit,) = checked_fits(Recipe.load(recipe)).values()
    assert fit.trained and not fit.unfit
    assert fit.variance_explained is not None and 0.95 < fit.variance_explained < 1
    assert fit.standardised is not None and 0.95 < fit.standardised < 1
    assert run(["bake", str(recipe), "--out", str(tmp_path / "out"), "--no-witnesses"]) == 0
    assert f"fit    {fit.said}" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["clamps"][0]["fit"] == vars(fit)
    said = f"Fit of the SAE at layer 0: by the word of whoever baked it, {fit.said}."
    assert said in (tmp_path / "out" / "README.md").read_text()
    assert run(["show", str(tmp_path / "out")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"by the word of whoever baked it, {fit.said}" in shown


@pytest.mark.parametrize("name", UNFIT)
def test_one_that_does_not_is_refused(
    recipe_of: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    recipe = recipe_of()
    UNFIT[name](tmp_path)
    capsys.readouterr()  # what transformers says on saving
    asked = ["bake", str(recipe), "--out", str(tmp_path / "out"), "--no-witnesses"]
    assert run(asked) == 2
    said = error_line(capsys)
    assert "SAE sae: does not fit model at blocks." in said
    for alone, word in (("half", "its half"), ("twice", "its double"), ("alike", "layer 0's")):
        assert (f"clearly more of {word}" in said) == (alone in name)
    assert not (tmp_path / "out").exists()
    assert run([*asked, "--unfit"]) == 0
    said = "it does not fit, and was baked with --unfit all the same"
    assert said in capsys.readouterr().out
    assert said in (tmp_path / "out" / "README.md").read_text()


def test_the_figures(tmp_path: Path, write_recipe: RecipeWriter) -> None:
    """Against every formula written out, on a model that is wholly in memory."""
    folder = tiny_tokenizer(tiny_base(tmp_path / "base"))
    sae = tiny_sae()
    save_sae_lens(tmp_path / "sae", sae)
    rows = [{"text": "the cat sat on the mat, and so did the dog. " * 20} for _ in range(3)]
    write_jsonl(tmp_path / "text.jsonl", rows)
    corpus = {"path": "text.jsonl"}
    recipe = write_recipe(TABLE, select={"forget": corpus, "retain": corpus})
    read = Recipe.load(recipe)
    base = find_base(read)
    (fit,) = measure_fits(read, base, [find_site(read.clamp[0], read, base)]).values()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    stream = [i for row in rows for i in tokenizer(row["text"], add_special_tokens=False).input_ids]
    ids = torch.tensor([[2, *stream[127 * i : 127 * (i + 1)]] for i in range(4)])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        h = model(ids, output_hidden_states=True).hidden_states[2][:, 1:]
    x = h.flatten(0, 1).double().numpy()
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    acts = np.where(pre > sae.threshold, np.maximum(pre, 0), 0)
    error = np.square(x - acts @ sae.W_dec - sae.b_dec)
    spread = np.square(x - x.mean(0))
    assert fit.tokens == 508
    assert fit.variance_explained == pytest.approx(1 - error.sum() / spread.sum(), rel=2e-3)
    assert fit.standardised == pytest.approx(np.mean(1 - error.sum(0) / spread.sum(0)), rel=2e-3)
    assert fit.l0 == pytest.approx((acts > 0).sum(1).mean(), rel=2e-3)
    assert fit.dead == pytest.approx((acts == 0).all(0).mean(), abs=1e-3)
    # It explains nothing, and is held to nothing: its directions are random.
    assert not fit.explains and not fit.trained and not fit.unfit
    assert "no trained SAE" in fit.said
    assert checked_fits(read) == {}


@pytest.mark.parametrize("what", ["tokenizer", "slice", "random", "tied"])
def test_what_cannot_be_measured_is_said(
    tmp_path: Path, write_recipe: RecipeWriter, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    tiny_base(tmp_path / "base")
    metadata = {"sae_lens_version": "6.54.12", "hook_name": "blocks.1.hook_resid_post"}
    if what != "tokenizer":
        tiny_tokenizer(tmp_path / "base")
    if what == "slice":
        metadata["slice_of"] = 4096
    sae = tiny_sae()
    if what != "random":
        near = sae.W_enc.T + (what != "tied") * 0.1 * sae.W_dec
        sae = replace(sae, W_dec=np.ascontiguousarray(near))
    save_sae_lens(tmp_path / "sae", sae, metadata=metadata)
    out = tmp_path / "out"
    assert run(["bake", str(write_recipe(TABLE)), "--out", str(out)]) == 0
    assert f"fit    {UNMEASURED}" in capsys.readouterr().out
    assert "fit" not in json.loads((out / "manifest.json").read_text())["clamps"][0]
    assert f"Fit of the SAE at layer 1: {UNMEASURED}." in (out / "README.md").read_text()


def test_what_is_not_finite_does_not_fit() -> None:
    fit = Fit.of(9, [1.0, float("nan")], [2.0, 2.0], l0=3.0, dead=0.0, agreement=50.0)
    assert fit.variance_explained is None and fit.unfit and "not finite" in fit.said
    still = Fit.of(9, [0.5, 0.0], [2.0, 0.0], l0=3.0, dead=0.0, agreement=50.0)
    assert still.standardised == 0.75  # a dimension that does not vary says nothing
    assert Fit.of(9, [0.5], [0.0], l0=3.0, dead=0.0, agreement=50.0).unfit


def test_selection_says_it(
    recipe_of: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clamp = {"sae": {"path": "sae"}, "method": "clamp", "features": "select", "value": -9.0}
    corpora = {"path": "retain.jsonl"}
    select = {"forget": corpora, "retain": corpora, "n_seqs": 4, "seq_len": 64, "n_features": 2}
    recipe = recipe_of(clamp=[clamp], select={**select, "retain_threshold": 1.0})
    (fit,) = checked_fits(Recipe.load(recipe)).values()
    assert run(["select", str(recipe), "--json", str(tmp_path / "found.json")]) == 0
    assert " ".join(f"fit: {fit.said}".split()) in " ".join(capsys.readouterr().out.split())
    found = json.loads((tmp_path / "found.json").read_text())["selections"][0]["fit"]
    assert found == {**vars(fit), "unfit": False}
    at_layer(3)(tmp_path)
    assert run(["select", str(recipe)]) == 0
    assert "bake refuses it" in " ".join(capsys.readouterr().out.split())
