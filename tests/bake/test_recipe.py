"""The recipe: what is accepted, and what each error says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from bake.errors import RecipeError
from bake.recipe import Recipe
from bake.sae.layouts import LAYOUTS, find_sae, resolve_layer
from bake.sources import SAESource, layer_of
from tests.worlds import save_gemma_scope, save_gemma_scope_2, save_sae_lens, tiny_sae

GEMMA_4 = "decoderesearch/gemma-4-saes"
RECIPES = Path(__file__).parents[2] / "bake" / "recipes"

GOOD = """
schema = 1
[base]
model = "model"
[[clamp]]
sae = { path = "sae" }
hook_point = "blocks.3.hook_resid_post"
method = "clamp"
features = [1, 2]
value = -30
"""
REFUSAL = 'method = "refusal"\nrefusal_feature = 9'


def load(tmp_path: Path, text: str) -> Recipe:
    (tmp_path / "recipe.toml").write_text(text)
    return Recipe.load(tmp_path / "recipe.toml")


def test_good_recipe_and_its_way_back_through_toml(tmp_path: Path) -> None:
    recipe = load(tmp_path, GOOD)
    assert recipe.clamp[0].value == -30.0
    assert recipe.clamp[0].exempt_bos and recipe.clamp[0].trigger == 0.0
    assert recipe.base.license == "gemma" and recipe.base.dtype == "auto"
    again = load(tmp_path, recipe.to_toml())
    assert again.to_dict() == recipe.to_dict()


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("value = -30", "valeu = -30", r"clamp\[0\]\.valeu: unknown key; did you mean `value`"),
        ("schema = 1", "schema = 2", r"schema: got 2, expected 1"),
        (
            "features = [",
            "featurse = [",
            r"clamp\[0\]\.featurse: unknown key; did you mean `features`",
        ),
        ("schema = 1", "", r"schema: missing"),
        ("value = -30", "", r'method "clamp" needs `value`'),
        ("value = -30", "value = inf", r"clamp\[0\]\.value: got inf, expected a finite number"),
        ("value = -30", "value = nan", r"clamp\[0\]\.value: got nan"),
        ("value = -30", "value = -3.5e38", r"value: got -3\.5e\+38, which is beyond float32"),
        ("value = -30", "value = -30\ntrigger = 1e39", r"trigger: got 1e\+39, which is beyond"),
        ('"clamp"', '"scale"\nmultiplier = -1e39', r"multiplier: got -1e\+39, which is beyond"),
        ("[1, 2]", str(list(range(9000))), r"lists 9,000 features; expected at most 8,192"),
        ("schema = 1", "schema = true", r"schema: got 'True', expected 1"),
        ('model = "model"', f'model = "{"m" * 300}"', r"longer than the name of a file can be"),
        ("value = -30", 'value = "-30"', r"clamp\[0\]\.value: got '-30', expected a valid number"),
        ("value = -30", "value = -30\ntrigger = -0.1", r"trigger: got -0\.1, expected greater"),
        ("value = -30", "value = -30\nmultiplier = 2", r'"clamp" does not use `multiplier`'),
        ("value = -30", "value = -30\nalso_clamp = false", r"does not use `also_clamp`"),
        ('"clamp"', '"clmap"', r"clamp\[0\]\.method: got 'clmap', expected 'clamp'"),
        ('"clamp"', '"zero"', r'"zero" does not use `value`'),
        ('"clamp"', '"scale"', r'"scale" needs `multiplier`'),
        ("value = -30", "", r"needs `value`"),
        ("[1, 2]", "[1, 1]", r"feature 1 is listed twice"),
        ("[1, 2]", "[]", r"at least one feature"),
        ("[1, 2]", "[-1]", r"feature -1 is negative"),
        ("[1, 2]", "[1.5]", r"list of at least one feature number"),
        ("[1, 2]", "[true]", r"list of at least one feature number"),
        ("[1, 2]", '"select"', r"needs a \[select\] table"),
        ('method = "clamp"', REFUSAL + "\nclamp_value = -1", r"only with also_clamp"),
        ('method = "clamp"', REFUSAL.replace("9", "2"), r"refusal_feature 2 is also among"),
        ('method = "clamp"', 'method = "refusal"', r"needs `refusal_feature`"),
        ("hook_resid_post", "hook_mlp_out", r'"blocks\.3\.hook_mlp_out" is not supported'),
        ("blocks.3.hook_resid_post", "blocks.0.hook_resid_pre", r"is the embedding"),
        ('{ path = "sae" }', '{ path = "a", release = "b", id = "c" }', r"expected either `path`"),
        ('{ path = "sae" }', '{ release = "b" }', r"expected either `path`"),
        ('{ path = "sae" }', "{ }", r"expected either `path`"),
        ('model = "model"', 'model = "model"\ndtype = "int8"', r"base\.dtype: got 'int8'"),
        ('model = "model"', "", r"base\.model: missing"),
        ('model = "model"', 'model = ""', r"base\.model: got ''"),
        ("[base]", "[[base]]", r"base: got \["),
    ],
)
def test_errors_name_key_got_and_expected(tmp_path: Path, old: str, new: str, match: str) -> None:
    assert old in GOOD
    with pytest.raises(RecipeError, match=match) as caught:
        load(tmp_path, GOOD.replace(old, new))
    assert "\n" not in str(caught.value)


def test_as_many_features_as_there_may_be_are_taken(tmp_path: Path) -> None:
    features = list(range(8192))
    recipe = load(tmp_path, GOOD.replace("[1, 2]", str(features)))
    assert recipe.clamp[0].features == features
    assert load(tmp_path, GOOD.replace("-30", "3.4028234663852886e38")).clamp[0].value > 3e38


def test_scale_by_zero_is_refused(tmp_path: Path) -> None:
    text = GOOD.replace('"clamp"', '"scale"').replace("value = -30", "multiplier = 0")
    with pytest.raises(RecipeError, match="leaves every activation as it is"):
        load(tmp_path, text)


def test_two_tables_at_one_hook_point_also_by_another_name(tmp_path: Path) -> None:
    table = GOOD[GOOD.index("[[clamp]]") :]
    other = table.replace("blocks.3.hook_resid_post", "blocks.4.hook_resid_pre")
    with pytest.raises(RecipeError, match=r"two .* at the output of layer 3"):
        load(tmp_path, GOOD + other)


def test_no_toml_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is no TOML"):
        load(tmp_path, "schema = = 1")
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe.load(tmp_path / "absent.toml")


@pytest.mark.parametrize(
    ("hook_point", "layer"), [("blocks.0.hook_resid_post", 0), ("blocks.7.hook_resid_pre", 6)]
)
def test_layer_of_a_hook_point(hook_point: str, layer: int) -> None:
    assert layer_of(hook_point) == layer


def test_shareable_cuts_every_local_path_and_keeps_hub_ids(tmp_path: Path) -> None:
    (tmp_path / "deep" / "base").mkdir(parents=True)
    data = {
        "schema": 1,
        "base": {"model": str(tmp_path / "deep" / "base")},
        "clamp": [
            {"sae": {"path": "../x/sae"}, "method": "zero", "features": [1]},
            {"sae": {"release": "r", "id": "a/b"}, "method": "zero", "features": [1]},
        ],
        "verify": {
            "forget_questions": {"path": "/some/where/q.jsonl"},
            "retain_questions": {"dataset": "cais/mmlu", "config": "all"},
            "text": {"dataset": "./local/set"},
        },
    }
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(data))
    shared = Recipe.load(tmp_path / "recipe.toml").shareable()
    assert shared.base.model == "base"
    assert shared.clamp[0].sae.path == "sae"
    assert shared.clamp[1].sae.id == "a/b"
    assert shared.verify is not None
    assert shared.verify.forget_questions.path == "q.jsonl"
    assert shared.verify.retain_questions.dataset == "cais/mmlu"
    assert shared.verify.text.dataset == "set"
    assert "/" not in shared.to_toml().replace("a/b", "").replace("cais/mmlu", "")


def test_a_set_of_questions_may_be_called_as_a_key_is(tmp_path: Path) -> None:
    source = {"path": "deep/q.jsonl"}
    data = {
        "schema": 1,
        "base": {"model": "base"},
        "clamp": [{"sae": {"path": "sae"}, "method": "zero", "features": [0]}],
        "verify": {
            "forget_questions": source,
            "retain_questions": source,
            "text": source,
            "reworded": {"path": source, "dataset": source},
        },
    }
    recipe = Recipe.parse(data, name="test", folder=tmp_path / "a")
    for moved, path in ((recipe.shareable(), "q.jsonl"), (recipe.at(tmp_path), "a/deep/q.jsonl")):
        assert moved.verify is not None
        assert {name: s.path for name, s in moved.verify.reworded.items()} == {
            "path": path,
            "dataset": path,
        }


def test_shipped_recipes_are_the_published_settings() -> None:
    recipes = {path.stem: Recipe.load(path) for path in RECIPES.glob("*.toml")}
    clamp = recipes["gemma-2-2b-wmdp-bio-clamp"].clamp[0]
    assert (clamp.method, clamp.value) == ("clamp", -300.0)
    assert clamp.features == [11766, 9723, 4788, 1709, 9186]
    refusal = recipes["gemma-2-2b-wmdp-bio-refusal"].clamp[0]
    assert (refusal.method, refusal.value, refusal.trigger) == ("refusal", -500.0, 0.05)
    assert refusal.refusal_feature == 15864 and len(refusal.features) == 10
    potter = recipes["gemma-2b-harry-potter"].clamp[0]
    assert (potter.method, potter.features) == ("zero", [10130, 776])
    for name, recipe in recipes.items():
        assert recipe.base.license == ("apache-2.0" if name.startswith("gemma-4") else "gemma")


def test_shipped_recipes_name_what_sae_lens_lists() -> None:
    from sae_lens.loading.pretrained_sae_loaders import get_conversion_loader_name
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    releases = get_pretrained_saes_directory()
    models = set()
    for path in RECIPES.glob("*.toml"):
        recipe = Recipe.load(path)
        models.add(recipe.base.model)
        for clamp in recipe.clamp:
            assert clamp.sae.release is not None and clamp.sae.id is not None
            if clamp.sae.release == GEMMA_4:  # of the hub: `test_gemma_4_saes_are_found`
                continue
            release = releases[clamp.sae.release]
            assert clamp.sae.id in release.saes_map, path.name
            assert get_conversion_loader_name(clamp.sae.release) in LAYOUTS
            assert clamp.hook_point is not None
            layer = re.search(r"layer_(\d+)|blocks\.(\d+)", clamp.sae.id)
            assert layer is not None
            assert layer_of(clamp.hook_point) == int(layer[1] or layer[2]), path.name
            of_model = release.model.removeprefix("google/")
            own = recipe.base.model.removeprefix("google/")
            assert own.removesuffix("-it") == of_model.removesuffix("-it"), path.name
    larger = {f"{size}-{kind}" for size in ("1b", "4b", "12b", "27b") for kind in ("pt", "it")}
    assert {f"google/gemma-3-{size}" for size in ("270m", "270m-it", *larger)} <= models


@pytest.mark.parametrize("kind", ["pt", "it"])
@pytest.mark.parametrize("size", ["270m", "1b", "4b", "12b", "27b"])
def test_gemma_scope_2_saes_are_found(
    size: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the ids that sae_lens lists, of some layers (`-res`) and of all of them (`-res-all`)."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    asked: list[tuple[str, str]] = []

    def download(repo: str, file: str, **_: Any) -> str:
        asked.append((repo, file))
        save_gemma_scope_2((tmp_path / file).parent, tiny_sae())
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    base = (
        "google/gemma-3-270m" if (size, kind) == ("270m", "pt") else f"google/gemma-3-{size}-{kind}"
    )
    shipped = [Recipe.load(path) for path in RECIPES.glob("gemma-3-*.toml")]
    (recipe,) = [recipe for recipe in shipped if recipe.base.model == base]
    layers = {}
    for name, folder in (("res", "resid_post"), ("res-all", "resid_post_all")):
        release = f"gemma-scope-2-{size}-{kind}-{name}"
        ids = [id for id in get_pretrained_saes_directory()[release].saes_map if "16k" in id]
        found = set()
        for sae_id in (id for id in ids if id.endswith("l0_small")):
            files = find_sae(SAESource(release=release, id=sae_id), recipe)
            repo, file = asked.pop()
            assert repo == f"google/gemma-scope-2-{size}-{kind}"
            assert file == f"{folder}/{sae_id}/params.safetensors"
            found.add(resolve_layer(files, None, sae_id)[0])
        layers[name] = found
    assert len(layers["res"]) == 4 and layers["res"] < layers["res-all"]
    assert layers["res-all"] == set(range(len(layers["res-all"])))
    (clamp,) = recipe.clamp
    files, hook_point = find_sae(clamp.sae, recipe), str(clamp.hook_point)
    assert resolve_layer(files, hook_point, "sae") == (layer_of(hook_point), hook_point)


def test_crisps_setting_is_its_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second layer from 4 to 14, and ten features of each."""

    def download(repo: str, file: str, **_: Any) -> str:
        assert repo == "google/gemma-scope-2b-pt-res" and "/width_16k/average_l0_" in file
        save_gemma_scope((tmp_path / file).parent, tiny_sae())
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    recipe = Recipe.load(RECIPES / "gemma-2-2b-wmdp-bio-crisp-select.toml")
    assert recipe.base.model == "google/gemma-2-2b" and recipe.select is not None
    assert (recipe.select.n_features, recipe.select.by) == (10, "sparsity")
    assert {(clamp.method, clamp.features) for clamp in recipe.clamp} == {("zero", "select")}
    found = [
        resolve_layer(find_sae(clamp.sae, recipe), clamp.hook_point, "sae")
        for clamp in recipe.clamp
    ]
    assert [layer for layer, _ in found] == [4, 6, 8, 10, 12, 14]


@pytest.mark.parametrize(
    ("model", "layer"),
    [
        *(("e2b", layer) for layer in (6, 17, 28)),
        *(("e4b", layer) for layer in (7, 21, 35)),
        ("31b", 30),
    ],
)
def test_gemma_4_saes_are_found(
    model: str, layer: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the ids that the hub lists, with the hook points that their configs state."""
    hook = f"model.language_model.layers.{layer}"
    asked: list[tuple[str, str]] = []

    def download(repo: str, file: str, **_: Any) -> str:
        asked.append((repo, file))
        folder = (tmp_path / file).parent
        if not folder.exists():
            save_sae_lens(folder, tiny_sae(), hook_name=hook)
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    recipe = Recipe.load(RECIPES / f"gemma-4-{model}-wmdp-bio-select.toml")
    assert recipe.base.model.lower() == f"google/gemma-4-{model}"
    (clamp,) = recipe.clamp
    shipped = layer_of(str(clamp.hook_point))
    assert clamp.sae.id == f"gemma-4-{model}/btk-mat-layer-{shipped}-k-100"
    source = clamp.sae.model_copy(update={"id": f"gemma-4-{model}/btk-mat-layer-{layer}-k-100"})
    files = find_sae(source, recipe)
    assert asked == [
        (GEMMA_4, f"gemma-4-{model}/btk-mat-layer-{layer}-k-100/{name}")
        for name in ("cfg.json", "sae_weights.safetensors")
    ]
    assert (files.architecture, files.apply_b_dec_to_input) == ("jumprelu", True)
    assert resolve_layer(files, None, "sae") == (layer, f"blocks.{layer}.hook_resid_post")
    if layer == shipped:
        assert resolve_layer(files, clamp.hook_point, "sae")[0] == layer


@pytest.mark.parametrize(
    ("table", "match"),
    [
        ({"reworded": {"german": "x"}}, r"verify\.reworded\.german: got 'x', expected a table$"),
        (
            {"reworded": {"german": {"path": "x", "field": "y"}}},
            r"verify\.reworded\.german\.field: unknown key; (did you mean `(?!field)|remove it)",
        ),
        (
            {"completions": {"promts": {"path": "x"}}},
            r"promts: unknown key; did you mean `prompts`",
        ),
        (
            {"completions": {"prompts": {"path": "x"}, "topic_words": "bell"}},
            r"topic_words: got 'bell', expected a list$",
        ),
    ],
)
def test_what_is_wrong_in_the_optional_tables_is_named(table: dict[str, Any], match: str) -> None:
    source = {"path": "q.jsonl"}
    verify = {"forget_questions": source, "retain_questions": source, "text": source, **table}
    clamp = {"sae": {"path": "sae"}, "method": "zero", "features": [1]}
    data = {"schema": 1, "base": {"model": "m"}, "clamp": [clamp], "verify": verify}
    with pytest.raises(RecipeError, match=match):
        Recipe.parse(data, name="recipe.toml", folder=Path())
