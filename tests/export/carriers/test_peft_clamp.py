"""The PEFT method: the checkpoint's logits over the base, and nothing without it."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel
from peft.utils import PeftType
from safetensors.torch import load_file, save_file

import bakeout
from export.carriers.peft_clamp import NAME, SITE, register
from export.code_check import PEFT_TYPE, PEFT_TYPES
from tests.folders import make_adapter
from tests.worlds import KINDS

HOLDS_FOR = ("0.21",)
"""Versions of peft whose enum can be extended, and that call what a method here overrides."""


def base_of(folder: Path, **options: Any) -> Any:
    auto = tf.AutoModelForCausalLM
    if "vision_config" in (folder / "base" / "config.json").read_text():
        auto = tf.AutoModelForImageTextToText
    return auto.from_pretrained(folder / "base", **options)


def checkpoint_of(folder: Path, **options: Any) -> Any:
    auto = tf.AutoModelForCausalLM
    if "vision_config" in (folder / "base" / "config.json").read_text():
        auto = tf.AutoModelForImageTextToText
    return auto.from_pretrained(folder / "checkpoint", **options)


def prompts() -> dict[str, torch.Tensor]:
    """Two prompts, the second padded on the left."""
    ids = torch.randint(3, 90, (2, 14), generator=torch.Generator().manual_seed(1))
    ids[0, 0] = ids[1, 4] = 2
    ids[1, :4] = 0
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("work"))


def test_peft_is_a_version_that_holds() -> None:
    assert version("peft").startswith(HOLDS_FOR)
    assert bakeout and PeftType(NAME) is PeftType.SAE_CLAMP and NAME in PeftType.__members__
    register()  # twice is as once
    assert [member.value for member in PeftType].count(NAME) == 1


@pytest.mark.parametrize("family", KINDS)
def test_logits_are_the_checkpoints_and_disabled_the_bases(tmp_path: Path, family: str) -> None:
    folder = make_adapter(tmp_path, family)
    base, inputs = base_of(folder), prompts()
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        before = base(**inputs).logits[real]
        wanted = checkpoint_of(folder)(**inputs).logits[real]
        model = PeftModel.from_pretrained(base, folder / "adapter")
        assert (wanted - before).abs().max() > 0.1
        assert torch.equal(model(**inputs).logits[real], wanted)
        with model.disable_adapter():
            assert torch.equal(model(**inputs).logits[real], before)
        assert torch.equal(model(**inputs).logits[real], wanted)
        assert torch.equal(model.unload()(**inputs).logits[real], before)


def test_generating_saving_and_hidden_states(work: Path, tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(base_of(work), work / "adapter")
    checkpoint, inputs = checkpoint_of(work), prompts()
    options = {"max_new_tokens": 8, "do_sample": False}
    written = [m.generate(**inputs, **options) for m in (model, checkpoint)]
    assert torch.equal(*written)
    states = [m(**inputs, output_hidden_states=True).hidden_states for m in (model, checkpoint)]
    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))
    model.save_pretrained(tmp_path / "again")
    config = tmp_path / "again" / "adapter_config.json"
    stated = json.loads(config.read_text())
    assert stated["peft_type"] == PEFT_TYPE
    for name in PEFT_TYPES:  # as folders of today and of before say it
        config.write_text(json.dumps({**stated, "peft_type": name}))
        again = PeftModel.from_pretrained(base_of(work), tmp_path / "again")
        assert torch.equal(again(**inputs).logits, checkpoint(**inputs).logits)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("family", ["gemma4", "gemma4_text, shared keys"])
def test_generating_where_layers_are_given_the_last_tokens_alone(
    tmp_path: Path, family: str
) -> None:
    """As transformers runs layers that share keys: BOS is exempt by its place among all tokens."""
    folder = make_adapter(tmp_path, family, layer=2)
    model = PeftModel.from_pretrained(base_of(folder), folder / "adapter")
    given: list[torch.Size] = []
    clamp = model.get_decoder().layers[2].sae_clamp_site
    clamp.register_forward_hook(lambda _, inputs, __: given.append(inputs[0].shape[:2]))
    inputs = prompts()
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    both = [m.generate(**inputs, **options) for m in (model, checkpoint_of(folder))]
    assert torch.equal(*both)
    assert {shape[1] for shape in given} == {1} and inputs["input_ids"].shape[1] > 1
    for row, mask in zip(both[0], inputs["attention_mask"], strict=True):
        alone = row[int((mask == 0).sum()) :][None]
        prompt = alone[:, : int(mask.sum())]
        for cached in (True, False):
            again = model.generate(input_ids=prompt, use_cache=cached, **options)
            assert torch.equal(again, alone)
    short = torch.tensor([[2, 2]])  # the last token is BOS, the first is not looked at
    with torch.no_grad(), model.disable_adapter():
        base = model(input_ids=short, logits_to_keep=1).logits
    assert torch.equal(model(input_ids=short, logits_to_keep=1).logits, base)


def test_in_bfloat16_it_is_the_checkpoint_too(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path, dtype="bfloat16")
    model = PeftModel.from_pretrained(base_of(folder), folder / "adapter")
    checkpoint, inputs = checkpoint_of(folder), prompts()
    assert model.dtype == torch.bfloat16
    assert torch.equal(model(**inputs).logits, checkpoint(**inputs).logits)


def test_merging_says_why_not(work: Path) -> None:
    model = PeftModel.from_pretrained(base_of(work), work / "adapter")
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(NotImplementedError, match="bakeout export compiled"):
            merge()


def test_another_base_is_refused(work: Path) -> None:
    base = base_of(work)
    with torch.no_grad():
        base.model.norm.weight[3] += 1
    with pytest.raises(ValueError, match=r"not the base that the adapter belongs to .base"):
        PeftModel.from_pretrained(base, work / "adapter")
    model = PeftModel.from_pretrained(base_of(work), work / "adapter")
    with pytest.raises(ValueError, match="has a clamp adapter already"):
        PeftModel.from_pretrained(model.get_base_model(), work / "adapter", adapter_name="two")


@pytest.mark.parametrize("damage", ["missing", "not finite", "reshaped"])
def test_a_damaged_adapter_raises(work: Path, tmp_path: Path, damage: str) -> None:
    import shutil

    folder = shutil.copytree(work / "adapter", tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith("value"))
    if damage == "missing":
        del tensors[name]
    else:
        tensors[name] = torch.zeros(7) if damage == "reshaped" else tensors[name] * float("nan")
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises((ValueError, RuntimeError), match=r"value"):
        PeftModel.from_pretrained(base_of(work), folder)(**prompts())


@pytest.mark.parametrize(
    ("key", "value"),
    [("layer", -1), ("layer", True), ("layer", 9), ("exempt_bos", "no"), ("exempt_bos", 0)],
)
def test_a_config_of_other_types_raises(
    work: Path, tmp_path: Path, key: str, value: object
) -> None:
    import shutil

    folder = shutil.copytree(work / "adapter", tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["sae_clamp"]["sites"][0][key] = value
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"{key} is {value!r}; expected"):
        PeftModel.from_pretrained(base_of(work), folder)


@pytest.mark.parametrize("first", ["import bakeout, peft", "import peft, bakeout"])
def test_importing_bakeout_registers_it_in_any_order(work: Path, first: str) -> None:
    code = (
        f"{first}\nfrom peft import PeftConfig\n"
        f"assert PeftConfig.from_pretrained({str(work / 'adapter')!r}).sae_clamp"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_without_bakeout_it_fails_loudly(work: Path) -> None:
    code = (
        "from transformers import AutoModelForCausalLM\nfrom peft import PeftModel\n"
        f"base = AutoModelForCausalLM.from_pretrained({str(work / 'base')!r})\n"
        f"PeftModel.from_pretrained(base, {str(work / 'adapter')!r})\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1] == f"KeyError: '{PEFT_TYPE}'"
    assert "install it and `import bakeout` first" in PEFT_TYPE
    assert SITE.startswith(NAME.lower())
