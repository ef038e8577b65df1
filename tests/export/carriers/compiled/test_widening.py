"""A wider base computes what the base computes; numbers are stored as torch stores them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf

from bake.errors import ExportError
from bake.tensors import to_bits, to_float32
from export.carriers.compiled.layer_scalars import rounded
from export.carriers.compiled.stock_layers import logic_of
from export.carriers.compiled.widening import choose_width, plan_widening, widened
from export.clamped import open_clamped
from tests.folders import COMPILED_CLASSES, compile_recipe
from tests.logits import flat_logits, tiny_prompts
from tests.worlds import save_sae_lens, tiny_base, tiny_config, tiny_sae


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_numbers_are_rounded_as_torch_rounds_them(dtype: str) -> None:
    torch_dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[dtype]
    values = torch.randn(4000, generator=torch.Generator().manual_seed(0)) * 3
    values[:3] = torch.tensor([0.0, -1.0, 1 + 2.0**-9])
    stored = values.to(torch_dtype)
    bits = to_bits(values.numpy(), dtype)
    width = torch.int32 if dtype == "F32" else torch.int16
    assert np.array_equal(bits.astype(np.int64), stored.view(width).numpy().astype(bits.dtype))
    assert np.array_equal(to_float32(bits, dtype), stored.float().numpy())
    assert float(rounded(np.asarray(math.pi), dtype)) == float(
        torch.tensor(math.pi).to(torch_dtype)
    )


def test_the_width_is_the_least_whose_root_is_short() -> None:
    assert choose_width(2304, 22, 8, 8, None) == 2328  # 48.2494, stored as 48.25
    width = choose_width(128, 103, 8, 4, None)
    assert width >= 231 and width % 8 == 0
    assert abs(round(math.sqrt(width), 2) / math.sqrt(width) - 1) < 1e-4
    assert choose_width(32, 5, 8, 4, 12) == 44


@pytest.mark.parametrize(
    ("pad", "match"),
    [(4, r"--pad 4: holds 4 .* need 5; pass --pad 8 or none"), (9, "41, which 4 attention heads")],
)
def test_a_padding_that_does_not_fit_is_refused(pad: int, match: str) -> None:
    with pytest.raises(ExportError, match=match):
        choose_width(32, 5, 8, 4, pad)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", COMPILED_CLASSES)
def test_a_clamp_that_never_fires_leaves_the_wider_base_as_it_was(
    tmp_path: Path, family: str, tied: bool
) -> None:
    config = tiny_config(family)
    config.tie_word_embeddings = tied
    config.attention_bias = True
    torch.manual_seed(0)
    base = getattr(tf, COMPILED_CLASSES[family])(config)
    middle = 1.0 if family.startswith("gemma4") else 0.0  # where a norm multiplies by w
    for name, parameter in base.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(parameter, middle if "norm" in name else 0.0, std=0.3)
    base.save_pretrained(tmp_path / "base")
    save_sae_lens(tmp_path / "sae", tiny_sae(), layer=2)
    (tmp_path / "recipe.toml").write_text(
        'schema = 1\n[base]\nmodel = "base"\nlicense = "apache-2.0"\n[[clamp]]\n'
        'sae = { path = "sae" }\nmethod = "zero"\nfeatures = [1]\ntrigger = 1000000.0\n'
    )
    folder = compile_recipe(tmp_path / "recipe.toml", tmp_path)
    wide = tf.AutoModelForCausalLM.from_pretrained(folder)
    ids = tiny_prompts()
    assert wide.config.tie_word_embeddings == tied
    assert (flat_logits(wide, ids) - flat_logits(base, ids)).abs().max() < 2e-4
    narrow, wider = (m.generate(ids, max_new_tokens=12, do_sample=False) for m in (base, wide))
    assert torch.equal(narrow, wider)


def plan_of(tmp_path: Path, **site: Any) -> Any:
    from bakeout.verbs.baking import bake_recipe

    tiny_base(tmp_path / "base")
    for name, layer in (("one", 1), ("two", 2)):
        save_sae_lens(tmp_path / name, tiny_sae(), layer=layer)
    (tmp_path / "recipe.toml").write_text(
        'schema = 1\n[base]\nmodel = "base"\nlicense = "apache-2.0"\n'
        '[[clamp]]\nsae = { path = "one" }\nmethod = "zero"\nfeatures = [1, 2]\n'
        '[[clamp]]\nsae = { path = "two" }\nmethod = "zero"\nfeatures = [3]\nexempt_bos = false\n'
    )
    bake_recipe(tmp_path / "recipe.toml", tmp_path / "checkpoint", force=False)
    source = open_clamped(tmp_path / "checkpoint")
    logics = [logic_of(site) for site in source.sites]
    return plan_widening(source, logics, n_neurons=60, dtype="float32", pad=None)


def test_every_site_has_channels_of_its_own_and_its_kind_of_constants(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    assert plan.exempting and plan.always
    held, always = plan.always[:4], plan.always[4:]
    assert [s.constants for s in plan.streams] == [plan.exempting, always]
    taken = [*held, *plan.exempting, *always]
    taken += [channel for place in plan.places for channel in (place.reference, *place.flags)]
    assert sorted(taken) == list(range(32, 32 + 13))
    assert plan.mlp == 64  # 48 would not hold 60 neurons
    assert plan.eps == pytest.approx(1e-6 * 32 / plan.stream.width)
    kappas = len(taken[:8]) * plan.stream.kappa**2
    assert 0.2 < kappas / ((plan.stream.width - 32) * 1e-6) < 8


def test_a_tensor_that_no_stock_gemma_has_is_refused(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    with pytest.raises(ExportError, match=r"lora_A.weight: is none of a stock Gemma's"):
        widened("model.layers.0.self_attn.lora_A.weight", (4, 32), plan)
