"""What README, cards and the demo say to paste, pasted by a stranger at a terminal that is open."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w
import torch
import transformers
from safetensors.torch import load_file, save_file

from bake.recipe import Recipe
from bakeout.terminal import show_folder
from export.carriers.adapter import write_adapter
from export.carriers.carriers import CARRIERS, loading_code
from export.carriers.checkpoint import plan_checkpoint, write_checkpoint
from export.carriers.compiled.compiling import plan_compiled, write_compiled
from export.clamped import open_clamped
from model_cards.facts import facts_of_folder
from model_cards.render import render
from tests.worlds import FAMILIES, save_sae_lens, tiny_base, tiny_sae, tiny_tokenizer

ROOT = Path(__file__).parents[3]


def baked(root: Path, family: str) -> Path:
    tiny_tokenizer(tiny_base(root / f"{family}-base", family))
    save_sae_lens(root / "sae", tiny_sae())
    data = {
        "schema": 1,
        "base": {"model": f"{family}-base", "license": "apache-2.0"},
        "clamp": [{"sae": {"path": "sae"}, "method": "clamp", "features": [1, 5], "value": -6.0}],
    }
    (root / f"{family}.toml").write_text(tomli_w.dumps(data))
    plan = plan_checkpoint(Recipe.load(root / f"{family}.toml"))
    return write_checkpoint(plan, root / family, card="# card\n")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clamped folder of each family, and one of the other carriers."""
    root = tmp_path_factory.mktemp("strangers")
    for family in FAMILIES:
        baked(root, family)
    write_compiled(plan_compiled(root / "gemma2"), root / "compiled", card="# card\n")
    write_adapter(open_clamped(root / "gemma2"), root / "adapter", card="# card\n")
    return root


def paste(code: str, world: Path, tmp_path: Path) -> str:
    """What a stranger's Python says; its stdin is open, and nobody answers."""
    reading, writing = os.pipe()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if "import bakeout" in code:
        environment["PYTHONPATH"] = str(ROOT)
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            stdin=reading,
            capture_output=True,
            text=True,
            check=False,
            cwd=world,
            env=environment,
        )
    finally:
        os.close(reading)
        os.close(writing)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def code_of(page: str) -> str:
    return re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]


@pytest.mark.parametrize("shipped", ["README", "card", "compiled", "adapter", "demo"])
def test_a_shipped_snippet_runs_without_a_question(
    world: Path, tmp_path: Path, shipped: str
) -> None:
    if shipped == "README":
        code = code_of((ROOT / "README.md").read_text(encoding="utf-8"))
        code = code.replace("gemma-2-2b-clamped", "gemma2")
    elif shipped == "demo":
        code = loading_code("gemma2", own_code=True)
    else:
        folder = {"card": "gemma2"}.get(shipped, shipped)
        code = code_of(render(facts_of_folder(world / folder))).replace("FOLDER", folder)
        code = code.replace('"gemma2-base"', f'"{world / "gemma2-base"}"')
    code += '\nprint(type(model).__name__, tokenizer("A").input_ids)'
    said = paste(code, world, tmp_path)
    assert "custom code" not in said and "[y/N]" not in said
    name = {"compiled": "Gemma2ForCausalLM", "adapter": "PeftModel"}.get(shipped, "Clamped")
    assert name in said and re.search(r"\[2, \d+", said)


def test_every_family_loads_without_a_question(world: Path, tmp_path: Path) -> None:
    code = "".join(loading_code(family, own_code=True) for family in FAMILIES)
    assert "[y/N]" not in paste(code, world, tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_model_gives_the_clamped_hidden_states(world: Path, family: str) -> None:
    auto = transformers.AutoModel.from_pretrained(world / family, trust_remote_code=True)
    whole = transformers.AutoModelForCausalLM.from_pretrained(
        world / family, trust_remote_code=True
    )
    base = transformers.AutoModel.from_pretrained(world / f"{family}-base")
    ids = torch.arange(6, 30).view(2, 12)
    found = auto(input_ids=ids).last_hidden_state
    expected = whole(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(found, expected)
    assert not torch.equal(found, base(input_ids=ids).last_hidden_state)
    names = [name for name, _ in auto.named_buffers() if ".sae_clamp." in name]
    assert len(names) == 8
    with pytest.raises(ValueError, match="is missing from the checkpoint"):
        broken = world / f"{family}-broken"
        shutil.copytree(world / family, broken)
        index = broken / "model.safetensors.index.json"
        data = json.loads(index.read_text())
        gone = next(name for name in data["weight_map"] if name.endswith("sae_clamp.W_enc"))
        tensors = load_file(broken / data["weight_map"][gone])
        del data["weight_map"][gone], tensors[gone]
        save_file(tensors, broken / "model-sae-clamp.safetensors", metadata={"format": "pt"})
        index.write_text(json.dumps(data))
        transformers.AutoModel.from_pretrained(broken, trust_remote_code=True)


@pytest.mark.parametrize(
    ("tuning", "exempt"),
    [
        ("prompt", [True, False, False, False, False, False]),  # of 3 virtual tokens the first
        ("prefix", [True, False, False]),
        ("lora", [True, False, False]),
    ],
)
def test_soft_prompts_exempt_what_stands_first_and_ids_exempt_bos(
    world: Path, tuning: str, exempt: list[bool]
) -> None:
    import peft

    model = transformers.AutoModelForCausalLM.from_pretrained(
        world / "gemma2", trust_remote_code=True
    )
    configs = {
        "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "lora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]),
    }
    seen: list[torch.Tensor] = []
    layer = model.model.layers[1]
    layer.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["sae_exempt"]), with_kwargs=True
    )
    tuned = peft.get_peft_model(model, configs[tuning]())
    tuned(input_ids=torch.tensor([[2, 9, 10]]), attention_mask=torch.ones(1, 3, dtype=torch.long))
    assert seen[-1].tolist() == [exempt]


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3_text"])
def test_a_stock_config_loses_the_clamp_and_that_is_said(
    world: Path, family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(world / f"{family}-base")
    ids = torch.arange(6, 30).view(2, 12)
    for auto in (transformers.AutoModelForCausalLM, type(base)):
        found = auto.from_pretrained(world / family, config=base.config)
        assert torch.equal(found(ids).logits, base(ids).logits)
    with pytest.raises((OSError, ValueError, KeyError)):
        type(base).from_pretrained(world / family)
    capsys.readouterr()
    show_folder(world / family)
    said = " ".join(capsys.readouterr().out.split())
    assert "lost by" in said and "a stock config (config=…)" in said
    assert all(carrier.lost_by for carrier in CARRIERS.values())
    for page in (
        (ROOT / "README.md").read_text(encoding="utf-8"),
        render(facts_of_folder(world / family)),
    ):
        assert "config=…" in page
