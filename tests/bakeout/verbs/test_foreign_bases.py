"""Bases that are not plain weights: every verb that reads a base says so in the same words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from bakeout.cli import run
from tests.reports import error_line
from tests.worlds import (
    save_sae_lens,
    tiny_base,
    tiny_sae,
    tiny_tokenizer,
    write_corpora,
)

TRAIN = """
schema = 1
[base]
model = "base"
[sae]
hook_point = "blocks.1.hook_resid_post"
d_sae = 8
k = 4
[train]
text = { path = "text.jsonl" }
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a checkpoint of it, and recipes that name features or have them selected."""
    root = tmp_path_factory.mktemp("foreign")
    tiny_tokenizer(tiny_base(root / "base"))
    save_sae_lens(root / "sae", tiny_sae())
    write_corpora(root)
    clamp = {"sae": {"path": "sae"}, "method": "clamp", "features": [1, 2], "value": -3.0}
    data: dict[str, Any] = {
        "schema": 1,
        "base": {"model": "base", "license": "apache-2.0"},
        "clamp": [clamp],
        "verify": {
            "forget_questions": {"path": "forget_questions.jsonl"},
            "retain_questions": {"path": "retain_questions.jsonl"},
            "text": {"path": "text.jsonl"},
        },
    }
    (root / "recipe.toml").write_text(tomli_w.dumps(data))
    select = {"forget": {"path": "forget.jsonl"}, "retain": {"path": "retain.jsonl"}}
    data = {**data, "clamp": [{**clamp, "features": "select"}], "select": select}
    (root / "select.toml").write_text(tomli_w.dumps(data))
    (root / "train.toml").write_text(TRAIN)
    assert (
        run(["bake", str(root / "recipe.toml"), "--out", str(root / "out"), "--no-witnesses"]) == 0
    )
    return root


@pytest.fixture(params=["quantised", "adapter"])
def spoilt(request: pytest.FixtureRequest, world: Path) -> Any:
    """What the base's refusal says; the base is as it was afterwards."""
    config, adapter = world / "base" / "config.json", world / "base" / "adapter_config.json"
    before = config.read_text()
    if request.param == "quantised":
        quantised = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
        config.write_text(json.dumps(json.loads(before) | quantised))
    else:
        adapter.write_text('{"peft_type": "LORA"}')
    yield "quantization_config" if request.param == "quantised" else "merge_and_unload"
    config.write_text(before)
    adapter.unlink(missing_ok=True)


@pytest.mark.parametrize(
    "verb",
    [
        "bake recipe.toml --out new",
        "bake recipe.toml --out new --no-witnesses",
        "bake recipe.toml --out new --dry-run",
        "bake select.toml --out new",
        "select select.toml",
        "features select.toml --html new.html",
        "sweep select.toml --out new --grid value=-1,-2",
        "train-sae train.toml --out new",
        "verify out --recipe recipe.toml",
        "verify out --recipe recipe.toml --only parity",
        "chat out --beside base",
    ],
)
def test_every_verb_refuses_it(
    world: Path,
    spoilt: str,
    verb: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(world)
    monkeypatch.setenv("BAKEOUT_CACHE", str(tmp_path / "cache"))
    capsys.readouterr()
    assert run(verb.split()) == 2
    said = error_line(capsys)
    assert spoilt in said and "base" in said
    assert not (world / "new").exists() and "bakeout-" not in said
