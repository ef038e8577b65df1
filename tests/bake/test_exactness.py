"""Checkpoint and adapter against the hooked reference: every method, every kind of model, one and
two hook points, in float32 and bfloat16, read at once and generated from.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
import transformers as tf
from peft import PeftModel

from bake.questions.answers import letter_tokens
from bake.questions.prompts import Batch, Prompt
from bake.recipe import Recipe
from bake.rounding import BAR, epsilon_of
from bake.stock import load_base
from bakeout.verbs.baking import bake_recipe
from export.carriers.adapter import write_adapter
from export.carriers.checkpoint import plan_checkpoint, write_checkpoint
from export.clamped import open_clamped
from tests.clamps import METHOD_FEATURES, METHOD_TABLES
from tests.worlds import (
    KINDS,
    RecipeWriter,
    sae_table,
    save_gemma_scope,
    save_sae_lens,
    tiny_base,
    tiny_sae,
    tiny_tokenizer,
)
from verify.compare.logits import kl_nats, max_abs_difference
from verify.compare.sensitivity import Nearby, Sensitivity
from verify.journal import Journal
from verify.material import Material
from verify.reference.oracle import Oracle
from verify.reference.whole_sae import load_sites
from verify.tolerances import TYPICAL_BAR

SAID = 14
"""Tokens that are generated."""


def auto_of(stock: Any) -> Any:
    images = type(stock).__name__.endswith("ConditionalGeneration")
    return tf.AutoModelForImageTextToText if images else tf.AutoModelForCausalLM


def compare(
    tmp_path: Path, write_recipe: RecipeWriter, tables: list[dict[str, Any]], **base: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """(base, reference and checkpoint logits [tokens, vocab], tokens fired) on random prompts."""
    recipe_file = write_recipe(*tables, base=base)
    bake_recipe(recipe_file, tmp_path / "out", force=False)
    recipe = Recipe.load(recipe_file)
    stock = load_base(recipe)
    oracle = Oracle(stock, load_sites(recipe))
    checkpoint = auto_of(stock).from_pretrained(
        tmp_path / "out", trust_remote_code=True, attn_implementation="eager"
    )
    assert checkpoint.dtype == stock.dtype
    ids = torch.randint(3, 90, (4, 24), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = 2
    with torch.no_grad():
        before = stock(input_ids=ids).logits
        with oracle.applied() as hooked:
            reference = hooked(input_ids=ids).logits
        found = checkpoint(input_ids=ids).logits
    flat = [logits.float().flatten(0, 1) for logits in (before, reference, found)]
    return flat[0], flat[1], flat[2], oracle.tokens_fired


@pytest.mark.parametrize(
    ("family", "method"),
    [("gemma2", method) for method in METHOD_TABLES]
    + [(kind, "clamp") for kind in KINDS if kind != "gemma2"],
)
def test_float32(tmp_path: Path, write_recipe: RecipeWriter, family: str, method: str) -> None:
    tiny_base(tmp_path / "base", family)
    save_sae_lens(tmp_path / "one", tiny_sae(), layer=1)
    table = {"sae": {"path": "one"}, "features": METHOD_FEATURES, **METHOD_TABLES[method]}
    before, reference, found, fired = compare(tmp_path, write_recipe, [table])
    assert fired > 0
    assert (before - reference).abs().max() > 0.1  # the clamp moves the model
    assert (found - reference).abs().max() <= 1e-4
    assert torch.equal(found.argmax(-1), reference.argmax(-1))


@pytest.mark.parametrize("architecture", ["standard", "gated"])
def test_float32_on_other_saes(
    tmp_path: Path, write_recipe: RecipeWriter, architecture: str
) -> None:
    tiny_base(tmp_path / "base")
    save_sae_lens(tmp_path / "sae", tiny_sae(), architecture=architecture)
    table = {"sae": {"path": "sae"}, "features": METHOD_FEATURES, **METHOD_TABLES["clamp"]}
    before, reference, found, fired = compare(tmp_path, write_recipe, [table])
    assert fired > 0 and (before - reference).abs().max() > 0.1
    assert (found - reference).abs().max() <= 1e-4


@pytest.mark.parametrize("method", METHOD_TABLES)
def test_float32_on_a_topk_sae(tmp_path: Path, write_recipe: RecipeWriter, method: str) -> None:
    tiny_base(tmp_path / "base")
    save_sae_lens(tmp_path / "one", tiny_sae(), layer=1, architecture="topk", k=9)
    save_sae_lens(tmp_path / "two", tiny_sae(1), layer=2)
    tables = [
        {"sae": {"path": name}, "features": METHOD_FEATURES, **METHOD_TABLES[method]}
        for name in ("one", "two")
    ]
    before, reference, found, fired = compare(tmp_path, write_recipe, tables)
    assert fired > 0 and (before - reference).abs().max() > 0.1
    assert (found - reference).abs().max() <= 1e-4


@pytest.mark.parametrize("exempt_bos", [True, False])
def test_bos_is_exempt_only_where_the_recipe_says_so(
    tmp_path: Path, write_recipe: RecipeWriter, exempt_bos: bool
) -> None:
    tiny_base(tmp_path / "base")
    save_sae_lens(tmp_path / "sae", tiny_sae())
    features = list(range(40))  # so many that one of them fires on BOS
    table = {"sae": {"path": "sae"}, "features": features, **METHOD_TABLES["clamp"]}
    before, reference, found, _ = compare(
        tmp_path, write_recipe, [table | {"exempt_bos": exempt_bos}]
    )
    assert (found - reference).abs().max() <= 1e-4
    assert torch.equal(found[0], before[0]) == exempt_bos


# --------------------------------------------------------------------------- every way of running


@dataclass(frozen=True)
class World:
    """A base of some kind and dtype, its SAEs, and what is read."""

    folder: Path
    material: Material

    def recipe(self, method: str) -> Recipe:
        """One that clamps at two hook points."""
        table = {"features": METHOD_FEATURES, **METHOD_TABLES[method]}
        base = {"model": "base", "license": "apache-2.0"}
        clamps = [{**sae_table(name), **table} for name in ("one", "layer_2")]
        path = self.folder / f"{method}.toml"
        path.write_text(tomli_w.dumps({"schema": 1, "base": base, "clamp": clamps}))
        return Recipe.load(path)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=KINDS)
def world(request: pytest.FixtureRequest, dtype: str, tmp_path_factory: Any) -> World:
    folder = tmp_path_factory.mktemp("world")
    tiny_base(folder / "base", request.param, dtype=dtype)
    save_sae_lens(folder / "one", tiny_sae(), layer=1)
    save_gemma_scope(folder / "layer_2", tiny_sae(1))
    generator = torch.Generator().manual_seed(1)
    bodies = [torch.randint(3, 90, (n,), generator=generator).tolist() for n in (24, 30, 27, 29)]
    windows = [Prompt("text", "text", i, (2, *ids), True) for i, ids in enumerate(bodies)]
    tokenizer = tf.AutoTokenizer.from_pretrained(tiny_tokenizer(folder / "tokenizer"))
    return World(folder, Material({}, windows, letter_tokens(tokenizer), tokenizer))


@dataclass(frozen=True)
class Expected:
    """What the reference says, and how far one rounding moves that."""

    logits: torch.Tensor
    """[batch, seq, vocab], of a forward in which nothing is cached."""
    moved: torch.Tensor
    """[batch, seq]."""
    mean_kl: float
    near: Nearby
    real: torch.Tensor
    """[batch, seq] bool: no padding."""

    def assert_held(self, found: torch.Tensor, columns: slice = slice(None)) -> None:
        """Some columns' logits are within what rounding explains: of all of them on the average,
        and at every token that is away from a gate's edge, of which bfloat16 leaves none.
        """
        expected, real = self.logits[:, columns], self.real[:, columns]
        kl = kl_nats(expected[real], found[real].float())
        assert float(kl.mean()) <= TYPICAL_BAR**2 * self.mean_kl
        sure = real & ~self.near.apart[:, columns]
        far = max_abs_difference(expected, found.float()) / self.moved[:, columns]
        assert (far[sure] <= BAR).all()


def expected_of(oracle: Oracle, material: Material, batch: Batch) -> Expected:
    epsilon = epsilon_of(oracle.model.dtype)
    windows, real = material.windows, batch.attention_mask.bool()
    rounding = Sensitivity("reference", oracle, epsilon, material, Journal(), windows)
    rounding.measure({window: range(len(window.ids)) for window in windows})
    moved = torch.ones(real.shape)
    for row, prompt in enumerate(batch.prompts):
        own = [rounding.at(prompt, position) for position in range(len(prompt.ids))]
        moved[row, -len(own) :] = torch.tensor(own)
    given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with torch.no_grad():
        before = oracle.model(**given).logits.float()
        with oracle.applied() as hooked:
            logits = hooked(**given).logits.float()
    assert oracle.last_fired is not None
    steps = float(oracle.last_fired[:, -SAID:].any(dim=0).float().mean())
    assert steps == 1 or (oracle.gated and steps > 0.5)  # which one fires at, and acts at
    assert min(oracle.fired_by_layer.values()) > 0
    effect = kl_nats(logits[real], before[real]).mean()
    assert float(effect) > 2 * TYPICAL_BAR**2 * rounding.mean_kl  # the base would not pass
    return Expected(logits, moved, rounding.mean_kl, rounding.nearby(batch), real)


@pytest.mark.parametrize("method", METHOD_TABLES)
def test_every_way_of_running(world: World, dtype: str, method: str, tmp_path: Path) -> None:
    """At once, and by `generate` with and without a cache; prompts are padded on the left."""
    recipe = world.recipe(method)
    out, card = tmp_path / "checkpoint", "# card\n"
    write_checkpoint(plan_checkpoint(recipe), out, card=card, witness_prompts=[])
    write_adapter(open_clamped(out), tmp_path / "adapter", card=card)
    stock = load_base(recipe)
    assert stock.dtype == getattr(torch, dtype)
    (batch,) = world.material.batches(world.material.windows)
    ids, mask = batch.input_ids, batch.attention_mask
    assert not mask[:, 0].all()
    expected = expected_of(Oracle(stock, load_sites(recipe)), world.material, batch)
    if dtype == "float32":
        assert 2 * int(expected.near.apart.sum()) < int(mask.sum())
    auto, eager = auto_of(stock), {"attn_implementation": "eager"}
    base = auto.from_pretrained(world.folder / "base", **eager)
    carriers = {
        "checkpoint": auto.from_pretrained(out, **eager),
        "adapter": PeftModel.from_pretrained(base, tmp_path / "adapter"),
    }
    for model in carriers.values():
        assert model.dtype == stock.dtype
        with torch.no_grad():
            expected.assert_held(model(input_ids=ids, attention_mask=mask).logits)
        for cached in (True, False):
            said = model.generate(
                input_ids=ids[:, :-SAID],
                attention_mask=mask[:, :-SAID],
                prefix_allowed_tokens_fn=lambda row, before: [int(ids[row, len(before)])],
                max_new_tokens=SAID,
                do_sample=False,
                eos_token_id=None,
                use_cache=cached,
                output_logits=True,
                return_dict_in_generate=True,
            )
            assert torch.equal(said.sequences, ids)
            expected.assert_held(torch.stack(said.logits, dim=1), slice(-SAID - 1, -1))
