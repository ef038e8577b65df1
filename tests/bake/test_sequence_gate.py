"""Method "dynamic": what a gate over the sequence so far does, in every way of running a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import bake.modeling_clamped_gemma as modeling
from bake.errors import RecipeError
from bake.modeling_clamped_gemma import SAEClamp, SoFar
from bake.recipe import Recipe
from bake.stock import decoder_layers, load_base
from bakeout.cli import run
from tests.worlds import D_IN, KINDS, save_sae_lens, tiny_base, tiny_sae
from verify.engines.forward import tree_logits
from verify.engines.runners import HookedRunner
from verify.engines.token_tree import merge
from verify.reference.oracle import Oracle
from verify.reference.whole_sae import load_sites

TAU = 0.35
LENGTHS = (17, 23, 20)
N_NEW = 12
TABLE = {"method": "dynamic", "features": [1, 2], "value": -6.0, "trigger": 4.0, "tau": TAU}


@dataclass
class World:
    """A checkpoint with two gates, its adapter, and the hooked reference."""

    folder: Path
    oracle: Oracle

    @property
    def auto(self) -> Any:
        stock = type(self.oracle.model).__name__
        images = stock.endswith("ConditionalGeneration")
        return tf.AutoModelForImageTextToText if images else tf.AutoModelForCausalLM

    def checkpoint(self, **options: Any) -> Any:
        options = {"attn_implementation": "eager", "trust_remote_code": True} | options
        return endless(self.auto.from_pretrained(self.folder / "baked", **options))

    def adapter(self) -> Any:
        from peft import PeftModel

        base = self.auto.from_pretrained(self.folder / "base", attn_implementation="eager")
        return endless(PeftModel.from_pretrained(base, self.folder / "adapter"))

    def whole(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[batch, seq, vocab]: the reference on whole sequences, nothing cached."""
        with torch.no_grad(), self.oracle.applied() as hooked:
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            found = hooked(input_ids=ids, attention_mask=mask, position_ids=positions)
        return found.logits.float()


def endless(model: Any) -> Any:
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def make(folder: Path, kind: str) -> World:
    tiny_base(folder / "base", kind)
    tables = ""
    for layer in (1, 2):
        save_sae_lens(folder / f"sae{layer}", tiny_sae(layer), layer=layer)
        tables += f'[[clamp]]\nsae = {{ path = "sae{layer}" }}\n'
        tables += "".join(f"{key} = {value!r}\n" for key, value in TABLE.items())
    recipe = folder / "recipe.toml"
    recipe.write_text(f'schema = 1\n[base]\nmodel = "base"\nlicense = "apache-2.0"\n{tables}')
    baked = str(folder / "baked")
    assert run(["bake", str(recipe), "--out", baked]) == 0
    assert run(["export", "adapter", baked, "--out", str(folder / "adapter")]) == 0
    loaded = Recipe.load(recipe)
    return World(folder, Oracle(load_base(loaded), load_sites(loaded)))


@pytest.fixture(scope="module", params=KINDS)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make(tmp_path_factory.mktemp("gated"), request.param)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make(tmp_path_factory.mktemp("gated"), "gemma3_text")


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, attention_mask): random tokens after BOS, padded on the left."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.long)
    for row, n in enumerate(LENGTHS):
        ids[row, -n:] = torch.randint(3, 90, (n,), generator=generator)
        ids[row, -n] = 2
    return ids, (ids > 0).long()


def assert_greedy(world: World, said: torch.Tensor, mask: torch.Tensor) -> None:
    """Every token that was said after the prompts is the reference's likeliest, or as likely."""
    n_new = said.shape[1] - mask.shape[1]
    assert n_new >= N_NEW // 2
    mask = torch.nn.functional.pad(mask, (0, n_new), value=1)
    logits = world.whole(said, mask)[:, -n_new - 1 : -1]
    of_said = logits.gather(-1, said[:, -n_new:, None])[..., 0]
    assert (logits.amax(-1) - of_said).max() <= 1e-3


# --------------------------------------------------------------------------- every way of running


def test_the_gate_is_open_here_and_shut_there(world: World) -> None:
    """What all other tests rest on: it acts, and not on all tokens that fire."""
    ids, mask = prompts()
    world.whole(ids, mask)
    acts = world.oracle.last_fired
    fires = torch.stack([gates.margin for gates in world.oracle.last_gates.values()]) > 0
    fires = fires.any(-1).any(0) & mask.bool() & (ids != 2)
    assert acts is not None and int(acts.sum()) >= 5
    assert int((fires & ~acts).sum()) >= 1


@pytest.mark.parametrize("carrier", ["checkpoint", "adapter"])
def test_logits_are_the_references_cached_and_not(world: World, carrier: str) -> None:
    model = getattr(world, carrier)()
    ids, mask = prompts()
    real = mask.bool()
    expected = world.whole(ids, mask)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    with torch.no_grad():
        found = model(**given, use_cache=False).logits
        assert (found - expected)[real].abs().max() <= 1e-4
        cache, parts = None, []
        for start, stop in [(0, 8), (8, 15), *((at, at + 1) for at in range(15, ids.shape[1]))]:
            part = {name: of[:, start:stop] for name, of in given.items()}
            part["attention_mask"] = mask[:, :stop]
            output = model(**part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
    assert (torch.cat(parts, 1) - expected)[real].abs().max() <= 1e-4


@pytest.mark.parametrize("carrier", ["checkpoint", "adapter"])
def test_what_is_said_is_the_uncached_references(world: World, carrier: str) -> None:
    """Left-padded in a batch, and each alone; cached, static and not."""
    model = getattr(world, carrier)()
    ids, mask = prompts()
    how = {"max_new_tokens": N_NEW, "do_sample": False}
    ways: list[dict[str, Any]] = [{}, {"use_cache": False}]
    ways += [{"cache_implementation": "static", "disable_compile": True}]
    for way in ways:
        said = model.generate(input_ids=ids, attention_mask=mask, **how, **way)
        assert_greedy(world, said, mask)
        first = ids[:1, -LENGTHS[0] :]
        said = model.generate(input_ids=first, **how, **way)
        assert_greedy(world, said, torch.ones_like(first))


def test_several_tokens_at_once(one: World) -> None:
    """Assisted decoding takes back what the cache holds, prompt lookup too."""
    model = one.checkpoint()
    ids = prompts()[0][1:2]
    repeated = torch.cat([ids, ids[:, 1:], ids[:, 1:8]], dim=1)
    how = {"max_new_tokens": N_NEW, "do_sample": False}
    for prompt, way in (
        (repeated, {"prompt_lookup_num_tokens": 3}),
        (ids, {"assistant_model": endless(one.auto.from_pretrained(one.folder / "base"))}),
        (ids, {"assistant_early_exit": 2}),
    ):
        assert_greedy(one, model.generate(prompt, **how, **way), torch.ones_like(prompt))


def test_beams_carry_what_fired_with_them(one: World) -> None:
    model = one.checkpoint()
    ids, mask = prompts()
    how = {"attention_mask": mask, "max_new_tokens": N_NEW, "num_beams": 4, "do_sample": False}
    said = [model.generate(ids, **how, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*said)
    score = {
        cached: model.generate(
            ids, **how, use_cache=cached, output_scores=True, return_dict_in_generate=True
        ).sequences_scores
        for cached in (True, False)
    }
    assert torch.allclose(score[True], score[False], atol=1e-5)


def test_compiled_over_a_static_cache(one: World) -> None:
    torch.compiler.reset()
    model = one.checkpoint(attn_implementation="sdpa")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids, mask = prompts()
    expected = one.whole(ids, mask)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = tf.StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad():
        model(
            input_ids=ids[:, :-3],
            attention_mask=mask[:, :-3],
            position_ids=positions[:, :-3],
            past_key_values=cache,
        )
        for at in range(ids.shape[1] - 3, ids.shape[1]):
            here = slice(at, at + 1)
            found = compiled(
                input_ids=ids[:, here],
                attention_mask=mask[:, : at + 1],
                position_ids=positions[:, here],
                past_key_values=cache,
            ).logits
            assert (found[:, 0] - expected[:, at]).abs().max() <= 1e-4


def test_a_tree_of_prompts_and_a_cache_without_a_config(one: World) -> None:
    """Each token counts what it sees: those before it on its own branch."""
    ids, mask = prompts()
    rows = [row[real.bool()].tolist() for row, real in zip(ids, mask, strict=True)]
    branches = [[*rows[1], *row[1:9]] for row in rows] + [rows[1][:6]]
    tree = merge(branches).tensors(D_IN)
    found = tree_logits(one.checkpoint(), tree)
    for branch, logits in zip(branches, found, strict=True):
        alone = torch.tensor([branch])
        assert (logits - one.whole(alone, torch.ones_like(alone))[0, -1]).abs().max() <= 1e-4


def test_sequences_packed_into_one_row_count_for_themselves(one: World) -> None:
    ids, mask = prompts()
    rows = [row[real.bool()] for row, real in zip(ids, mask, strict=True)]
    packed = torch.cat(rows)[None]
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    model = one.checkpoint()
    with torch.no_grad():
        found = model(input_ids=packed, position_ids=positions, use_cache=False).logits[0]
    for row, logits in zip(rows, found.split([len(row) for row in rows]), strict=True):
        expected = one.whole(row[None], torch.ones_like(row)[None])[0]
        assert (logits - expected).abs().max() <= 1e-4


def test_the_reference_goes_on_without_a_cache_and_reads_no_trees(one: World) -> None:
    runner = HookedRunner("reference", one.oracle.model, one.oracle)
    ids, mask = prompts()
    assert not runner.reads_trees
    said = runner.go_on(ids, mask, [], N_NEW)
    assert_greedy(one, torch.cat([ids, said], dim=1), mask)
    with pytest.raises(ValueError, match="needs whole sequences"), one.oracle.applied() as hooked:
        hooked(input_ids=ids[:, -1:], attention_mask=mask)


# --------------------------------------------------------------------------- the share itself


def by_hand(fired: list[int], real: list[int]) -> list[float]:
    found = []
    for at in range(len(fired)):
        seen = [fired[i] for i in range(at + 1) if real[i]]
        found.append(sum(seen) / max(1, len(seen)))
    return found


FIRED = [[1, 0, 1, 1, 0, 0, 1, 0], [0, 0, 0, 1, 0, 1, 1, 1]]
REAL = [[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8]


def masks() -> Iterator[tuple[str, Any]]:
    real = torch.tensor(REAL)
    sees = torch.ones(8, 8).tril().bool() & real[:, None].bool()
    both_ways = real[:, None].bool().expand(2, 8, 8)
    yield "two dimensions", real
    yield "what is seen", sees[:, None]
    yield "added to scores", torch.zeros(2, 1, 8, 8).masked_fill(~sees[:, None], -1e9)
    yield "by kind of layer", {"full_attention": sees[:, None], "sliding_attention": None}
    yield "images, seen both ways", both_ways[:, None]


@pytest.mark.parametrize("kind", [name for name, _ in masks()])
def test_share_is_that_of_the_loop_by_whatever_mask(kind: str) -> None:
    fired = torch.tensor(FIRED).bool()
    found = SoFar(dict(masks())[kind]).share(fired)
    for row, mask, shares in zip(FIRED, REAL, found.tolist(), strict=True):
        counted = [share for share, real in zip(shares, mask, strict=True) if real]
        expected = [s for s, real in zip(by_hand(row, mask), mask, strict=True) if real]
        assert counted == pytest.approx(expected)


def test_a_share_that_is_tau_does_not_open_the_gate() -> None:
    """As decimals say it: seven of ten are not more than 0.7, nor one of ten more than 0.1."""
    for n, tau in ((7, 0.7), (1, 0.1), (3, 0.3)):
        clamp = SAEClamp(1, 1, tau=float(torch.tensor(tau)))
        clamp.trigger.zero_()
        acts = torch.zeros(1, 10, 1)
        acts[0, :n] = 1
        assert bool(clamp.shut(acts, None, SoFar())[0, -1])
        acts[0, n] = 1
        assert not bool(clamp.shut(acts, None, SoFar())[0, -1])


def test_exempt_tokens_do_not_fire_and_are_counted() -> None:
    clamp = SAEClamp(1, 1, tau=0.4)
    clamp.trigger.zero_()
    exempt = torch.tensor([[True, False, False]])
    shut = clamp.shut(torch.ones(1, 3, 1), exempt, SoFar())
    assert shut.tolist() == [[True, False, False]]  # of two tokens one, of three two


# --------------------------------------------------------------------------- refusals


def test_a_cache_that_others_filled_is_refused(one: World) -> None:
    ids, mask = prompts()
    base = one.auto.from_pretrained(one.folder / "base")
    model = one.checkpoint()
    caches: list[Callable[[], Any]] = [
        tf.DynamicCache,
        lambda: tf.StaticCache(config=base.config, max_cache_len=40),
    ]
    for make_cache in caches:
        cache = make_cache()
        with torch.no_grad():
            base(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache)
            with pytest.raises(ValueError, match="use a cache that this model alone has filled"):
                model(input_ids=ids[:, -1:], attention_mask=mask, past_key_values=cache)


def test_a_static_cache_that_others_filled_in_between_is_refused(one: World) -> None:
    ids, mask = prompts()
    base, model = one.auto.from_pretrained(one.folder / "base"), one.checkpoint()
    cache = tf.StaticCache(config=base.config, max_cache_len=40)
    with torch.no_grad():
        for of, begin, end in ((model, 0, 9), (base, 9, 12)):
            part, seen = ids[:, begin:end], mask[:, :end]
            of(input_ids=part, attention_mask=seen, past_key_values=cache)
        with pytest.raises(ValueError, match="this model alone has filled"):
            model(input_ids=ids[:, 12:13], attention_mask=mask[:, :13], past_key_values=cache)


def test_what_cannot_carry_the_gate_is_refused(one: World) -> None:
    with pytest.raises(ValueError, match="attn_implementation sdpa or eager"):
        SoFar("a block mask").share(torch.ones(1, 2).bool())
    with pytest.raises(ValueError, match="type dict"):
        SoFar({"sliding_attention": torch.ones(1, 1, 2, 2)}).share(torch.ones(1, 2).bool())
    layer = decoder_layers(one.checkpoint())[1]
    place = {"n_layers": 4, "order": 0}
    with pytest.raises(ValueError, match="continuous batching"):
        SoFar.at(place, layer, None, cache="paged")
    layer.self_attn.config._attn_implementation = "vllm"
    with pytest.raises(ValueError, match="the attention of vLLM and others"):
        SoFar.at(place, layer, None)


def test_code_that_knows_no_gate_refuses_the_config(
    one: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older modeling file reads schema 1 only; it would clamp whatever came before."""
    monkeypatch.setattr(modeling, "SCHEMAS", (1,))
    with pytest.raises(ValueError, match="schema: got 2, expected 1"):
        modeling.ClampedGemma3TextConfig.from_pretrained(one.folder / "baked")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tau": None}, 'method "dynamic" needs `tau`'),
        ({"value": None}, 'method "dynamic" needs `value`'),
        ({"tau": 1.0}, "less than"),
        ({"tau": 0.99999999}, "less than"),
        ({"tau": -0.1}, "greater than or equal to 0"),
        ({"method": "clamp"}, 'method "clamp" does not use `tau`'),
    ],
)
def test_a_wrong_table_is_refused_by_name(change: dict[str, Any], said: str) -> None:
    table = {"sae": {"path": "sae"}, **TABLE, **change}
    table = {key: value for key, value in table.items() if value is not None}
    data = {"schema": 1, "base": {"model": "base"}, "clamp": [table]}
    with pytest.raises(RecipeError, match=said):
        Recipe.parse(data, name="recipe.toml", folder=Path())


def test_stock_layers_cannot_carry_it(one: World, capfd: pytest.CaptureFixture[str]) -> None:
    out = str(one.folder / "compiled")
    assert run(["export", "compiled", str(one.folder / "baked"), "--out", out]) == 2
    assert 'method "dynamic" asks what came before' in " ".join(capfd.readouterr().err.split())
