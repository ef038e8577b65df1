"""The shipped layer and model classes, against plain loops and stock transformers."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from huggingface_hub.errors import StrictDataclassFieldValidationError
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import bake.modeling_clamped_gemma as clamped
from bake.clamp import load_clamps
from bake.families import FAMILIES as KNOWN
from bake.recipe import Recipe
from bakeout.verbs.baking import bake_recipe
from tests.insertion import insert
from tests.worlds import D_IN, KINDS, save_sae_lens, tiny_base, tiny_sae

FIRES = {"sae": {"path": "sae"}, "method": "clamp", "features": [1, 5, 9, 20], "value": -6.0}


@pytest.fixture(scope="module", params=KINDS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A baked checkpoint of every family, with two sites."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_base(folder / "base", request.param, shards=2)
    save_sae_lens(folder / "sae", tiny_sae(), layer=1)
    save_sae_lens(folder / "sae2", tiny_sae(1), layer=2)
    tables = "".join(
        f'[[clamp]]\nsae = {{ path = "{name}" }}\nmethod = "clamp"\n'
        "features = [1, 5, 9]\nvalue = -6.0\n"
        for name in ("sae", "sae2")
    )
    (folder / "recipe.toml").write_text(
        f'schema = 1\n[base]\nmodel = "base"\nlicense = "apache-2.0"\n{tables}'
    )
    bake_recipe(folder / "recipe.toml", folder / "out", force=False)
    return folder / "out"


def load(folder: Path, **kwargs: Any) -> Any:
    config = json.loads((folder / "config.json").read_text())
    auto = (
        tf.AutoModelForImageTextToText
        if config["architectures"][0].endswith("ConditionalGeneration")
        else tf.AutoModelForCausalLM
    )
    return auto.from_pretrained(folder, trust_remote_code=True, **kwargs)


def prompts(batch: int = 2, seq: int = 20) -> torch.Tensor:
    ids = torch.randint(3, 90, (batch, seq), generator=torch.Generator().manual_seed(5))
    ids[:, 0] = 2
    return ids


def loop_clamp(clamp: clamped.SAEClamp, h: np.ndarray) -> np.ndarray:
    """The equation for one position in float64, feature by feature."""
    t = {name: buffer.double().numpy() for name, buffer in clamp.named_buffers()}
    k = len(t["b_enc"])
    pre = [float(h @ t["W_enc"][:, i] + t["b_enc"][i]) for i in range(k)]
    a = [max(p, 0.0) if p > t["theta"][i] else 0.0 for i, p in enumerate(pre)]
    out = h.copy()
    for j in range(k):
        if any(t["route"][j, i] and a[i] > t["trigger"][i] for i in range(k)):
            new = t["value"][j] + t["scale"][j] * a[j]
            out += (new - a[j]) * t["W_dec"][j]
    return out


def random_clamp(k: int = 6, seed: int = 0) -> clamped.SAEClamp:
    generator = torch.Generator().manual_seed(seed)
    clamp = clamped.SAEClamp(D_IN, k)
    random = {
        name: torch.randn(buffer.shape, generator=generator)
        for name, buffer in clamp.named_buffers()
    }
    random["route"] = torch.rand(k, k, generator=generator) > 0.6
    random["trigger"] = random["trigger"].abs() * 0.5
    clamp.load_state_dict(random)
    return clamp


def test_clamp_equals_the_equation_feature_by_feature() -> None:
    clamp = random_clamp()
    h = torch.randn(2, 7, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    expected = np.stack([[loop_clamp(clamp, position) for position in row] for row in h.numpy()])
    got = clamp(h.float()).double().numpy()
    assert np.abs(expected - h.numpy()).max() > 1
    assert np.abs(got - expected).max() < 1e-4


def test_setting_a_feature_to_what_it_is_changes_nothing() -> None:
    clamp = random_clamp()
    clamp.value.zero_()
    clamp.scale.fill_(1.0)
    h = torch.randn(3, 5, D_IN)
    assert torch.equal(clamp(h), h)


def test_without_an_active_feature_the_residual_is_untouched_bit_for_bit() -> None:
    clamp = random_clamp()
    clamp.theta.fill_(1e6)
    h = torch.randn(3, 5, D_IN).bfloat16()
    assert torch.equal(clamp(h), h)


def test_exempt_positions_are_untouched_even_where_the_stream_is_infinite() -> None:
    clamp = random_clamp()
    h = torch.randn(1, 4, D_IN)
    h[0, 0] = float("inf")
    exempt = torch.tensor([[True, False, True, False]])
    out = clamp(h, exempt)
    assert torch.equal(out[exempt], h[exempt])
    assert not torch.equal(out[~exempt], h[~exempt])


class Kernels(TorchDispatchMode):
    """Counts what is run; views and numbers are not."""

    NONE = ("view", "t", "unsqueeze", "slice", "detach", "scalar_tensor")

    def __init__(self) -> None:
        super().__init__()
        self.run: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op.overloadpacket.__name__
        self.run += [] if name in self.NONE else [name]
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_that_gate_themselves_take_ten_kernels_and_say_the_same(
    dtype: torch.dtype,
) -> None:
    clamp = random_clamp()
    clamp.route.copy_(torch.eye(6))
    clamp.theta.mul_(3)
    h = torch.randn(3, 7, D_IN, generator=torch.Generator().manual_seed(3)).to(dtype)
    exempt = torch.zeros(3, 7, dtype=torch.bool)
    exempt[:, 0] = True
    expected = clamp(h, exempt)
    clamp.settle()
    assert clamp.each_alone
    with Kernels() as kernels:
        found = clamp(h, exempt)
    assert len(kernels.run) <= 10, kernels.run
    off = (found - expected).abs().float()
    assert (off <= torch.finfo(dtype).eps * expected.abs().float() + 1e-5).all()
    untouched = (expected == h).all(-1)
    assert untouched.any() and not untouched.all()
    assert torch.equal(found[untouched], h[untouched])
    clamp.route[0, 1] = True
    clamp.settle()
    assert not clamp.each_alone


@pytest.mark.parametrize("alone", [True, False])
def test_autocast_leaves_a_clamp_in_float32(alone: bool) -> None:
    clamp = random_clamp()
    clamp.route.copy_(torch.eye(6))
    clamp.theta.mul_(3)
    clamp.each_alone = alone
    h = torch.randn(3, 7, D_IN, generator=torch.Generator().manual_seed(3)) * 40
    expected = clamp(h)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(clamp(h), expected)


def test_a_clamp_that_was_never_loaded_answers_nan() -> None:
    assert clamped.SAEClamp(D_IN, 3)(torch.randn(1, 2, D_IN)).isnan().all()


def test_clamp_stays_float32_when_the_model_is_cast() -> None:
    clamp = random_clamp()
    before = {name: buffer.clone() for name, buffer in clamp.named_buffers()}
    clamp.to(torch.bfloat16).half()
    for name, buffer in clamp.named_buffers():
        assert torch.equal(buffer, before[name]) and buffer.dtype == before[name].dtype


def test_loads_clamped_and_differs_from_the_base(checkpoint: Path) -> None:
    model = load(checkpoint)
    base = getattr(tf, KNOWN[model.config.model_type.removeprefix("clamped_")].architecture)
    stock = base.from_pretrained(checkpoint.parent / "base")
    ids = prompts()
    difference = (model(input_ids=ids).logits - stock(input_ids=ids).logits).abs()
    assert difference.max() > 0.1
    assert difference[:, 0].max() == 0  # BOS alone: exempt
    hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
    assert len(hidden) == len(stock(input_ids=ids, output_hidden_states=True).hidden_states)


def test_generate_with_cache_without_and_left_padded_gives_the_same_tokens(
    checkpoint: Path,
) -> None:
    model = load(checkpoint)
    ids = prompts(1, 17)
    cached = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    plain = model.generate(
        ids, max_new_tokens=12, do_sample=False, use_cache=False, eos_token_id=None
    )
    padded = torch.cat([torch.zeros(1, 6, dtype=torch.long), ids], dim=1)
    batch = torch.cat([padded, prompts(1, 23)])
    mask = torch.ones_like(batch)
    mask[0, :6] = 0
    left = model.generate(
        batch, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    assert torch.equal(cached, plain)
    assert torch.equal(left[0, 6:], cached[0])


def test_embeddings_alone_exempt_the_first_real_position(checkpoint: Path) -> None:
    model = load(checkpoint)
    ids = torch.cat([torch.zeros(2, 3, dtype=torch.long), prompts(2, 12)], dim=1)
    mask = torch.ones_like(ids)
    mask[:, :3] = 0
    by_id = model(input_ids=ids, attention_mask=mask).logits
    embeddings = model.get_input_embeddings()(ids)
    by_mask = model(inputs_embeds=embeddings, attention_mask=mask).logits
    assert torch.equal(by_id[:, 3:], by_mask[:, 3:])


def test_compiles_without_graph_breaks(checkpoint: Path) -> None:
    model = load(checkpoint)
    ids = prompts()
    torch.compiler.reset()  # what was compiled of other models is counted
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_clamp_is_float32_whatever_the_load_dtype(checkpoint: Path, dtype: str) -> None:
    model = load(checkpoint, dtype=getattr(torch, dtype))
    assert next(model.parameters()).dtype == getattr(torch, dtype)
    shard = load_file(checkpoint / "model-sae-clamp.safetensors")
    by_ending = {key.split("layers.")[-1]: tensor for key, tensor in shard.items()}
    found = [(n, b) for n, b in model.named_buffers() if ".sae_clamp." in n]
    assert len(found) == 16
    for name, buffer in found:
        assert torch.equal(buffer, by_ending[name.split("layers.")[-1]])
        assert buffer.dtype == by_ending[name.split("layers.")[-1]].dtype


def test_saved_again_it_loads_the_same_and_still_fails_closed(
    checkpoint: Path, tmp_path: Path
) -> None:
    model = load(checkpoint)
    model.save_pretrained(tmp_path / "again")
    ids = prompts()
    again = load(tmp_path / "again")
    assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)
    refuses_stock_classes(tmp_path / "again", model.config.model_type)


REFUSALS = (KeyError, ValueError, AttributeError, RuntimeError, StrictDataclassFieldValidationError)


def refuses_stock_classes(folder: Path, model_type: str) -> None:
    own = KNOWN[model_type.removeprefix("clamped_")]
    stock = {family.architecture for family in KNOWN.values() if not family.images}
    for name in sorted(stock | {own.architecture}):
        with pytest.raises(REFUSALS) as refused:
            getattr(tf, name).from_pretrained(folder)
        if name == own.architecture:
            assert isinstance(refused.value, KeyError) and clamped.GUARD in str(refused.value)


def test_no_stock_class_loads_it(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    refuses_stock_classes(checkpoint, config["model_type"])


def test_device_map_places_the_clamp(checkpoint: Path) -> None:
    model = load(checkpoint, device_map="cpu")
    ids = prompts()
    assert torch.equal(model(input_ids=ids).logits, load(checkpoint)(input_ids=ids).logits)


def damaged(checkpoint: Path, folder: Path, change: Any) -> Path:
    """A copy of a checkpoint whose clamp shard went through `change`."""
    import shutil

    shutil.copytree(checkpoint, folder)
    shard = folder / "model-sae-clamp.safetensors"
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"] = {
        key: file
        for key, file in data["weight_map"].items()
        if "sae_clamp" not in key or key in tensors
    } | dict.fromkeys(tensors, shard.name)
    index.write_text(json.dumps(data))
    return folder


@pytest.mark.parametrize("tensor", [name for name, *_ in clamped.SAEClamp.SHAPES])
def test_a_missing_clamp_tensor_raises_and_is_named(
    checkpoint: Path, tmp_path: Path, tensor: str
) -> None:
    key = next(k for k in load_file(checkpoint / "model-sae-clamp.safetensors") if tensor in k)
    folder = damaged(checkpoint, tmp_path / "broken", lambda tensors: tensors.pop(key))
    with pytest.raises(ValueError, match=rf"sae_clamp\.{tensor} is missing"):
        load(folder)


def test_a_reshaped_nan_or_surplus_clamp_tensor_raises_and_is_named(
    checkpoint: Path, tmp_path: Path
) -> None:
    keys = list(load_file(checkpoint / "model-sae-clamp.safetensors"))
    value = next(key for key in keys if key.endswith("value"))

    def reshape(tensors: dict[str, torch.Tensor]) -> None:
        tensors[value] = torch.zeros(7)

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[value][1] = float("nan")

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors[value.replace("layers.1", "layers.3").replace("layers.2", "layers.3")] = (
            torch.zeros(3)
        )

    with pytest.raises(ValueError, match=r"sae_clamp\.value .*shape"):
        load(damaged(checkpoint, tmp_path / "reshaped", reshape))
    with pytest.raises(ValueError, match=r"sae_clamp\.value .*shape"):
        load(damaged(checkpoint, tmp_path / "ignored", reshape), ignore_mismatched_sizes=True)
    with pytest.raises(ValueError, match=r"sae_clamp\.value is not finite"):
        load(damaged(checkpoint, tmp_path / "nan", spoil))
    with pytest.raises(ValueError, match=r"layers\.3\.sae_clamp\.value is in the checkpoint"):
        load(damaged(checkpoint, tmp_path / "surplus", add))


def test_a_config_without_its_clamp_raises(checkpoint: Path, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(checkpoint, tmp_path / "stripped")
    config = json.loads((folder / "config.json").read_text())
    sites = config["sae_clamp"]["sites"]
    for broken, match in (
        ({**config, "sae_clamp": None}, "sae_clamp: missing"),
        ({**config, "sae_clamp": {**config["sae_clamp"], "schema": 3}}, "schema"),
        ({**config, "sae_clamp": {**config["sae_clamp"], "sites": sites[:1]}}, "places no clamp"),
    ):
        (folder / "config.json").write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=match):
            load(folder)


@pytest.mark.parametrize("family", ["gemma3", "gemma4", "gemma4_unified"])
def test_images_go_through_untouched(tmp_path: Path, family: str) -> None:
    tiny_base(tmp_path / "base", family)
    save_sae_lens(tmp_path / "sae", tiny_sae(), layer=1)
    (tmp_path / "recipe.toml").write_text(
        'schema = 1\n[base]\nmodel = "base"\nlicense = "apache-2.0"\n[[clamp]]\n'
        'sae = { path = "sae" }\nmethod = "zero"\nfeatures = [1, 2]\ntrigger = 1000000.0\n'
    )
    bake_recipe(tmp_path / "recipe.toml", tmp_path / "out", force=False)
    ids = prompts(1, 12)
    ids[0, 3:7] = 98
    types = (ids == 98).long()
    image = torch.randn(1, 3, 28, 28)
    inputs = {"input_ids": ids, "pixel_values": image, "token_type_ids": types}
    if family != "gemma3":
        side = 4 if family == "gemma4" else 2  # in patches of 2 by 2; gemma4 pools 2 by 2 of them
        image = torch.rand(1, side * side, 12)
        places = torch.tensor([[[x, y] for y in range(side) for x in range(side)]])
        inputs = {"input_ids": ids, "mm_token_type_ids": types, "image_position_ids": places}
        inputs["pixel_values"] = image
    base = getattr(tf, KNOWN[family].architecture).from_pretrained(tmp_path / "base")
    model = load(tmp_path / "out")
    assert torch.equal(model(**inputs).logits, base(**inputs).logits)
    assert not torch.equal(
        model(**{**inputs, "pixel_values": image.square() + 1}).logits, model(**inputs).logits
    )


@pytest.mark.parametrize("family", KINDS)
def test_insert_equals_the_checkpoint_and_leaves_the_base_alone(
    family: str, tmp_path: Path
) -> None:
    tiny_base(tmp_path / "base", family)
    save_sae_lens(tmp_path / "sae", tiny_sae(), layer=1)
    (tmp_path / "recipe.toml").write_text(
        'schema = 1\n[base]\nmodel = "base"\nlicense = "apache-2.0"\n[[clamp]]\n'
        'sae = { path = "sae" }\nmethod = "clamp"\nfeatures = [1, 5]\nvalue = -6.0\n'
    )
    plan = bake_recipe(tmp_path / "recipe.toml", tmp_path / "out", force=False)
    eager = {"attn_implementation": "eager"}  # Gemma 4's sound knows no other
    base = getattr(tf, plan.base.family.architecture).from_pretrained(tmp_path / "base", **eager)
    ids = prompts()
    before = base(input_ids=ids).logits
    recipe = Recipe.load(tmp_path / "recipe.toml")
    model = insert(base, load_clamps(recipe, plan.base))
    expected = load(tmp_path / "out", **eager)(input_ids=ids).logits
    assert (model(input_ids=ids).logits - expected).abs().max() < 1e-5
    assert torch.equal(base(input_ids=ids).logits, before)
    embeddings = (model.get_input_embeddings().weight, base.get_input_embeddings().weight)
    assert embeddings[0].data_ptr() == embeddings[1].data_ptr()


def test_shipped_file_needs_torch_and_transformers_only() -> None:
    import ast

    tree = ast.parse(Path(inspect.getfile(clamped)).read_text())
    roots = {
        (node.module if isinstance(node, ast.ImportFrom) else alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert roots <= {"__future__", "typing", "torch", "transformers"}
