"""What is measured on the base, against the base itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf

from bakeout.verbs.baking import bake_recipe
from export.carriers.compiled.stock_layers import logic_of
from export.carriers.compiled.trial import LENGTH, SEQUENCES, measure, random_tokens, trial_streams
from export.clamped import Clamped, open_clamped
from tests.folders import COMPILED_CLASSES
from tests.worlds import save_sae_lens, tiny_base, tiny_sae


def source_of(folder: Path, family: str) -> Clamped:
    """A checkpoint with clamps at layers 1 and 2."""
    tiny_base(folder / "base", family, shards=3)
    for layer in (1, 2):
        save_sae_lens(folder / f"sae{layer}", tiny_sae(layer), layer=layer)
    tables = "".join(
        f'[[clamp]]\nsae = {{ path = "sae{layer}" }}\nmethod = "clamp"\nfeatures = [1, 5, 9]\n'
        "value = -6.0\n"
        for layer in (1, 2)
    )
    (folder / "recipe.toml").write_text(
        f'schema = 1\n[base]\nmodel = "base"\nlicense = "apache-2.0"\n{tables}'
    )
    bake_recipe(folder / "recipe.toml", folder / "checkpoint", force=False)
    return open_clamped(folder / "checkpoint")


@pytest.mark.parametrize("family", COMPILED_CLASSES)
def test_residual_streams_are_those_of_the_model(tmp_path: Path, family: str) -> None:
    source = source_of(tmp_path, family)
    ids = random_tokens(source)
    assert ids.shape == (SEQUENCES, LENGTH) and (ids[:, 0] == 2).all()
    first, second = measure(source, ids)
    base = getattr(tf, COMPILED_CLASSES[family]).from_pretrained(tmp_path / "base")
    clamped = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    tokens = torch.from_numpy(ids)
    bos = torch.from_numpy(ids == 2)

    streams = []
    hook = clamped.model.layers[2].sae_clamp.register_forward_pre_hook(
        lambda _, args: streams.append(args[0])
    )
    with torch.no_grad():
        before = base(input_ids=tokens, output_hidden_states=True).hidden_states[2]
        clamped(input_ids=tokens)
    hook.remove()
    assert np.allclose(first.x, before[~bos].numpy(), atol=1e-4)
    assert np.allclose(first.exempt, before[bos].numpy(), atol=1e-4)
    assert np.allclose(second.x, streams[0][~bos].numpy(), atol=1e-4)
    assert not np.allclose(second.x, first.x, atol=1e-1)


def test_trials_push_every_feature_above_and_below(tmp_path: Path) -> None:
    source = source_of(tmp_path, "gemma2")
    measured = measure(source, random_tokens(source))[0]
    site = source.sites[0]
    logic = logic_of(site)
    x = trial_streams(site, logic, measured)
    assert len(x) == len(measured.x) + 2 * len(logic.flags)
    pre = x[len(measured.x) :] @ site.W_enc.astype(float) + site.b_enc
    for i, flag in enumerate(logic.flags):
        above, below = pre[2 * i, flag.feature], pre[2 * i + 1, flag.feature]
        assert above > flag.threshold > below
