"""Compiled folders against the hooked reference: every method, family, number of features."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from bake.errors import BakeoutError, ExportError, FolderError, OutputError
from bake.families import FAMILIES
from bake.recipe import Recipe
from bake.rounding import LOADS, coarsen, rounded_to_integers
from bake.stock import decoder_layers, load_base
from export.carriers.compiled.compiled_files import LAYERS_SHARD
from export.carriers.compiled.compiling import plan_compiled, write_compiled
from export.code_check import auto_map_of
from export.manifest import Manifest
from tests.clamps import METHOD_FEATURES, OF_ONE_TOKEN
from tests.defects import rewrite_file
from tests.folders import COMPILED_CLASSES, compile_recipe
from tests.logits import flat_logits, tiny_prompts
from tests.worlds import (
    RecipeWriter,
    sae_table,
    save_gemma_scope,
    save_sae_lens,
    tiny_base,
    tiny_config,
    tiny_model,
    tiny_sae,
)
from verify.compare.logits import kl_nats
from verify.reference.oracle import Oracle
from verify.reference.whole_sae import load_sites


def compare(
    tmp_path: Path, write_recipe: RecipeWriter, tables: list[dict[str, Any]], **base: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of base, hooked reference, compiled folder: [tokens, vocab]; tokens fired [tokens]."""
    recipe_file = write_recipe(*tables, base=base)
    folder = compile_recipe(recipe_file, tmp_path)
    recipe = Recipe.load(recipe_file)
    stock = load_base(recipe)
    oracle = Oracle(stock, load_sites(recipe))
    model, info = tf.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert type(model).__name__ == type(stock).__name__
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = tiny_prompts()
    before = flat_logits(stock, ids)
    with oracle.applied() as hooked:
        reference = flat_logits(hooked, ids)
    assert oracle.last_fired is not None
    return before, reference, flat_logits(model, ids), oracle.last_fired.flatten()


def sae_tables(tmp_path: Path, method: str, features: list[int], n: int) -> list[dict[str, Any]]:
    save_sae_lens(tmp_path / "one", tiny_sae(), layer=1)
    save_gemma_scope(tmp_path / "layer_2", tiny_sae(1))
    names = ["one", "layer_2"][:n]
    return [{**sae_table(name), "features": features, **OF_ONE_TOKEN[method]} for name in names]


GOOGLES = {"per_layer_config": None, "global_head_dim": 16, "num_global_key_value_heads": 1}


@pytest.mark.parametrize("hook_points", [1, 2])
@pytest.mark.parametrize("method", OF_ONE_TOKEN)
@pytest.mark.parametrize("family", COMPILED_CLASSES)
def test_float32(
    tmp_path: Path, write_recipe: RecipeWriter, family: str, method: str, hook_points: int
) -> None:
    tiny_base(tmp_path / "base", family)
    tables = sae_tables(tmp_path, method, METHOD_FEATURES, hook_points)
    if family == "gemma" and "refusal" in method:
        with pytest.raises(ExportError, match="layer 1: a feature is triggered by any of 6"):
            compile_recipe(write_recipe(*tables), tmp_path)
        return
    before, reference, found, fired = compare(tmp_path, write_recipe, tables)
    assert fired.any()
    assert kl_nats(reference, before).mean() > 0.1 or method == "zero"
    assert kl_nats(reference, found).mean() <= 1e-8
    assert torch.equal(found.argmax(-1), reference.argmax(-1))


@pytest.mark.parametrize(
    ("family", "config", "runs"),
    [
        ("gemma", {"hidden_act": "gelu"}, True),  # the official releases' way to say tanh
        ("gemma", {"hidden_act": "gelu", "hidden_activation": None}, True),
        ("gemma", {"hidden_act": None, "hidden_activation": "relu"}, True),
        ("gemma", {"hidden_act": "relu", "hidden_activation": "gelu_pytorch_tanh"}, False),
        ("gemma2", {"hidden_act": "gelu"}, True),
        ("gemma2", {"hidden_activation": "gelu"}, False),
        ("gemma3_text", {"hidden_act": "gelu", "layer_types": None}, True),
        ("gemma2", {"layer_types": None, "head_dim": 8}, True),
        ("gemma4_text", GOOGLES, True),  # and not per_layer_config, as transformers writes it
    ],
)
def test_what_transformers_makes_of_the_config_decides(
    tmp_path: Path, write_recipe: RecipeWriter, family: str, config: dict[str, Any], runs: bool
) -> None:
    path = tiny_base(tmp_path / "base", family) / "config.json"
    said = json.loads(path.read_text()) | config
    path.write_text(json.dumps({key: value for key, value in said.items() if value is not None}))
    tables = sae_tables(tmp_path, "clamp", METHOD_FEATURES, 1)
    if not runs:
        with pytest.raises(ExportError, match=r"its activation is (relu|gelu); expected gelu_py"):
            compile_recipe(write_recipe(*tables), tmp_path)
        return
    before, reference, found, _ = compare(tmp_path, write_recipe, tables)
    assert kl_nats(reference, before).mean() > 0.1
    assert kl_nats(reference, found).mean() <= 1e-8


def guessed_by_counting(config: Any) -> int:
    """The number whose root divides attention scores in llama.cpp, which knows sizes by layers."""
    largest = {"gemma2": 46, "gemma3_text": 62}[config.model_type]
    if config.num_hidden_layers == largest:
        return config.hidden_size // config.num_attention_heads
    return config.head_dim


@pytest.mark.parametrize(
    ("family", "n_layers", "n_clamps", "scalar"),
    [
        ("gemma2", 4, 1, 11),  # as a 27B with another count
        ("gemma2", 46, 1, 10),  # the 27B itself, which leaves its count
        ("gemma2", 44, 1, 8),  # a smaller one that arrives at it
        ("gemma2", 42, 2, 8),  # a 9B with two clamps
        ("gemma3_text", 4, 1, 11),
        ("gemma3_text", 60, 1, 8),
        ("gemma3_text", 62, 1, 10),
        ("gemma2", 4, 1, 8),  # nothing to do
    ],
)
def test_who_guesses_the_scale_of_attention_by_counting_layers_guesses_right(
    tmp_path: Path,
    write_recipe: RecipeWriter,
    family: str,
    n_layers: int,
    n_clamps: int,
    scalar: int,
) -> None:
    data = tiny_config(family).to_dict() | {
        "num_hidden_layers": n_layers,
        "query_pre_attn_scalar": scalar,
        "layer_types": None,
    }
    torch.manual_seed(0)
    config = tf.AutoConfig.for_model(**data)
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tables = sae_tables(tmp_path, "clamp", METHOD_FEATURES, n_clamps)
    before, reference, found, fired = compare(tmp_path, write_recipe, tables)
    assert fired.any() and kl_nats(reference, before).mean() > 0.1
    assert kl_nats(reference, found).mean() <= 1e-7
    compiled = tf.AutoConfig.from_pretrained(tmp_path / "compiled")
    assert compiled.query_pre_attn_scalar == guessed_by_counting(compiled)
    assert (scalar == compiled.query_pre_attn_scalar) == (n_layers == 4 and scalar == 8)


@pytest.mark.parametrize("k", [1, 3, 17, 40])
@pytest.mark.parametrize("method", ["clamp", "refusal", "refusal and clamp", "random decoder"])
def test_any_number_of_features(
    tmp_path: Path, write_recipe: RecipeWriter, method: str, k: int
) -> None:
    tiny_base(tmp_path / "base")
    features = [f for f in range(k + 1) if f != 30][:k]
    tables = sae_tables(tmp_path, method, features, 1)
    before, reference, found, fired = compare(tmp_path, write_recipe, tables)
    assert fired.any() and kl_nats(reference, before).mean() > 1e-3
    assert kl_nats(reference, found).mean() <= 1e-8


@pytest.mark.parametrize("exempt_bos", [True, False])
def test_bos_is_exempt_by_its_id_wherever_it_stands(
    tmp_path: Path, write_recipe: RecipeWriter, exempt_bos: bool
) -> None:
    tiny_base(tmp_path / "base")
    (table,) = sae_tables(tmp_path, "clamp", list(range(40)), 1)
    before, reference, found, fired = compare(
        tmp_path, write_recipe, [table | {"exempt_bos": exempt_bos}]
    )
    bos = (tiny_prompts() == 2).flatten()
    assert bos.sum() == 5 and fired[bos].any() != exempt_bos
    assert kl_nats(reference, found).max() <= 1e-6
    assert (kl_nats(before, found)[0] <= 1e-9) == exempt_bos


BFLOAT16 = [
    ("gemma", "clamp", 1),
    ("gemma", "scale", 1),
    *(("gemma2", method, 1 + i % 2) for i, method in enumerate(OF_ONE_TOKEN)),
    *(("gemma3_text", method, 2 - i % 2) for i, method in enumerate(OF_ONE_TOKEN)),
    *(("gemma4_text", method, 1 + i % 2) for i, method in enumerate(OF_ONE_TOKEN)),
    ("gemma4_unified_text", "clamp", 2),
]


@pytest.mark.parametrize(("family", "method", "hook_points"), BFLOAT16)
def test_bfloat16_is_as_near_as_the_hook_in_bfloat16(
    tmp_path: Path, write_recipe: RecipeWriter, family: str, method: str, hook_points: int
) -> None:
    tiny_base(tmp_path / "base", family, dtype="bfloat16")
    tables = sae_tables(tmp_path, method, METHOD_FEATURES, hook_points)
    _, hooked, found, fired = compare(tmp_path, write_recipe, tables)
    recipe = Recipe.load(write_recipe(*tables, base={"dtype": "float32"}))
    oracle = Oracle(load_base(recipe), load_sites(recipe))
    with oracle.applied() as model:
        exact = flat_logits(model, tiny_prompts())
    own = kl_nats(exact, hooked).mean()
    assert fired.any()
    # Without norms after the MLP, what is written carries bfloat16's rounding of r̃² as well.
    times = 10 if family == "gemma" else 3
    assert kl_nats(exact, found).mean() <= times * own + 1e-3


@pytest.mark.parametrize(
    ("family", "method"),
    [
        *(("gemma", "clamp"), ("gemma2", "refusal and clamp"), ("gemma3_text", "clamp")),
        *(("gemma4_text", "refusal and clamp"), ("gemma4_unified_text", "clamp")),
    ],
)
def test_a_cast_to_bfloat16_keeps_the_clamp_and_coarser_ones_break(
    tmp_path: Path, write_recipe: RecipeWriter, family: str, method: str
) -> None:
    tiny_base(tmp_path / "base", family)
    tables = sae_tables(tmp_path, method, METHOD_FEATURES, 1)
    before, exact, _, _ = compare(tmp_path, write_recipe, tables)
    ids = tiny_prompts()
    recipe = Recipe.load(write_recipe(*tables, base={"dtype": "bfloat16"}))
    with Oracle(load_base(recipe), load_sites(recipe)).applied() as model:
        own = kl_nats(exact, flat_logits(model, ids)).mean()
    moved = kl_nats(before, exact).mean()
    loads = Manifest.read(tmp_path / "compiled").compiled.loads  # type: ignore[union-attr]
    assert loads == dict(
        zip(LOADS, ("same", "rounds", *["breaks loudly"] * (len(LOADS) - 2)), strict=True)
    )
    for dtype, bits in LOADS.values():
        model = tf.AutoModelForCausalLM.from_pretrained(
            tmp_path / "compiled", dtype=getattr(torch, dtype)
        )
        if bits is not None:
            coarsen(decoder_layers(model), partial(rounded_to_integers, bits=bits))
        found = flat_logits(model, ids)
        if dtype == "bfloat16":
            times = 10 if family == "gemma" else 3
            assert kl_nats(exact, found).mean() <= times * own + 1e-3 < 0.1 * moved
        elif dtype == "float16" or bits is not None:
            # Exempt tokens, whose stream holds no constants, may stay as they are.
            far = min(kl_nats(of, found).mean() for of in (exact, before))
            assert not far <= 1


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_another_scale_of_attention_is_one_more_rounding_in_bfloat16(
    tmp_path: Path, write_recipe: RecipeWriter, family: str
) -> None:
    torch.manual_seed(0)
    config = tf.AutoConfig.for_model(**tiny_config(family).to_dict() | {"query_pre_attn_scalar": 9})
    model = tf.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    tables = sae_tables(tmp_path, "clamp", METHOD_FEATURES, 1)
    _, hooked, found, fired = compare(tmp_path, write_recipe, tables)
    recipe = Recipe.load(write_recipe(*tables, base={"dtype": "float32"}))
    oracle = Oracle(load_base(recipe), load_sites(recipe))
    with oracle.applied() as exactly:
        exact = flat_logits(exactly, tiny_prompts())
    assert fired.any()
    own = kl_nats(exact, hooked).mean()
    assert kl_nats(exact, found).mean() <= 3 * own + 1e-3


# --------------------------------------------------------------------------- Gemma 4


def of_scalars(folder: Path, scalars: list[float], n: int = 3) -> Path:
    """A base of n layers, each third of which sees all; they multiply by these numbers in turn."""
    full = range(2, n, 3)
    kinds = ["full_attention" if i in full else "sliding_attention" for i in range(n)]
    own = {str(i): {"head_dim": 16, "num_key_value_heads": 1} for i in full}
    config = tf.AutoConfig.for_model(
        **tiny_config("gemma4_text").to_dict()
        | {"num_hidden_layers": n, "layer_types": kinds, "per_layer_config": own}
    )
    model = tiny_model("gemma4_text", config)
    for layer, scalar in zip(decoder_layers(model), itertools.cycle(scalars), strict=False):
        layer.layer_scalar.fill_(scalar)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("scalars", "layers"),
    [
        ([0.3, 0.07, 0.9], (4, 8)),  # 1e-7 at the second clamp, behind the last layer
        ([3.0, 1.3], (2, 5)),
        ([0.01, 1.0, 1.0], (0, 1)),  # the stream is smaller than its flags
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_whatever_a_layer_multiplies_by_constants_arrive_as_they_were_reckoned(
    tmp_path: Path,
    write_recipe: RecipeWriter,
    scalars: list[float],
    layers: tuple[int, int],
    dtype: str,
) -> None:
    of_scalars(tmp_path / "base", scalars, n=9)
    tables = []
    for layer in layers:
        save_sae_lens(tmp_path / str(layer), tiny_sae(layer), layer=layer)
        features = {"features": list(range(12)), **OF_ONE_TOKEN["clamp"]}
        tables.append({"sae": {"path": str(layer)}, **features})
    recipe = write_recipe(*tables, base={"dtype": dtype})
    if dtype == "float32":
        before, reference, found, fired = compare(tmp_path, write_recipe, tables)
        assert fired.any() and kl_nats(reference, before).mean() > 1e-3
        assert kl_nats(reference, found).mean() <= 1e-8
        assert torch.equal(found.argmax(-1), reference.argmax(-1))
    else:
        compile_recipe(recipe, tmp_path)
    plan = plan_compiled(tmp_path / "checkpoint")
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "compiled").eval()
    assert model.dtype == getattr(torch, dtype)
    with torch.no_grad():
        streams = model(input_ids=tiny_prompts(), output_hidden_states=True).hidden_states
    channels = torch.tensor([*plan.widening.always, *plan.widening.exempting])
    for layer, numbers in zip(layers, plan.layout.sites, strict=True):
        seen = streams[numbers[0]][0, 1:, channels].double()  # what the first new layer is given
        assert seen.unique().tolist() == [plan.widening.held(layer, dtype)]
    config = json.loads((tmp_path / "compiled" / "config.json").read_text())
    kinds, n = config["layer_types"], config["num_hidden_layers"]
    full = [str(i) for i, kind in enumerate(kinds) if kind == "full_attention"]
    assert n == 13 == len(kinds) and kinds[-1] == "full_attention"
    assert list(config["per_layer_config"]) == full


@pytest.mark.parametrize(
    ("scalars", "match"),
    [
        ([1.0, 0.0], "layer_scalar of layer 1 is 0.0; expected a positive number"),
        ([-0.5], "layer_scalar of layer 0 is -0.5; expected a positive number"),
        ([math.inf], "layer_scalar of layer 0 is inf; expected a positive number"),
        ([1e30, 1e30], "layer_scalar of the layers up to 0 multiply by 1.0e\\+30 in all"),
        ([1e-15], "layer 1: the layer_scalar of the layers up to it leave"),
    ],
)
def test_a_gemma_4_that_lets_no_constant_through_is_refused(
    tmp_path: Path, write_recipe: RecipeWriter, scalars: list[float], match: str
) -> None:
    of_scalars(tmp_path / "base", scalars)
    refused(tmp_path, write_recipe, match)


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        (
            "gemma4_text, per-layer embeddings",
            r"has per-layer embeddings \(.*_input 16\); expected",
        ),
        (
            "gemma4_text, shared keys",
            r"has layers that borrow keys and values \(.*_layers 2\); exp",
        ),
        ("gemma4_text, experts", r"has a mixture of experts \(enable_moe_block True\); expected"),
        ("gemma4", "takes images; only text models are compiled"),
    ],
)
def test_a_gemma_4_that_is_not_dense_is_refused_by_name(
    tmp_path: Path, write_recipe: RecipeWriter, kind: str, match: str
) -> None:
    tiny_base(tmp_path / "base", kind)
    refused(tmp_path, write_recipe, match)


def refused(tmp_path: Path, write_recipe: RecipeWriter, match: str) -> None:
    tables = sae_tables(tmp_path, "clamp", METHOD_FEATURES, 1)
    with pytest.raises(ExportError, match=match) as caught:
        compile_recipe(write_recipe(*tables), tmp_path)
    assert "\n" not in str(caught.value) and "clamped checkpoint" in str(caught.value)


# --------------------------------------------------------------------------- the folder


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base/`, `sae/`, `recipe.toml`, the baked `checkpoint/` and the `compiled/` folder."""
    folder = tmp_path_factory.mktemp("work")
    tiny_base(folder / "base", shards=3)
    save_sae_lens(folder / "sae", tiny_sae())
    (folder / "recipe.toml").write_text(
        'schema = 1\n[base]\nmodel = "base"\nlicense = "gemma"\n[[clamp]]\n'
        'sae = { path = "sae" }\nmethod = "clamp"\nfeatures = [1, 5]\nvalue = -6.0\n'
    )
    compile_recipe(folder / "recipe.toml", folder)
    return folder


def test_the_folder_is_a_stock_one_and_whole(work: Path) -> None:
    folder = work / "compiled"
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("gemma2", ["Gemma2ForCausalLM"])
    assert "auto_map" not in config and "sae_clamp" not in config
    assert config["num_hidden_layers"] == 6 == len(config["layer_types"])
    assert config["layer_types"] == ["sliding_attention", "full_attention"] * 3
    assert config["hidden_activation"] == "gelu_pytorch_tanh"
    assert not list(folder.glob("*.py"))
    assert (folder / "NOTICE").is_file()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["carrier"], manifest["exact"]) == ("compiled", False)
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {*manifest["files"], "manifest.json"}
    for name, digest in manifest["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, name
    (site,) = manifest["compiled"]["sites"]
    assert site["layers"] == [2, 3] and site["flags"] == 2
    assert 0 < site["distance"]["largest_share_of_bound"] <= 1
    assert str(work) not in (folder / "manifest.json").read_text()


def test_the_base_is_in_it_with_zeros_beside(work: Path) -> None:
    base: dict[str, torch.Tensor] = {}
    for path in (work / "base").glob("*.safetensors"):
        base |= load_file(path)
    wide: dict[str, torch.Tensor] = {}
    for path in (work / "compiled").glob("*.safetensors"):
        wide |= load_file(path)
    new = load_file(work / "compiled" / LAYERS_SHARD)
    assert {name.split(".")[2] for name in new} == {"2", "3"}
    for name, tensor in base.items():
        number = name.split(".")[2]
        moved = name.replace(".2.", ".4.") if number == "2" else name
        moved = name.replace(".3.", ".5.") if number == "3" else moved
        grown = wide[moved]
        inside = grown[tuple(slice(n) for n in tensor.shape)]
        if "norm" not in name:
            assert torch.equal(inside, tensor), name
        if "norm" not in name and "embed" not in name:
            assert grown.count_nonzero() == tensor.count_nonzero(), name
    assert len(wide) == len(base) + len(new)


def test_the_same_input_gives_the_same_bytes(work: Path, tmp_path: Path) -> None:
    plan = plan_compiled(work / "checkpoint")
    again = write_compiled(plan, tmp_path / "again", card="# card\n")
    for path in again.iterdir():
        assert path.read_bytes() == (work / "compiled" / path.name).read_bytes(), path.name
    assert plan.size <= sum(path.stat().st_size for path in again.iterdir()) <= plan.size + 50_000


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_dtype_can_be_asked_for(work: Path, tmp_path: Path, dtype: str) -> None:
    plan = plan_compiled(work / "checkpoint", dtype=dtype, pad=32)
    folder = write_compiled(plan, tmp_path / "out", card="")
    model = tf.AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == getattr(torch, dtype)
    assert model.config.hidden_size == 32 + 32


def changed(work: Path, folder: Path, **config: Any) -> Path:
    """A copy of the checkpoint with something else in its config."""
    import shutil

    shutil.copytree(work / "checkpoint", folder)
    data = json.loads((folder / "config.json").read_text())
    rewrite_file(folder, "config.json", json.dumps(data | config).encode())
    return folder


def test_bad_input_is_refused_in_one_line(work: Path, tmp_path: Path) -> None:
    checkpoint = work / "checkpoint"
    cases: list[tuple[Path, dict[str, Any], type[BakeoutError], str]] = [
        (
            checkpoint,
            {"pad": 4},
            ExportError,
            "--pad 4: holds 4 channels, .* need 9; pass --pad 16",
        ),
        (checkpoint, {"pad": 9}, ExportError, "41, which 4 attention heads do not divide"),
        (checkpoint, {"dtype": "float16"}, ExportError, "float16 ends at 65504.*bfloat16"),
        (checkpoint, {"dtype": "int8"}, ExportError, "--dtype int8: expected float32 or bfloat16"),
        (work / "compiled", {}, FolderError, "is an export already .carrier compiled."),
        (work / "base", {}, FolderError, r"has no manifest.json"),
        (work / "nowhere", {}, FolderError, "is no folder"),
    ]
    gelu = changed(work, tmp_path / "gelu", hidden_activation="gelu")
    cases.append((gelu, {}, ExportError, "activation is gelu; expected gelu_pytorch_tanh"))
    gemma3 = {"model_type": "clamped_gemma3", "auto_map": auto_map_of(FAMILIES["gemma3"])}
    images = changed(work, tmp_path / "images", **gemma3)
    cases.append((images, {}, ExportError, "takes images"))
    for folder, options, kind, match in cases:
        with pytest.raises(kind, match=match) as caught:
            plan_compiled(folder, **options)
        assert "\n" not in str(caught.value)


def test_output_is_never_in_place_of_something(work: Path) -> None:
    plan = plan_compiled(work / "checkpoint")
    for out in (work / "checkpoint", work / "checkpoint" / "sub", work / "compiled"):
        with pytest.raises(OutputError):
            write_compiled(plan, out, card="")


def test_a_layer_that_misses_its_bound_is_not_written(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from export.carriers.compiled import compiling

    whole = compiling.action_layer

    def without_a_term(site: Any, logic: Any, *more: Any) -> Any:
        from dataclasses import replace

        return whole(site, replace(logic, terms=logic.terms[1:]), *more)

    monkeypatch.setattr(compiling, "action_layer", without_a_term)
    with pytest.raises(ExportError, match="layer 1: two stock layers miss the clamp by"):
        plan_compiled(work / "checkpoint")
